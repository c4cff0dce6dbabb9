"""Texts fit their regular expression or their JSON schema, whole, whatever the tokens."""

import json
import re
import sys

import pytest

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.infer import grammar
from rwkvpipe.infer.engine import Engine
from rwkvpipe.infer.words import Words
from rwkvpipe.model.family import build
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer

pytest.importorskip("llguidance")
PIECES = ["yes", "no", " no", "12", "34", "é", '{"', '"a', '":', '": ', ", ", ', "b', "true", '"}', "es!"]
EVERY = {n: bytes([n - 1]) for n in range(1, 257)} | {257 + n: piece.encode() for n, piece in enumerate(PIECES)}
TOKENIZERS = {"bytes": ByteTokenizer(1), "endless": ByteTokenizer(0), "pieces": TrieTokenizer(EVERY)}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["yes", "no", "é"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def engine(name: str, rows: int = 4) -> Engine:
    from rwkvpipe.base.config import RwkvConfig

    network = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=300))
    network.initialise(0)
    return Engine(network.eval(), TOKENIZERS[name], rows)


def written(name: str, rows: int = 4, **rules) -> list[tuple]:
    asked = SamplingConfig(max_tokens=60, stop=(), seed=3, **rules)
    found = engine(name, rows).generate(["once", "twice"], asked, 6)
    return sorted((one.prompt, one.sample, one.text, one.finish) for one in found)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_fit_the_expression_whole(name):
    rule = "(yes|no|[1-9][0-9]{1,3}é?)(\\n|!)"
    found = written(name, regex=rule)
    assert all(re.fullmatch(rule, text) and finish == "stop" for *_, text, finish in found)
    assert len({text for *_, text, _ in found}) > 4
    assert found == written(name, 1, regex=rule) == written(name, 7, regex=rule)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_fit_the_schema(name):
    for *_, text, finish in written(name, json_schema=SCHEMA):
        value = json.loads(text)
        assert finish == "stop" and text == json.dumps(value, ensure_ascii=False)
        assert 0 <= value["a"] <= 99 and value["b"] in ("yes", "no", "é") and len(value) == 2


def test_a_longer_text_may_come_where_documents_can_end_and_else_the_shortest_does():
    ends = {text for *_, text, _ in written("bytes", regex="a{1,3}")}
    assert ends > {"a"} and {text for *_, text, _ in written("endless", regex="a{1,3}")} == {"a"}


def test_bans_and_the_limit_hold_beside_it():
    assert {text for *_, text, _ in written("bytes", regex="[ab]", ban=(98,))} == {"b"}
    asked = SamplingConfig(max_tokens=2, regex="[ab]{9}")
    (one,) = engine("bytes").generate(["x"], asked)
    assert re.fullmatch("[ab]{2}", one.text) and one.finish == "length"
    with pytest.raises(ConfigError, match="no token of the vocabulary"):
        written("bytes", regex="a", ban=(98,))


def nested(depth):
    """A schema inside a schema inside ..."""
    found = {"type": "integer"}
    for _ in range(depth):
        found = {"items": found}
    return found


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"regex": "("}, "sampling.regex: .*unclosed group"),
        ({"regex": "(?=a)b"}, "sampling.regex: .*look-around"),
        ({"json_schema": {"type": "objekt"}}, "sampling.json_schema: Invalid type"),
        ({"json_schema": nested(300)}, "sampling.json_schema: recursion limit exceeded"),
        ({"json_schema": {"const": float("nan")}}, "sampling.json_schema: expected value"),
        ({"json_schema": {"maximum": 10**400}}, "sampling.json_schema: number out of range"),
    ],
)
def test_what_is_no_grammar_is_refused_in_one_line(rules, said):
    with pytest.raises(ConfigError, match=said) as caught:
        written("bytes", **rules)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "schema", [{"$ref": "#"}, {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}]
)
def test_what_has_no_end_is_told_where_it_is_found_out(schema):
    with pytest.raises(ConfigError, match="went too far: [^<]+$") as caught:
        written("bytes", json_schema=schema)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="went too far"):
        list(engine("bytes").stream("once", SamplingConfig(json_schema=schema)))


def test_two_forms_at_once_are_refused():
    with pytest.raises(ValueError, match="give one of them"):
        SamplingConfig(regex="a", choices=("b",))


def test_a_vocabulary_of_numbers_writes_no_letters():
    with pytest.raises(ConfigError, match="need a tokenizer of bytes"):
        grammar.Grammar(SamplingConfig(regex="1"), Words(IntegerTokenizer(9), 12))


def test_without_the_library_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[grammar\]'"):
        grammar.Grammar(SamplingConfig(regex="zz"), Words(TOKENIZERS["bytes"], 259))


def test_the_server_answers_in_json_where_asked():
    pytest.importorskip("starlette")
    from rwkvpipe.web.asked import House

    house, asked = House(engine("bytes"), "m", SamplingConfig()), [{"role": "user", "content": "x"}]
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    found = house.read("chat", {"model": "m", "messages": asked, "response_format": form})
    assert found.sampling.json_schema == SCHEMA
    found = house.read("chat", {"model": "m", "messages": asked, "response_format": {"type": "json_object"}})
    assert found.sampling.json_schema == {"type": "object"}
    assert house.read("text", {"model": "m", "prompt": "a", "guided_regex": "a+"}).sampling.regex == "a+"
