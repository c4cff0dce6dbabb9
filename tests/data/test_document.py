"""Documents become ids, and equal documents fall on the same side."""

import numpy as np
import pytest

from rwkvpipe.base.errors import DataError
from rwkvpipe.data.document import Document, encoded
from rwkvpipe.tokenizer import byte, trie
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer


def whole(document, tokenizer):
    """All ids and, for a talk, its mask."""
    pieces = list(encoded(document, tokenizer))
    return [int(number) for ids, _ in pieces for number in ids], pieces[0][1]


def test_a_text_ends_with_the_end_of_a_document_where_there_is_one():
    assert whole(Document(text="ab"), ByteTokenizer(1)) == ([98, 99, 0], None)
    assert whole(Document(text="ab"), ByteTokenizer(0)) == ([97, 98], None)


def test_of_a_question_the_answer_is_learned():
    ids, mask = whole(Document(question="1+1?", answer="2"), ByteTokenizer(0))
    assert bytes(ids) == b"User: 1+1?\n\nAssistant: 2\n\n"
    assert bytes(i for i, m in zip(ids, mask, strict=True) if m) == b" 2\n\n"


def test_numbers_become_ids_one_higher():
    ids, mask = whole(Document(ids=np.array([0, 9], np.uint8)), IntegerTokenizer(10))
    assert ids == [1, 10, 0] and mask is None
    with pytest.raises(DataError, match="a.npy: row 3: holds 10, the tokenizer's numbers end at 9"):
        whole(Document(ids=[10], origin="a.npy: row 3"), IntegerTokenizer(10))
    with pytest.raises(DataError, match="holds 18446744073709551615"):
        whole(Document(ids=np.array([2**64 - 1], np.uint64)), IntegerTokenizer(10))


def test_an_unknown_character_is_named_with_its_place():
    with pytest.raises(DataError, match="^a.txt:1: the vocabulary has no 'b'"):
        whole(Document(text="ab", origin="a.txt:1"), TrieTokenizer({1: b"a"}))


def test_fractions_depend_on_the_content_alone():
    kinds = [
        lambda word, origin: Document(text=word, origin=origin),
        lambda word, origin: Document(messages=({"role": "user", "content": word},), origin=origin),
        lambda word, origin: Document(question=word, answer=origin),
        lambda word, origin: Document(ids=np.array([len(word)], np.uint16 if origin == "a" else np.int64)),
    ]
    for make in kinds:
        assert make("one", "a").fraction == make("one", "b").fraction != make("three", "a").fraction
    fractions = [Document(text=str(number)).fraction for number in range(2000)]
    assert all(0 <= fraction < 1 for fraction in fractions)
    assert 150 < sum(fraction < 0.1 for fraction in fractions) < 250


def test_words_are_all_that_a_model_may_meet():
    question = Document(question="Which?", answer="b", options=("a", "b"), label=1)
    assert question.words() == ["Which?", "User: Which?\n\nAssistant: b\n\n", " a", " b"]
    assert Document(text="x").words() == ["x"] and Document(ids=[1]).words() == []
    assert question.row() == {"question": "Which?", "answer": "b", "options": ["a", "b"], "label": 1}
    assert Document(question="1?", answer="2").row() == {"question": "1?", "answer": "2"}


def test_pieces_give_the_same_ids_as_the_whole(monkeypatch):
    words = [*(bytes([number]) for number in range(256)), "ä".encode(), b"\n\n", b"abc", b"bcd", b"aaaaaaa"]
    text = "aabcdabc\n\n\näöaaaaaaaaa" * 20
    for tokenizer in (TrieTokenizer(dict(enumerate(words, 1))), ByteTokenizer(1), IntegerTokenizer(9)):
        source = "1 2 3" if isinstance(tokenizer, IntegerTokenizer) else text
        for size in (1, 2, 3, 7, 1000):
            monkeypatch.setattr(byte, "PIECE", size)
            monkeypatch.setattr(trie, "PIECE", size)
            assert whole(Document(text=source), tokenizer)[0] == [*tokenizer.encode(source), 0]


def test_an_unknown_character_of_a_long_text_is_named_with_its_line(monkeypatch):
    monkeypatch.setattr(trie, "PIECE", 2)
    with pytest.raises(DataError, match=r"no 'é' \(U\+00E9\), line 3, character 2 of 'bé'; learn"):
        whole(Document(text="ab\n\nbéa"), TrieTokenizer({1: b"a", 2: b"b", 3: b"\n"}))
