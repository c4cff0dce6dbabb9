"""Longest match as RWKV-LM does it, and vocabulary files that say where they are broken."""

import json
import time

import pytest

from rwkvpipe.base.errors import DataError
from rwkvpipe.tokenizer.trie import TrieTokenizer, read_vocab, write_vocab

ENTRIES = {1: b"a", 2: b"ab", 3: b"abcd", 4: b"c", 5: "é".encode(), 6: b"b"}


@pytest.fixture(scope="module")
def world(shared_data):
    return shared_data / "rwkv_vocab_v20230424.txt"


def test_the_longest_entry_is_taken():
    trie = TrieTokenizer(ENTRIES)
    assert trie.encode("abcd") == [3]
    assert trie.encode("abca") == [2, 4, 1]  # abcd was nearly there
    assert trie.encode("") == []
    assert (trie.size, trie.eos) == (7, 0)


def test_what_is_encoded_comes_back():
    trie = TrieTokenizer(ENTRIES)
    ids = trie.encode("abcdéba")
    assert trie.decode(ids) == "abcdéba"
    assert trie.decode([0, *ids, 0]) == "abcdéba"
    assert trie.decode_bytes(ids) == "abcdéba".encode()
    assert trie.encode("abcdéba".encode()) == ids


def test_half_a_character_becomes_the_replacement_character():
    trie = TrieTokenizer({1: b"a", 2: b"\xc3"})
    assert trie.decode([1, 2]) == "a\ufffd"


@pytest.mark.parametrize("text, named", [("abz", "'z'"), ("a€", "U+20AC"), ("aè", "'è'"), (b"a\xff", "0xff")])
def test_a_character_without_an_entry_is_named(text, named):
    with pytest.raises(DataError, match="the vocabulary has no") as caught:
        TrieTokenizer(ENTRIES).encode(text)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_an_id_without_an_entry_is_named():
    trie = TrieTokenizer(ENTRIES)
    assert trie.owns(6) and not trie.owns(0) and not trie.owns(7)
    with pytest.raises(DataError, match="id 7 "):
        trie.decode([1, 7])


def test_doubled_empty_and_zero_entries_are_refused():
    for entries in ({1: b"a", 2: b"a"}, {1: b""}, {0: b"a"}):
        with pytest.raises(DataError):
            TrieTokenizer(entries)


def test_a_written_vocabulary_is_read_back(tmp_path):
    entries = ENTRIES | {9: b"\xff\xfe", 10: b" '\"\\\n", 11: "\x85\u2028".encode(), 12: b"\r"}
    write_vocab(tmp_path / "v.txt", entries)
    assert read_vocab(tmp_path / "v.txt") == entries
    crlf = (tmp_path / "v.txt").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "v.txt").write_bytes(crlf)
    assert read_vocab(tmp_path / "v.txt") == entries


@pytest.mark.parametrize(
    "data, entries",
    [
        (b"# a line\r\n\r\n1 'a' 1\r\n   \n#2 'b' 1\n3 '#' 1", {1: b"a", 3: b"#"}),
        (b"\xef\xbb\xbf3 'c' 1\n1 ' ' 1\n2 '  ' 2\n", {3: b"c", 1: b" ", 2: b"  "}),
        (b"5 'a' 1\n900 'b' 1\n70000 'c' 1\n9000000 'd' 1\n", {5: b"a", 900: b"b", 70000: b"c", 9000000: b"d"}),
        (rb"7 b'\x00\t\n\r\\\'\"\a\b\f\v\0\377\xff' 14", {7: b"\0\t\n\r\\'\"\a\b\f\v\0\xff\xff"}),
        (rb"7 '\u00e9\N{BULLET}\U0001F600\x41' 10", {7: "é\u2022\U0001f600A".encode()}),
        (b"1 B'a' 1\n2 rb'\\n' 2\n3 u'c' 1\n4 \"it's\" 4\n", {1: b"a", 2: b"\\n", 3: b"c", 4: b"it's"}),
        ("1 '日本' 6\n2 '\u2028' 3\n3 '\x85' 2".encode(), {1: "日本".encode(), 2: b"\xe2\x80\xa8", 3: b"\xc2\x85"}),
        (b"0 '<|endoftext|>' 13\n1 'a' 1\n", {1: b"a"}),
    ],
)
def test_odd_files_that_are_right_are_read_exactly(tmp_path, data, entries):
    (tmp_path / "v.txt").write_bytes(data)
    assert read_vocab(tmp_path / "v.txt") == entries
    trie, whole = TrieTokenizer(entries), b"".join(entries.values())
    assert trie.size == max(entries) + 1 and trie.decode_bytes(trie.encode(whole)) == whole


@pytest.mark.parametrize(
    "line, problem",
    [
        ("2 'b'", "not `id"),
        ("x 'b' 1", "not `id"),
        ("2 b 1", "no Python text"),
        ("2 __import__('os') 1", "no Python text"),
        ("2 7 1", "no Python text"),
        ("2 'b' 2", "has 1 bytes, the line says 2"),
        ("2 'é' 1", "has 2 bytes, the line says 1"),
        ("-2 'b' 1", "not `id"),
        ("2\t'b'\t1", "not `id"),
        ("2 b'é' 2", "no Python text"),
        ("2 'b'*3 3", "no Python text"),
        (r"2 '\x4' 1", "no Python text"),
        ("2 '' 0", "empty"),
        ("0 'b' 1", "id 0 ends a document"),
        ("1 'b' 1", "id 1 stands twice"),
        ("2 'a' 1", "the entry of id 1"),
        (r"2 '\ud800' 3", "surrogate"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, problem):
    (tmp_path / "v.txt").write_text(f"1 'a' 1\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=problem) as caught:
        read_vocab(tmp_path / "v.txt")
    assert f"{tmp_path}/v.txt:3: " in str(caught.value)


def test_files_without_entries_and_without_utf8_are_refused(tmp_path):
    (tmp_path / "v.txt").write_text("\n\n")
    with pytest.raises(DataError, match="no entries"):
        read_vocab(tmp_path / "v.txt")
    (tmp_path / "v.txt").write_bytes(b"1 'a' 1\n2 '\xff' 1\n")
    with pytest.raises(DataError, match="v.txt:2: not UTF-8"):
        read_vocab(tmp_path / "v.txt")


def test_the_world_vocabulary_agrees_with_the_reference(goldens, world):
    entries = read_vocab(world)
    trie = TrieTokenizer(entries)
    rows = json.loads((goldens / "rwkv/tokenizer.json").read_text())["rows"]
    for row in rows:
        data = bytes.fromhex(row["hex"])
        assert trie.encode(data) == row["ids"]
        assert trie.decode_bytes(row["ids"]) == data
        if row["text"] is not None:
            assert trie.encode(row["text"]) == row["ids"]
            assert trie.decode(row["ids"]) == row["decode"]


def test_the_world_vocabulary_is_written_as_it_was(tmp_path, world):
    entries = read_vocab(world)
    write_vocab(tmp_path / "v.txt", entries)
    assert len(entries) == 65529
    assert (tmp_path / "v.txt").read_bytes() == world.read_bytes()


def test_thirty_thousand_short_documents_take_seconds():
    trie = TrieTokenizer({number: bytes([number + 31]) for number in range(1, 96)})
    start = time.process_time()
    for number in range(30000):
        trie.encode(f"What is {number} plus {number}? It is {number + number}.")
    assert time.process_time() - start < 10
