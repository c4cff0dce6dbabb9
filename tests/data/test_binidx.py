"""The binidx pair agrees with RWKV-LM's byte for byte, and damage is named."""

import json
import resource
from types import SimpleNamespace

import numpy as np
import pytest

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.data import binidx, marks
from rwkvpipe.data.batches import token_batches
from rwkvpipe.data.binidx import HEAD, Binidx, BinidxWriter, token_dtype

DOCUMENTS = [[5, 6, 7], [], [1], [9, 65535]]


def write(prefix, documents=DOCUMENTS, dtype=np.uint16, masks=None):
    with BinidxWriter(prefix, dtype) as writer:
        for number, ids in enumerate(documents):
            writer.add(ids, masks[number] if masks else None)
    return prefix


def test_what_is_written_is_read(tmp_path):
    data = Binidx(write(tmp_path / "a"))
    assert len(data) == 6
    assert data.tokens(0, 6).tolist() == [5, 6, 7, 1, 9, 65535]
    assert data.tokens(2, 2).tolist() == [7, 1]
    assert data.documents.tolist() == [[0, 3], [3, 3], [3, 4], [4, 6]]
    assert data.dtype == np.uint16


def test_a_prefix_may_hold_dots_and_the_suffix_may_be_given(tmp_path):
    write(tmp_path / "a.v2")
    assert len(Binidx(tmp_path / "a.v2")) == len(Binidx(tmp_path / "a.v2.bin")) == 6


def test_masks_lie_beside_the_tokens(tmp_path):
    data = Binidx(write(tmp_path / "a", [[5, 6], [7]], masks=[[0, 1], [1]]))
    assert data.mask(0, 3).tolist() == [0, 1, 1]
    assert (tmp_path / "a.mask").read_bytes() == b"\0\1\1"
    with pytest.raises(DataError, match=r"b.mask: no such file"):
        Binidx(write(tmp_path / "b")).mask(0, 1)


def test_weights_lie_there_too_and_marks_of_0_and_1_are_a_byte_each_whatever_they_came_as(tmp_path, monkeypatch):
    for masks in ([[0, 1], [1]], [[0.0, 1.0], np.ones(1, np.float32)], [[False, True], [True]]):
        data = Binidx(write(tmp_path / "a", [[5, 6], [7]], masks=masks))
        assert (tmp_path / "a.mask").read_bytes() == b"\0\1\1" and data.weights(0, 3).tolist() == [0, 1, 1]
    stream = np.random.default_rng(0)
    masks = [stream.choice([0, 1, 1, 0.25, 3.5], size).repeat(4) for size in (3, 1, 40, 0, 9)]
    monkeypatch.setattr(marks, "BLOCK", 7)
    data = Binidx(write(tmp_path / "a", [np.arange(len(mask)) for mask in masks], masks=masks))
    assert data.mask(0, len(data)).dtype == np.float32 and not list(tmp_path.glob(".*"))
    assert data.weights(0, len(data)).tolist() == np.concatenate(masks).tolist()
    found = np.fromfile(tmp_path / "a.mask", "<f4")
    for wrong in (-1, np.nan, np.inf):
        found[5] = wrong
        found.tofile(tmp_path / "a.mask")
        assert Binidx(tmp_path / "a").weights(6, 3).any()
        with pytest.raises(DataError, match=r"a.mask: holds what is no number from 0 up near token 4"):
            Binidx(tmp_path / "a").weights(4, 3)


def test_an_empty_corpus_is_a_valid_pair(tmp_path):
    with BinidxWriter(tmp_path / "a", np.uint16, masked=True):
        pass
    data = Binidx(tmp_path / "a")
    assert len(data) == 0 and data.documents.shape == (0, 2) and data.mask(0, 0).size == 0


def test_a_document_may_come_in_pieces(tmp_path, monkeypatch):
    with BinidxWriter(tmp_path / "a", np.uint16) as writer:
        writer.extend([5, 6])
        writer.extend([])
        writer.extend([7])
        writer.end()
        for ids in DOCUMENTS[1:]:
            writer.add(ids)
    write(tmp_path / "b")
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    monkeypatch.setattr(binidx, "LONGEST", 3)
    with pytest.raises(DataError, match="a document of over 3 tokens, too many for the format; cut it"):
        write(tmp_path / "c", [[1, 2, 3], [1, 2, 3, 4]])


def test_a_failed_writer_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), BinidxWriter(tmp_path / "a", np.uint16) as writer:
        writer.add([1, 2], [1, 1])
        raise KeyError("something went wrong")
    assert not list(tmp_path.iterdir())


def test_an_id_that_does_not_fit_is_refused(tmp_path):
    for ids in ([65536], [-1]):
        with pytest.raises(DataError, match="does not fit uint16"):
            write(tmp_path / "a", [ids])
    with pytest.raises(DataError, match="dtype float32"):
        BinidxWriter(tmp_path / "a", np.float32)
    assert not list(tmp_path.iterdir())


def test_large_vocabularies_take_int32(tmp_path):
    assert token_dtype(65536) == np.uint16 and token_dtype(65537) == token_dtype(2**31) == np.int32
    with pytest.raises(DataError, match="2,147,483,649 ids: there is room for 2,147,483,648; number them anew"):
        token_dtype(2**31 + 1)
    data = Binidx(write(tmp_path / "a", [[70000]], token_dtype(70001)))
    assert data.tokens(0, 1).tolist() == [70000]
    assert (tmp_path / "a.idx").read_bytes()[17] == 4


def test_files_are_mapped_not_read(tmp_path):
    assert isinstance(Binidx(write(tmp_path / "a")).tokens(0, 3), np.memmap)


def _edit(path, place, value):
    raw = bytearray(path.read_bytes())
    raw[place : place + len(value)] = value
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "suffix, change, problem",
    [
        ("idx", lambda path: path.unlink(), "no such file"),
        ("bin", lambda path: path.unlink(), "no such file"),
        ("idx", lambda path: path.write_bytes(b""), "first bytes"),
        ("idx", lambda path: _edit(path, 0, b"X"), "first bytes are not MMIDIDX"),
        ("idx", lambda path: path.write_bytes(path.read_bytes()[:20]), "the head alone has 34"),
        ("idx", lambda path: _edit(path, 9, b"\2"), "version 2"),
        ("idx", lambda path: _edit(path, 17, b"\x09"), "dtype code 9 is unknown"),
        ("idx", lambda path: _edit(path, 17, b"\x07"), "item 2 of 0 tokens begins at byte 6; the one before"),
        ("idx", lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut short"),
        ("idx", lambda path: path.write_bytes(path.read_bytes() + b"\0"), "too long"),
        ("idx", lambda path: _edit(path, 25, b"\xff"), "cut short"),
        ("idx", lambda path: _edit(path, HEAD, b"\4"), "item 2 of 0 tokens begins at byte 6; the one before"),
        ("idx", lambda path: _edit(path, HEAD + 7, b"\xff"), "item 2 has -16777216 tokens"),
        ("idx", lambda path: _edit(path, HEAD + 16 + 30, b"\xff"), "byte 71776119061217288, outside the 12 bytes"),
        ("idx", lambda path: _edit(path, HEAD + 48, b"\1"), "the document index does not lead from 0 to its 4 items"),
        ("idx", lambda path: _edit(path, HEAD + 56, b"\4"), "the document index goes back: document 2 is items 4 to 2"),
        ("bin", lambda path: path.write_bytes(path.read_bytes()[:-2]), "has 10 bytes"),
        ("bin", lambda path: path.write_bytes(path.read_bytes() + b"\0"), "has 13 bytes"),
    ],
)
def test_damage_is_named(tmp_path, suffix, change, problem):
    write(tmp_path / "a")
    change(tmp_path / f"a.{suffix}")
    with pytest.raises(DataError, match=problem) as caught:
        Binidx(tmp_path / "a")
    assert str(caught.value).startswith(f"{tmp_path}/a.{suffix}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_an_index_is_checked_in_every_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(binidx, "BLOCK", block)
    assert len(Binidx(write(tmp_path / "a"))) == 6
    for item in range(len(DOCUMENTS)):
        _edit(write(tmp_path / "a").with_suffix(".idx"), HEAD + 4 * len(DOCUMENTS) + 8 * item, b"\1")
        with pytest.raises(DataError, match=f"item {item + 1} of"):
            Binidx(tmp_path / "a")


def test_a_mask_of_another_corpus_is_refused(tmp_path):
    write(tmp_path / "a", [[1, 2]], masks=[[1, 1]])
    (tmp_path / "a.mask").write_bytes(b"\1")
    with pytest.raises(DataError, match=r"a.mask: has 1 bytes"):
        Binidx(tmp_path / "a").mask(0, 1)


@pytest.mark.parametrize("name", ["u8", "u16", "i32", "i64"])
def test_reference_files_are_read(goldens, name):
    known = json.loads((goldens / "rwkv/binidx.json").read_text())[f"bin_{name}"]
    data = Binidx(goldens / f"rwkv/bin_{name}")
    documents = [[token for item in document for token in item] for document in known["documents"]]
    assert [data.tokens(start, end - start).tolist() for start, end in data.documents] == documents
    assert data.dtype == known["dtype"]
    for read in known.get("get_idx0", ()):
        assert data.tokens(read["offset"], read["length"]).tolist() == read["tokens"]


@pytest.mark.parametrize("name", ["u8", "u16", "i32", "i64"])
def test_files_are_written_as_the_reference_does(tmp_path, goldens, name):
    known = json.loads((goldens / "rwkv/binidx.json").read_text())[f"bin_{name}"]
    write(tmp_path / "a", known["items"], known["dtype"])
    theirs = (goldens / f"rwkv/bin_{name}.idx").read_bytes()
    ours = (tmp_path / "a.idx").read_bytes()
    end = HEAD + 12 * len(known["items"])
    # theirs has several items a document, so its document index is another
    assert ours[:26] == theirs[:26] and ours[HEAD:end] == theirs[HEAD:end]
    assert (tmp_path / "a.bin").read_bytes() == (goldens / f"rwkv/bin_{name}.bin").read_bytes()


def test_a_whole_corpus_is_written_as_the_reference_does(tmp_path, goldens):
    known = json.loads((goldens / "rwkv/make_data_tiny.json").read_text())
    reference = Binidx(goldens / "rwkv/make_data_tiny")
    documents = [reference.tokens(start, end - start) for start, end in reference.documents]
    assert len(documents) == known["n_items"] and len(reference) == known["n_tokens"]
    write(tmp_path / "a", documents)
    for suffix in ("bin", "idx"):
        theirs = (goldens / f"rwkv/make_data_tiny.{suffix}").read_bytes()
        assert (tmp_path / f"a.{suffix}").read_bytes() == theirs


def test_a_pair_of_a_hundred_gigabytes_is_opened_and_sampled_without_memory(tmp_path):
    items, size = 50, 1_000_000_000  # tokens: 100 GB of uint16, of which the disk holds a few pages
    with open(tmp_path / "a.bin", "wb") as file:
        file.truncate(2 * items * size)
        file.seek(2 * 49_999_999_999)
        file.write(np.array([7], "<u2").tobytes())
    binidx.write_index(tmp_path / "a.idx", np.dtype("<u2"), np.full(items, size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = Binidx(tmp_path / "a")
    assert len(data) == items * size and data.documents[-1].tolist() == [49 * size, 50 * size]
    assert data.tokens(items * size - 2, 2).tolist() == [0, 7]
    config = TrainConfig(steps=1, ctx_len=512, batch=4, order="magic")
    batch = next(token_batches(data, config, SimpleNamespace(index=0, count=1), 1000))
    assert batch.ids.shape == (4, 512)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize(("code", "dtype"), [(2, "<i1"), (3, "<i2"), (6, "<f4"), (6, "<f8"), (7, "<f8")])
def test_other_dtypes_of_the_format_are_read(tmp_path, code, dtype):
    ids = [5, 0, 7, 1, 9, 100]
    with BinidxWriter(tmp_path / "a", np.int8) as writer:
        writer.add(ids[:3])
        writer.add(ids[3:])
    width = np.dtype(dtype).itemsize
    (tmp_path / "a.bin").write_bytes(np.array(ids, dtype).tobytes())
    _edit(tmp_path / "a.idx", 17, bytes([code]))
    _edit(tmp_path / "a.idx", HEAD + 8, np.array([0, 3 * width], "<i8").tobytes())
    data = Binidx(tmp_path / "a", rows=101)
    assert data.tokens(0, 6).tolist() == ids and data.tokens(0, 6).dtype.kind == "i"
    assert data.documents.tolist() == [[0, 3], [3, 6]]
    if "f" in dtype:
        (tmp_path / "a.bin").write_bytes(np.array([1, 2, 3.5, 4, np.nan, 6], dtype).tobytes())
        with pytest.raises(DataError, match="a.bin: holds a number that is not whole near token 2"):
            Binidx(tmp_path / "a").tokens(2, 2)


def test_the_reference_builder_s_bytes_come_out_of_its_rows_in_its_order(tmp_path, goldens, shared_data):
    from rwkvpipe import pack
    from rwkvpipe.tokenizer.load import load_tokenizer, save_tokenizer
    from rwkvpipe.tokenizer.trie import TrieTokenizer, read_vocab

    save_tokenizer(tmp_path / "world", TrieTokenizer(read_vocab(shared_data / "rwkv_vocab_v20230424.txt")))
    tokenizer, reference = load_tokenizer(tmp_path / "world"), Binidx(goldens / "rwkv/make_data_tiny")
    lines = (goldens / "rwkv/make_data_tiny.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    order = [tokenizer.decode(reference.tokens(start, end - start)) for start, end in reference.documents.tolist()]
    assert set(order) == {row["text"] for row in rows}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
    spec = json.dumps({"path": "x", "tokenizer": "world"})
    pack.main([str(tmp_path / "a.jsonl"), "--spec", spec, "--tokenizer", str(tmp_path / "world"), "--out",
               str(tmp_path / "out")])  # fmt: skip
    for suffix in ("bin", "idx"):
        theirs = (goldens / f"rwkv/make_data_tiny.{suffix}").read_bytes()
        assert (tmp_path / f"out/train.{suffix}").read_bytes() == theirs
