"""A completion that has a choice is one of the choices, spelled by whatever tokens the model likes best."""

import pytest
import torch

from rwkvpipe.base.config import RwkvConfig, SamplingConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.infer.engine import Engine
from rwkvpipe.infer.words import Choices, Words, words
from rwkvpipe.model.family import build
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer

BYTES = {n + 1: bytes([n]) for n in range(256)}


def engine(tokenizer, rows=4) -> Engine:
    network = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=300))
    network.initialise(0)
    return Engine(network.eval(), tokenizer, rows)


def written(tokenizer, texts, **more) -> list:
    sampling = SamplingConfig(temperature=2.0, choices=texts, max_tokens=200, stop=(), **more)
    return list(engine(tokenizer).generate(["q", "which?"], sampling, 8))


@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(0), ByteTokenizer(1), TrieTokenizer(BYTES | {257: b"yes", 258: b"no", 259: "né".encode()})],
)
def test_every_choice_comes_and_nothing_else(tokenizer):
    texts = ("yes", "yesterday", "no", "né", "maybe so")
    found = written(tokenizer, texts, seed=3)
    assert {one.text for one in found} <= set(texts)
    assert len({one.text for one in found}) >= 3
    assert {one.finish for one in found} == {"stop"}


def test_a_choice_that_begins_another_is_ended_by_the_end_of_documents():
    found = written(ByteTokenizer(1), ("a", "ab"), bias={ord("a") + 1: 0.0})
    assert {one.text for one in found} == {"a", "ab"}
    assert all(one.ids[-1] == 0 for one in found if one.text == "a")
    assert {one.text for one in written(ByteTokenizer(0), ("a", "ab"))} == {"a"}  # nothing ends documents there


def test_tokens_that_lead_nowhere_are_left_out():
    vocabulary = TrieTokenizer({1: b"a", 2: b"ab", 3: b"bc", 4: b"c"})
    tree = Choices(("abc",), Words(vocabulary, 5))
    assert tree.root.ids == [1, 2]
    assert Choices(("abcd", "c"), Words(vocabulary, 5)).root.ids == [4]  # nothing spells d


def test_chances_are_those_of_the_model_among_what_is_allowed():
    tree = words(ByteTokenizer(1), 257)
    one = engine(ByteTokenizer(1))
    free = torch.tensor([one.loglikelihood([("q", text)])[0] for text in ("x", "y", "z")])
    found = one.generate(["q"], SamplingConfig(choices=("x", "y", "z"), stop=(), seed=1), 600)
    count = torch.bincount(torch.tensor([ord(c.text) - ord("x") for c in found]), minlength=3) / 600
    assert torch.allclose(count, free.softmax(0).float(), atol=0.07)
    assert words(one.tokenizer, 257) is not tree  # of another tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "more", "said"),
    [
        (IntegerTokenizer(20), {"choices": ("1",)}, "whose tokens write bytes"),
        (ByteTokenizer(1), {"choices": ("a", "")}, "empty text is no choice"),
        (TrieTokenizer({1: b"q", 2: b"w", 3: b"h", 4: b"i", 5: b"c", 6: b"?"}), {"choices": ("z",)}, "spell none"),
        (ByteTokenizer(1), {"choices": ("a",), "ban": (ord("a") + 1,)}, "no token of the vocabulary"),
        (ByteTokenizer(0), {"ban": tuple(range(256))}, "leaves no id"),
    ],
)
def test_choices_that_cannot_be_are_refused_in_one_line(tokenizer, more, said):
    prompt = "1 2" if isinstance(tokenizer, IntegerTokenizer) else "q"
    with pytest.raises(ConfigError, match=said) as caught:
        list(engine(tokenizer).generate([prompt], SamplingConfig(**more)))
    assert "\n" not in str(caught.value)
