"""Rows by the thousand are the rows one by one: the same tokens, digests, parts and errors."""

import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rwkvpipe.base.config import CorpusConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.data import corpus, lines, parcel, scan
from rwkvpipe.data.document import Document
from rwkvpipe.data.parcel import Packer
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer

pytestmark = pytest.mark.skipif(not scan.available(), reason="there is no C++ compiler here")
TOKENIZER = TrieTokenizer({n + 1: bytes([n]) for n in range(255)} | {256: b"ab", 257: b"\n\n", 258: "天地".encode()})
WORDS = ["a", "b", "ab", "\n\n", "天地", "天", "é", "😀", '"', "\\", "\t", "\0", " "]


def packed(path, room=None, *, together=True, tokenizer=TOKENIZER, **spec):
    """Everything that a file comes to, by blocks or row by row."""
    spec = CorpusConfig(path="x", tokenizer="t", **{"on_error": "skip", "valid": 0.3, **spec})
    packer = Packer(spec, tokenizer, room)
    if not together:
        packer.encode_all = None
    said = []
    for unit in packer.reader.units(path):
        found = packer.parcel(unit, None)
        for name, part in found.parts.items():
            tokens = part.tokens if isinstance(part.tokens, np.ndarray) else np.fromfile(part.tokens, packer.dtype)
            said.append(
                (name, tokens.tolist(), part.sizes.tolist(), part.digests.tolist(), part.widths.tolist(), part.longest)
            )
        said.append((found.errors, found.counts))
    return said


def rows(lots):
    """Rows of which some are odd."""
    for _ in range(lots.randrange(40)):
        text = "".join(lots.choices(WORDS, k=lots.randrange(12)))
        yield lots.choice(
            [{"text": text}] * 6 + [{"text": None}, {"n": 1, "text": text}, {}, {"text": [1]}, {"text": "\ud800"}]
        )


def lined(lots):
    found = []
    for row in rows(lots):
        line = json.dumps(row, ensure_ascii=lots.random() < 0.5).encode("utf-8", "surrogatepass")
        if lots.random() < 0.1:
            place = lots.randrange(len(line))
            line = (
                line[:place]
                + lots.choice([b"\xff", b"", b'"', b"\n", b"\xff" * 30])
                + line[place + lots.randrange(3) :]
            )
        found.append(line)
    return lots.choice([b"", b"\xef\xbb\xbf"]) + b"\n".join(found) + lots.choice([b"", b"\n", b"\r\n\n"])


def test_lines_together_are_what_they_are_one_by_one(tmp_path, monkeypatch):
    lots = random.Random(1)
    for number in range(150):
        data = lined(lots)
        path = tmp_path / f"{number}.jsonl{lots.choice(['', '.gz'])}"
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        monkeypatch.setattr(lines, "BLOCK", lots.choice([7, 100, 1 << 20]))
        monkeypatch.setattr(parcel, "LONG", lots.choice([5, 1 << 20]))
        assert packed(path) == packed(path, together=False)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.string_view()])
def test_columns_together_are_what_they_are_one_by_one(tmp_path, kind):
    lots = random.Random(2)
    texts = [None if lots.random() < 0.1 else "".join(lots.choices(WORDS, k=lots.randrange(9))) for _ in range(300)]
    values = [None if t is None else t.encode() for t in texts] if kind == pa.binary() else texts
    found = pa.table({"n": list(range(300)), "text": pa.array(values, kind)})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), found.schema) as sink:
        sink.write_table(found.slice(3), max_chunksize=70)
    paths = [tmp_path / "a.arrow"]
    if kind != pa.string_view():
        pq.write_table(found, tmp_path / "a.parquet", row_group_size=64)
        paths.append(tmp_path / "a.parquet")
    for path in paths:
        assert packed(path) == packed(path, together=False)


def test_a_column_whose_texts_are_no_utf8_has_its_rows_named(tmp_path):
    values = pa.array([b"ok", b"\xff", b"end"], pa.binary())
    texts = pa.StringArray.from_buffers(3, *values.buffers()[1:])
    with pa.ipc.new_file(str(tmp_path / "a"), pa.schema([("text", pa.string())])) as sink:
        sink.write_batch(pa.record_batch([texts], names=["text"]))
    together, single = packed(tmp_path / "a", valid=0.0), packed(tmp_path / "a", together=False, valid=0.0)
    assert together == single and together[0][2] == [3, 4]
    assert together[-1][0][0].startswith(f"{tmp_path}/a: row 2: not UTF-8")


def test_what_a_vocabulary_lacks_is_told_of_its_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab"}\n{"text": "abc"}\n{"text": "b"}\n')
    small = TrieTokenizer({1: b"a", 2: b"b"})
    together, single = (packed(path, together=t, tokenizer=small, valid=0.0) for t in (True, False))
    assert together == single and together[0][1] == [1, 2, 0, 2, 0]
    assert together[-1][0][0].startswith(f"{path}:2: the vocabulary has no 'c' (U+0063), character 3 of 'abc'")


@pytest.mark.parametrize("tokenizer", [TOKENIZER, ByteTokenizer(0)], ids=["trie", "bytes"])
def test_a_long_text_is_never_held_and_comes_to_the_same(tmp_path, monkeypatch, tokenizer):
    lots = random.Random(3)
    text = "".join(lots.choices(WORDS, k=5000))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text + "b"}))
    (tmp_path / "room").mkdir()
    whole = {path: packed(path, tokenizer=tokenizer) for path in tmp_path.glob("a.*")}
    for name, module in (("BLOCK", corpus), ("LONG", corpus), ("BLOCK", parcel), ("LONG", parcel), ("SPILL", parcel)):
        monkeypatch.setattr(module, name, 97)
    monkeypatch.setattr("rwkvpipe.tokenizer.trie.PIECE", 31)
    for path, said in whole.items():
        assert packed(path, tmp_path / "room", tokenizer=tokenizer) == said
    assert list((tmp_path / "room").iterdir())


def test_a_long_text_and_its_blocks_have_the_same_digest_and_part():
    lots = random.Random(4)
    for _ in range(50):
        text = "".join(lots.choices(WORDS, k=lots.randrange(200)))
        cuts = [0, *sorted(lots.choices(range(len(text) + 1), k=3)), len(text)]
        pieces = [text[a:b].encode() for a, b in zip(cuts, cuts[1:], strict=False)]
        long, short = Document(blocks=lambda pieces=pieces: iter(pieces)), Document(text=text)
        assert (long.digest(), long.fraction, long.width) == (short.digest(), short.fraction, short.width)


def test_a_long_text_that_is_no_utf8_is_named_by_line(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"one\n" * 50 + "tw天".encode()[:-1])
    for size in (3, 7, 1 << 20):
        monkeypatch.setattr(corpus, "BLOCK", size)
        monkeypatch.setattr(corpus, "LONG", size)
        assert packed(tmp_path / "a.txt")[-1][0] == [
            f"{tmp_path}/a.txt:51: not UTF-8 at byte 202 of the file; save it as UTF-8"
        ]


def test_a_line_that_is_too_long_is_named_and_passed_over(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * size}) + "\n" for size in (3, 500, 4)))
    monkeypatch.setattr(lines, "LINE", 100)
    monkeypatch.setattr(lines, "READ", 30)
    for size in (8, 1 << 20):
        monkeypatch.setattr(lines, "BLOCK", size)
        for together in (True, False):
            said = packed(path, together=together, valid=0.0) if size == 8 else None
            if said:
                assert said[0][2] == [4, 5]
                assert said[-1][0] == [f"{path}:2: a line of over 0 MB; cut the document, or make a text file of it"]
    with pytest.raises(DataError, match="a.jsonl:2: a line of over"):
        monkeypatch.setattr(lines, "BLOCK", 8)
        packed(path, on_error="stop")
