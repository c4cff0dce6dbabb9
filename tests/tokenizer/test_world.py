"""RWKV World is known by its content, wherever it comes from, and gives the reference's ids."""

import json
import random

import pytest

from rwkvpipe.base.errors import DataError
from rwkvpipe.tokenizer import world
from rwkvpipe.tokenizer.load import load_tokenizer, save_tokenizer
from rwkvpipe.tokenizer.trie import read_vocab, write_vocab


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("world")


def test_the_package_s_file_is_the_vocabulary(tokenizer):
    assert (tokenizer.size, tokenizer.eos, len(tokenizer.entries)) == (65536, 0, 65529)
    assert world.digest(tokenizer.entries) == world.DIGEST


@pytest.mark.parametrize(
    "text, ids",
    [
        ("Hello world\n\n  x = 1\r\n", [33155, 40213, 19241, 121, 296, 284, 263]),
        ("今天是美好的一天。\n\nabc", [10381, 11639, 13091, 15597, 11685, 14734, 10250, 11639, 28329, 11, 6891]),
        ("<|endoftext|>", [61, 125, 25258, 7588, 2318, 125, 63]),
        ("\0", [1]),
        (bytes.fromhex("fffe00616263 80"), [256, 255, 1, 6891, 129]),
    ],
)
def test_ids_are_the_reference_s(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode_bytes(ids) == (text.encode() if isinstance(text, str) else text)


def test_all_golden_strings_have_their_ids(tokenizer, goldens):
    rows = json.loads((goldens / "rwkv/tokenizer.json").read_text())["rows"]
    for row in rows:
        data = bytes.fromhex(row["hex"])
        assert tokenizer.encode(data) == row["ids"] and tokenizer.decode_bytes(row["ids"]) == data
    assert len(rows) == 300


@pytest.mark.parametrize("number", [65530, 65535, 65536, -1])
def test_rows_without_an_entry_are_refused_by_number(tokenizer, number):
    assert not tokenizer.owns(number)
    with pytest.raises(DataError, match=f"id {number} stands for nothing"):
        tokenizer.decode([33155, number])


def test_a_file_is_recognised_with_either_line_end(tmp_path, tokenizer):
    write_vocab(tmp_path / "lf.txt", tokenizer.entries)
    (tmp_path / "crlf.txt").write_bytes((tmp_path / "lf.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert (tmp_path / "crlf.txt").stat().st_size == 1_159_262
    for name in ("lf.txt", "crlf.txt"):
        assert world.load_world(tmp_path / name).entries == tokenizer.entries
        assert load_tokenizer(tmp_path / name).size == 65536


def test_a_file_with_one_byte_changed_is_not_world(tmp_path, tokenizer):
    write_vocab(tmp_path / "v.txt", tokenizer.entries | {65529: b" " * 127 + b"x"})
    with pytest.raises(DataError, match="v.txt: not the RWKV World vocabulary: 65529 entries"):
        world.load_world(tmp_path / "v.txt")
    assert load_tokenizer(tmp_path / "v.txt").size == 65530


def test_it_is_saved_and_checked_when_loaded(tmp_path, tokenizer):
    save_tokenizer(tmp_path, tokenizer)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == {"kind": "world", "ids": 65536, "eos": 0}
    assert load_tokenizer(tmp_path).size == 65536
    (tmp_path / "vocab.txt").write_text("1 'a' 1\n")
    with pytest.raises(DataError, match="not the RWKV World vocabulary: 1 entries"):
        load_tokenizer(tmp_path)


def test_a_hub_s_folder_with_a_vocabulary_file_is_a_tokenizer(tmp_path):
    write_vocab(tmp_path / "rwkv_vocab_v20230424.txt", {1: b"a"})
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path).encode("aa") == [1, 1]


def test_without_the_package_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(world, "PACKAGE", "rwkv-that-nobody-has")
    with pytest.raises(DataError, match="install the package .*, or give the path"):
        load_tokenizer("world")


def test_the_package_s_code_is_not_run():
    import subprocess
    import sys

    program = "import sys; from rwkvpipe.tokenizer.load import load_tokenizer; load_tokenizer('world')\n"
    program += "assert not {name for name in sys.modules if name.split('.')[0] in ('rwkv', 'torch')}"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_comments_blank_lines_and_the_end_s_own_line_are_skipped(tmp_path):
    lines = ["# made by hand", "", "0 b'\\x00' 1", "1 'a' 1", "   ", "#2 'b' 1", '3 "#" 1', "4 '\\'\\\\' 2"]
    (tmp_path / "v.txt").write_bytes("\r\n".join(lines).encode())
    assert read_vocab(tmp_path / "v.txt") == {1: b"a", 3: b"#", 4: b"'\\"}


def test_any_bytes_come_back_by_ids_that_are_owned(tokenizer):
    lots = random.Random(4)
    words = list(tokenizer.entries.values())
    for _ in range(300):
        kinds = (lots.randbytes(lots.randrange(99)), b"".join(lots.choices(words, k=20)), b"<|endoftext|>\0\r\n \xff")
        data = b"".join(lots.sample(kinds, 3))
        ids = tokenizer.encode(data)
        assert tokenizer.decode_bytes([0, *ids, 0]) == data and all(map(tokenizer.owns, ids))
