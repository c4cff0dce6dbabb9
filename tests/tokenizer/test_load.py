"""A tokenizer comes out of its folder as it went in."""

import json

import pytest

from rwkvpipe.base.errors import DataError
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.tokenizer.load import load_tokenizer, save_tokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer, write_vocab


@pytest.mark.parametrize(
    "tokenizer, text",
    [
        (ByteTokenizer(0), "abc"),
        (ByteTokenizer(1), "abc"),
        (IntegerTokenizer(12), "3 11"),
        (TrieTokenizer({1: b"a", 2: b"bc"}), "abc"),
    ],
)
def test_what_is_saved_is_loaded(tmp_path, tokenizer, text):
    save_tokenizer(tmp_path, tokenizer)
    for place in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = load_tokenizer(place)
        assert type(loaded) is type(tokenizer)
        assert (loaded.size, loaded.eos, loaded.encode(text)) == (tokenizer.size, tokenizer.eos, tokenizer.encode(text))


def test_the_file_says_what_it_is(tmp_path):
    save_tokenizer(tmp_path, ByteTokenizer(1))
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == {"kind": "bytes", "offset": 1, "ids": 257, "eos": 0}


def test_bytes_is_a_name_where_no_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("bytes").encode("a") == [97]
    save_tokenizer("bytes", ByteTokenizer(1))
    assert load_tokenizer("bytes").encode("a") == [98]


def test_a_vocabulary_file_is_a_tokenizer(tmp_path):
    write_vocab(tmp_path / "words.txt", {1: b"a"})
    assert load_tokenizer(tmp_path / "words.txt").encode("aa") == [1, 1]


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"kind": "words"}', "kind is 'words'; known: bytes, integer, world, trie, bpe, own"),
        ("[]", "kind is None"),
        ('{"kind": "integer", "size": "8"}', "size: a whole number"),
        ('{"kind": "integer"}', "size: a whole number"),
        ('{"kind": "bytes", "offset": 2}', "offset: a whole number"),
        ("{", "not JSON"),
    ],
)
def test_a_damaged_description_is_named(tmp_path, text, problem):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=problem):
        load_tokenizer(tmp_path)


def test_an_empty_folder_is_no_tokenizer(tmp_path):
    with pytest.raises(DataError, match="no tokenizer there"):
        load_tokenizer(tmp_path)
