"""Rows of every kind that people bring become the ids and marks that the reference has."""

import json

import pytest

from rwkvpipe import pack
from rwkvpipe.base.config import CorpusConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.strict import check
from rwkvpipe.data.binidx import Binidx
from rwkvpipe.data.talk import Layout, talk
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.load import save_tokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer, read_vocab


def spec(**given):
    return CorpusConfig(path="x", tokenizer="t", format="chat", **given)


@pytest.fixture(scope="module")
def world(shared_data):
    return TrieTokenizer(read_vocab(shared_data / "rwkv_vocab_v20230424.txt"))


def test_every_row_of_the_reference_has_its_ids_and_labels(goldens, world):
    kinds = set()
    for known in json.loads((goldens / "tune/sft_data.json").read_text())["rows"]:
        asked = known["options"]
        if asked.get("style", "chat") != "chat":
            continue
        last = "last" if asked.get("last_reply_only") else "all"
        choices = spec(replies=last, eod=asked.get("append_eod", False))
        given = talk(known["row"], {}, "f:1", choices)
        ids, mask = Layout(choices)(given.messages, world)
        assert ids == known["input_ids"]
        assert mask == [int(label != -100) for label in known["labels"]]
        for form in ("", "preshifted_"):
            row = {"input_ids": known[f"{form}input_ids"], "labels": known[f"{form}labels"]}
            shift = "preshifted" if form else "internal"
            for how in ("auto", shift):
                again = Layout(choices)(talk(row, {}, "f:1", spec(labels=how)).messages, world)
                # the first token is no target, so shifted labels do not say whether it is learned
                assert (again[0], again[1][1:]) == (ids, mask[1:]), (form, how)
        kinds |= known["row"].keys()
    assert kinds == {"messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text"}


def said(row, **given):
    """What is read and, in brackets, what is learned."""
    tokenizer, choices = ByteTokenizer(1), spec(**given)
    ids, mask = Layout(choices)(talk(row, {}, "f:1", choices).messages, tokenizer)
    text, before = "", 0
    for number, learned in zip(ids, mask, strict=True):
        text += "" if learned == before else "[" if learned else "]"
        text += tokenizer.decode([number]) if number else "<end>"
        before = learned
    return text + "]" * before


USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}


@pytest.mark.parametrize(
    ("row", "given", "text"),
    [
        ({"messages": [USER, REPLY, USER, REPLY]}, {"replies": "last"},
         "User: Hi\n\nAssistant: Ho\n\nUser: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"messages": [USER, REPLY | {"train": False}, USER, REPLY]}, {},
         "User: Hi\n\nAssistant: Ho\n\nUser: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"messages": [USER, REPLY | {"weight": 1}, USER, REPLY | {"weight": 0}]}, {},
         "User: Hi\n\nAssistant:[ Ho\n\n]User: Hi\n\nAssistant: Ho\n\n"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt_ignore", "value": "no"},
                            {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, {},
         "User: Hi\n\nAssistant: no\n\nUser: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"messages": [USER, {"role": "tool", "content": "7"}, REPLY]}, {"eod": True},
         "User: Hi\n\nUser: Function output:\n7\n\nAssistant:[ Ho\n\n<end>]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                       REPLY]}, {}, "User: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"messages": None, "prompt": "1 + 1 =", "completion": " 2"}, {}, "1 + 1 =[ 2<end>]"),
        ({"prompt": [USER, REPLY, USER], "completion": [REPLY]}, {},
         "User: Hi\n\nAssistant: Ho\n\nUser: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"prompt": "Hi", "completion": [REPLY]}, {}, "User: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"instruction": "Do", "input": None, "output": "Done", "text": "all of it"}, {},
         "User: Do\n\nAssistant:[ Done\n\n]"),
        ({"instruction": "Do", "input": "this", "response": "Done"}, {}, "User: Do\nthis\n\nAssistant:[ Done\n\n]"),
        ({"query": "Hi", "response": "Ho"}, {}, "User: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"system": "Be.", "instruction": "Hi", "output": "Ho", "history": [["A", "B"]]}, {},
         "System: Be.\n\nUser: A\n\nAssistant:[ B\n\n]User: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"system": "Be.", "query": "Hi", "response": "Ho", "history": [["A", "B"]]}, {"replies": "last"},
         "System: Be.\n\nUser: A\n\nAssistant: B\n\nUser: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"system": "Be.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, {},
         "System: Be.\n\nUser: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"system": "Be.", "messages": [{"role": "system", "content": "Be."}, USER, REPLY], "history": []}, {},
         "System: Be.\n\nUser: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"system": "", "question": "Hi", "answer": "Ho"}, {}, "User: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"system": "Be.", "question": "Hi", "answer": "Ho"}, {}, "System: Be.\n\nUser: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"question": "Hi", "answer": "Ho", "text": "no"}, {}, "User: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"text": "Once."}, {"replies": "last"}, "[Once.<end>]"),
        ({"messages": [USER, REPLY], "tools": [{"name": "sum"}]}, {},
         'System: Tools:\n{"name": "sum"}\nReturn only a JSON function call.\n\nUser: Hi\n\nAssistant:[ Ho\n\n]'),
        ({"messages": [{"role": "system", "content": "Be."}, USER, REPLY], "tools": '[{"name": "sum"}]'}, {},
         'System: Be.\nTools:\n{"name": "sum"}\nReturn only a JSON function call.\n\n'
         "User: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"messages": [USER, REPLY | {"tool_calls": None}], "tools": None}, {}, "User: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"messages": [USER, REPLY],
          "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
          "query": "Hi", "response": "Ho"}, {}, "User: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"messages": [USER, REPLY], "prompt": "Hi", "answer": "Ho"}, {}, "User: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"instruction": "Do", "output": None, "response": "Done"}, {}, "User: Do\n\nAssistant:[ Done\n\n]"),
        ({"messages": [USER, REPLY | {"train": False}, USER, REPLY, USER]}, {"replies": "last", "eod": True},
         "User: Hi\n\nAssistant: Ho\n\nUser: Hi\n\nAssistant:[ Ho\n\n]User: Hi\n\n[<end>]"),
        ({"messages": [{"role": "system", "content": "Be."}, USER | {"train": True, "weight": 1}, REPLY]}, {},
         "System: Be.\n\nUser: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"conversations": [{"from": "system", "value": "Be."}, {"from": "user", "value": "Hi"},
                            {"from": "assistant", "value": "Ho"}]}, {},
         "System: Be.\n\nUser: Hi\n\nAssistant:[ Ho\n\n]"),
        ({"input_ids": [73, 106, 11], "labels": [-100, 106, 11]}, {}, "H[i\n]"),
        ({"input_ids": [73, 106], "labels": [106, 11]}, {}, "H[i\n]"),
        ({"input_ids": [73, 106, 1], "labels": [106, -100, -100]}, {}, "H[i]\0"),
        ({"input_ids": [8, 8, 8], "labels": [8, 8, 8]}, {}, "[\x07\x07\x07]"),
        ({"input_ids": [8, 8, 8], "labels": [8, 8, 8]}, {"labels": "preshifted"}, "\x07[\x07\x07\x07]"),
    ],
)  # fmt: skip
def test_what_is_learned_is_what_the_row_says(row, given, text):
    assert said(row, **given) == text


@pytest.mark.parametrize("laid", ["by us", "by a template", "by a template with tags"])
def test_a_message_counts_as_much_as_its_weight_says(tmp_path, laid):
    tags = ("{% generation %}", "{% endgeneration %}") if laid.endswith("tags") else ("", "")
    turn = "{{ m.role }}>" + tags[0] + "{{ m.content }};" + tags[1]
    if tags[0]:
        turn = "{% if m.role == 'assistant' %}" + turn + "{% else %}{{ m.role }}>{{ m.content }};{% endif %}"
    template = "{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}assistant>{% endif %}"
    (tmp_path / "t.jinja").write_text(template)
    choices = spec(**({"template": str(tmp_path / "t.jinja")} if laid != "by us" else {}))
    said = [REPLY | {"content": text, "weight": w} for text, w in (("W", 1), ("X", 0.5), ("Y", 0), ("Z", 7))]
    row = {"messages": [turn for reply in said for turn in (USER, reply)]}
    tokenizer = ByteTokenizer(1)
    ids, mask = Layout(choices)(talk(row, {}, "f:1", choices).messages, tokenizer)
    found = {tokenizer.decode([number]): weight for number, weight in zip(ids, mask, strict=True)}
    assert {text: found[text] for text in "WXYZ"} == {"W": 1, "X": 0.5, "Y": 0, "Z": 7} and found["H"] == 0
    last = spec(replies="last", **({"template": choices.template} if choices.template else {}))
    mask = Layout(last)(talk(row, {}, "f:1", last).messages, tokenizer)[1]
    assert set(mask) == {0, 7}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, "2 `input_ids` with 1 `labels`"),
        ({"input_ids": [1, 2, 3], "labels": [-100, 7, 3]}, "`labels` are neither those of the same positions"),
        ({"input_ids": [1, -2], "labels": [1, 2]}, "`input_ids` must be a list of whole numbers from 0 up"),
        ({"input_ids": [1, 2], "labels": [-101, 2]}, "`labels` must be a list of whole numbers from -100 up"),
        ({"input_ids": [1, 2]}, "`labels` must be a list"),
        ({"input_ids": [1, True], "labels": [1, 1]}, "`input_ids` must be a list"),
        ({"prompt": 5, "completion": "x"}, "`prompt` is int 5"),
        ({"prompt": "x", "completion": " "}, "`completion` is empty"),
        ({"messages": [USER | {"weight": -0.5}]}, "turn 1: weight is -0.5; it is a number from 0 up, below 1,000,000"),
        ({"messages": [USER | {"weight": "2"}]}, "turn 1: weight is '2'"),
        ({"messages": [USER | {"weight": True}]}, "turn 1: weight is True"),
        ({"messages": [USER | {"weight": float("nan")}]}, "turn 1: weight is nan"),
        ({"messages": [USER | {"weight": 1e6}]}, "turn 1: weight is 1000000.0"),
        ({"messages": [USER | {"train": "no"}]}, "turn 1: train is 'no'"),
        ({"messages": [USER, REPLY | {"train": True, "weight": 0}]}, "turn 2: train is True and weight 0; remove one"),
        (
            {"messages": [USER, REPLY], "prompt": "Hi", "completion": "Ho"},
            "`messages` and `prompt, completion` make different talks",
        ),
        (
            {"messages": [USER, REPLY], "input_ids": [1, 2], "labels": [-100, 2]},
            "`messages` and `input_ids, labels` make different talks",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}],
                "instruction": "Do",
                "output": "Done",
            },
            "`conversations` and `instruction, output` make different talks",
        ),
        ({"instruction": "Do", "output": "Done", "response": "No"}, "`output` and `response` say different things"),
        ({"messages": [{"role": "raw", "content": "x"}]}, "role is 'raw'; known: system, user, assistant, tool"),
        ({"messages": [USER, REPLY], "tools": 7}, "`tools` must be a list of objects"),
        ({"messages": [{"role": "system", "content": "A"}, USER, REPLY], "system": "B"}, "say different things"),
        ({"prompt": "x", "completion": "y", "system": "B"}, "`system` cannot stand before what is laid out already"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "`history` must be a list of pairs of texts"),
        ({"messages": [USER, REPLY | {"reasoning_content": "So."}]}, "only a `template` can write `reasoning_content`"),
        ({"messages": [USER, REPLY], "tools": "{sum}"}, "`tools` is a text that is no JSON"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
            "turn 2: only a `template` can write `tool_calls`",
        ),
        ({"prompt": "x"}, "no `messages`, `question` or other keys of a talk; the row has prompt"),
    ],
)
def test_a_row_that_says_nothing_to_learn_from_is_named(row, problem):
    with pytest.raises(DataError, match=f"^f:1: .*{problem}"):
        talk(row, {}, "f:1", spec())


def test_an_id_of_a_row_that_no_token_owns_is_named():
    given = talk({"input_ids": [1, 0, 7, 2], "labels": [1, 0, 7, 2]}, {}, "f:1", spec())
    trie = TrieTokenizer({1: b"a", 2: b"b", 9: b"c"})
    with pytest.raises(DataError, match="`input_ids` holds the id 7, which stands for nothing in the vocabulary of 10"):
        Layout(spec())(given.messages, trie)


def test_a_template_is_given_tools_and_their_calls(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{% if tools %}<{{ tools[0].name }}>{% endif %}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
        "{% for call in m.tool_calls or [] %}!{{ call.name }}{% endfor %}{{ m.name or '' }};{% endfor %}"
    )
    turns = [
        USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "sum"}]},
        {"role": "tool", "content": "7", "name": "sum"}, REPLY,
    ]  # fmt: skip
    text = "<sum>u:Hi;[a:!sum;]t:7sum;[a:Ho;]"
    for tools in ([{"name": "sum"}], '[{"name": "sum"}]'):
        assert said({"messages": turns, "tools": tools}, template=str(file)) == text
    file.write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.reasoning_content }}>{{ m.content }};{% endfor %}")
    assert said({"messages": [USER, REPLY | {"reasoning_content": "So."}]}, template=str(file)) == "u:>Hi;[a:So.>Ho;]"


def test_rows_of_several_kinds_are_packed_with_their_marks(tmp_path):
    rows = [{"messages": [USER, REPLY]}, {"prompt": "1 + 1 =", "completion": " 2"}, {"text": "Once."},
            {"input_ids": [73, 106], "labels": [-100, 106]}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tokenizer(tmp_path / "bytes", ByteTokenizer(1))
    words = ["--tokenizer", str(tmp_path / "bytes"), "--out", str(tmp_path / "out")]
    pack.main([str(tmp_path / "a.jsonl"), "--spec", spec().model_dump_json(), *words])
    data, learned = Binidx(tmp_path / "out/train"), []
    for start, end in data.documents.tolist():
        ids, mask = data.tokens(start, end - start), data.mask(start, end - start)
        learned.append(ByteTokenizer(1).decode(ids[mask == 1]))
    assert learned == [" Ho\n\n", " 2", "Once.", "i"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"input_ids": [1, 300], "labels": [1, 300]}) + "\n")
    with pytest.raises(DataError, match="a.jsonl:1: `input_ids` holds the id 300, which stands for nothing"):
        pack.main([str(tmp_path / "a.jsonl"), "--spec", spec().model_dump_json(), *words])


def test_choices_of_talks_belong_to_talks():
    with pytest.raises(ConfigError, match="replies, eod and labels belong to format chat"):
        check(CorpusConfig, {"path": "x", "tokenizer": "t", "eod": True}, "c")
