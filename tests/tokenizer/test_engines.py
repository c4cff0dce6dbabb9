"""Every engine gives the reference search's ids, on any bytes, and in time that grows as the text does."""

import random
import time

import numpy as np
import pytest

from rwkvpipe.base import compiler
from rwkvpipe.base.errors import DataError
from rwkvpipe.tokenizer import memo, native
from rwkvpipe.tokenizer.memo import Memo
from rwkvpipe.tokenizer.trie import TrieTokenizer
from rwkvpipe.tokenizer.world import WorldTokenizer, load_world

ENGINES = ["numpy", "native"]


@pytest.fixture(scope="module")
def plain():
    return WorldTokenizer(load_world().entries, "plain")


@pytest.fixture(scope="module", params=ENGINES)
def fast(request, plain):
    if request.param == "native" and compiler.command() is None:
        pytest.skip("there is no C++ compiler here")
    return made(WorldTokenizer, plain.entries, request.param)


def made(kind, entries, engine):
    if engine == "native":
        return kind(entries, "native")
    found = kind(entries, "plain")
    found.__dict__["_engine"] = Memo(found.ids, found._part)
    return found


def same(fast, plain, data):
    ids = plain.encode(data)
    assert fast.encode_array(data).tolist() == ids == fast.encode(data)


def texts(entries):
    """Concatenated entries, storms of white space, CJK, random bytes, runs of one character."""
    lots = random.Random(11)
    words = list(entries.values())
    for _ in range(60):
        yield b"".join(lots.choices(words, k=lots.randrange(60)))
    for _ in range(60):
        yield "".join(lots.choices(" \n\r\t\u3000。，a1", k=lots.randrange(900))).encode()
    for _ in range(60):
        yield lots.randbytes(lots.randrange(900))
    for letter in ("a", " ", "\n", "0", "é", "天", "\0", "😀"):
        for count in (1, 2, 15, 16, 17, 127, 128, 129, 1000):
            yield (letter * count).encode()


def test_ids_are_those_of_the_plain_search(fast, plain):
    for data in texts(plain.entries):
        same(fast, plain, data)


def test_every_character_of_unicode_has_the_same_ids(fast, plain):
    characters = [*range(0xD800), *range(0xE000, 0x30000), *range(0xE0000, 0xE0100), 0x10FFFF]
    random.Random(1).shuffle(characters)
    for start in range(0, len(characters), 5000):
        same(fast, plain, "".join(map(chr, characters[start : start + 5000])))


def test_a_text_that_comes_in_blocks_has_the_ids_of_the_whole(fast, plain, monkeypatch):
    monkeypatch.setattr("rwkvpipe.tokenizer.trie.PIECE", 37)
    monkeypatch.setattr(memo, "BLOCK", 64)
    lots = random.Random(5)
    for data in ("A text of some length, 今天天气很好。\n\n" * 40).encode(), *texts(plain.entries):
        places = [0, *sorted(lots.choices(range(len(data) + 1), k=lots.randrange(5))), len(data)]
        pieces = list(fast.stream(data[start:end] for start, end in zip(places, places[1:], strict=False)))
        assert np.concatenate([np.zeros(0, int), *pieces]).tolist() == plain.encode(data)


def test_many_texts_have_the_ids_of_each_and_an_end(fast, plain):
    found = [data for data in texts(plain.entries) if data]
    ends = np.cumsum([len(data) for data in found])
    ids, sizes = fast.encode_all(np.frombuffer(b"".join(found), np.uint8), ends - [len(data) for data in found], ends)
    wanted = [[*plain.encode(data), 0] for data in found]
    assert sizes.tolist() == [len(each) for each in wanted] and ids.tolist() == sum(wanted, [])


def test_time_grows_as_an_unbroken_text_does(fast):
    lots = random.Random(2)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    for kind in ("".join(lots.choices(letters, k=400_000)), "天" * 130_000, " " * 400_000):
        seconds = []
        for part in (kind[: len(kind) // 4], kind):
            fast.encode_array(part)
            began = time.process_time()
            fast.encode_array(part)
            seconds.append(time.process_time() - began)
        assert seconds[1] < 20 * max(seconds[0], 0.002)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("text, named", [("abz", "'z'"), ("ab\na€", "line 2, char"), (b"a" * 500 + b"\xff", "0xff")])
def test_what_no_entry_fits_is_named_as_by_the_plain_search(engine, text, named):
    entries = {1: b"a", 2: b"ab", 3: b"\n", 70000: b"abcde"}
    fast = made(TrieTokenizer, entries, engine)
    for encode in (fast.encode, fast.encode_array, TrieTokenizer(entries, "plain").encode):
        with pytest.raises(DataError, match="the vocabulary has no") as caught:
            encode(text)
        assert named in str(caught.value)
    assert fast.encode("abcdeab" * 90) == [70000, 2] * 90


@pytest.mark.parametrize("engine", ENGINES)
def test_any_vocabulary_has_the_same_ids(engine):
    lots = random.Random(5)
    for size in (1, 2, 30, 600):
        words = {bytes(lots.choices(b"ab\0\xff", k=lots.randrange(1, 9))) for _ in range(size)}
        words |= {bytes([byte]) for byte in b"ab\0\xff"}
        entries = dict(enumerate(sorted(words, key=lambda _: lots.random()), 1))
        fast, plain = made(TrieTokenizer, entries, engine), TrieTokenizer(entries, "plain")
        for _ in range(40):
            same(fast, plain, bytes(lots.choices(b"ab\0\xff", k=lots.randrange(700))))


def test_what_is_not_remembered_has_the_same_ids(monkeypatch, plain):
    monkeypatch.setattr(memo, "PIECES", 5)
    monkeypatch.setattr(memo, "ROOM", 8)
    fast = made(WorldTokenizer, plain.entries, "numpy")
    for data in list(texts(plain.entries))[::7]:
        same(fast, plain, data)


def test_without_a_compiler_numpy_takes_over_and_says_why(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("RWKVPIPE_KERNELS", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native._loaded.cache_clear()
    try:
        assert TrieTokenizer({1: b"a"}).engine == "numpy"
        assert "no C++ compiler" in caplog.text
        with pytest.raises(DataError, match="no native one here"):
            TrieTokenizer({1: b"a"}, "native").encode("a" * 900)
    finally:
        native._loaded.cache_clear()


def test_lists_hold_their_numbers_and_leave_none_behind(plain):
    if compiler.command() is None:
        pytest.skip("there is no C++ compiler here")
    import sys

    fast = WorldTokenizer(plain.entries, "native")
    ids = fast.encode("Hello world" * 9)
    number = fast._engine._numbers[ids[0]]
    before = sys.getrefcount(number)
    lists = [fast.encode("Hello world" * 9) for _ in range(50)]
    assert sys.getrefcount(number) == before + 450
    del lists
    assert sys.getrefcount(number) == before
