"""What is remembered of pieces are the ids that the library tokenizers gives for whole texts."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpipe.tokenizer import pieces
from rwkvpipe.tokenizer.bpe import BpeTokenizer, learn

# white space of all kinds, ends of shortened words, and letters, digits and signs in and beyond ASCII
ODD = [
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u1680", "\u180e"),
    *("\u2003", "\u2028", "\u202f", "\u3000", "\u200b", "\u200d", "\ufeff", "\ufffd", "\x00", "\x7f", "'", "''"),
    *("'s", "'t", "'re", "'S", "'é", "’s", "ʼs", "don't", "n't", "l'été", "é", "É", "ß", "e\u0301", "\u0301", "ǅ"),
    *("İ", "ﬁ", "привет", "мир", "世界", "。", "，", "“", "”", "—", "…"),
    *("😀", "👩\u200d👩", "1", "23", "4567", "٣", "Ⅷ"),
    *("½", "²", "a", "b", "word", "Word", "foo_bar", "(x)", "[0]", "{a:b}", "==", "/", "\\", "_", "-", "--", "."),
    *("...", ",", "`", "~", "@", "#", "$x", "%", "^", "&", "<b>", "|"),
]
TEXT = st.lists(st.sampled_from(ODD) | st.text(max_size=2), max_size=25).map("".join)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A vocabulary that joins whatever stands beside each other within a word of such texts."""
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(ODD, 20)) for _ in range(3000)]
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    path.write_text(learn(texts, 4000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def learned(path):
    return BpeTokenizer(path)


def by_library(tokenizer, texts):
    return [one.ids for one in tokenizer._inner.encode_batch_fast(texts, add_special_tokens=False)]


def by_heart(tokenizer, texts):
    return [np.frombuffer(ids, np.int32).tolist() for ids in tokenizer._pieces.encode_all(texts)]


@settings(max_examples=400)
@given(st.lists(TEXT, max_size=8))
def test_any_texts_have_the_ids_of_the_library(learned, texts):
    for text in texts:
        assert "".join(pieces.PIECE.findall(text)) == text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "NEW", 0)  # always by pieces
        assert by_heart(learned, texts) == by_library(learned, texts)


@pytest.mark.parametrize(("part", "known", "new"), [(40, 30, 0), (7, 1 << 17, 0), (1 << 18, 5, 1), (40, 30, 3)])
def test_texts_of_any_length_and_a_full_memory_change_nothing(path, monkeypatch, part, known, new):
    for name, value in (("PART", part), ("KNOWN", known), ("NEW", new), ("LONG", 4)):
        monkeypatch.setattr(pieces, name, value)
    tokenizer, draw = BpeTokenizer(path), np.random.default_rng(1)
    texts = ["".join(draw.choice(ODD, size)) for size in (0, 1, 3, 50, 400, 2, 0, 60, 7)] * 2
    assert by_heart(tokenizer, texts) == by_library(tokenizer, texts)


def test_pieces_that_came_before_are_not_encoded_again(learned, monkeypatch):
    asked = []
    monkeypatch.setattr(pieces, "NEW", 1)
    own = pieces.Pieces(lambda texts: asked.append(sorted(texts)) or [[1]] * len(texts))
    assert [len(ids) for ids in own.encode_all(["the cat, the dog", "the cat\n\n"])] == [20, 12]
    assert list(own.encode_all(["the cat"])) and asked == [sorted(["the", " cat", ",", " the", " dog", "\n\n"])]


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "NFC"}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True, "trim_offsets": True}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True}},
    {"added_tokens": [{"id": 0, "content": "word W", "special": False, "single_word": False, "lstrip": False,
                       "rstrip": False, "normalized": False}]},
])  # fmt: skip
def test_words_told_apart_otherwise_are_not_remembered(path, tmp_path, learned, change):
    assert learned._pieces is not None
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    tokenizer = BpeTokenizer(other)
    assert tokenizer._pieces is None
    texts = [text.encode() for text in ("word Word e\u0301", " a  b", "") * 3]
    ends = np.cumsum([len(text) for text in texts])
    data, starts = np.frombuffer(b"".join(texts), np.uint8), ends - [len(text) for text in texts]
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    wanted = [ids + end for ids in by_library(tokenizer, [text.decode() for text in texts])]
    found, sizes = tokenizer.encode_all(data, starts, ends)
    assert found.tolist() == sum(wanted, []) and sizes.tolist() == [len(ids) for ids in wanted]
