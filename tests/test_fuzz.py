"""Damaged files, thousands of them: a reader takes one, or refuses it in one line that names it, and writes nothing."""

import gzip
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from rwkvpipe.base import agree
from rwkvpipe.base.config import CorpusConfig, RwkvConfig, read_settings
from rwkvpipe.base.errors import PipeError, explain
from rwkvpipe.base.files import read_jsonl
from rwkvpipe.data import corpus
from rwkvpipe.data.binidx import Binidx, BinidxWriter
from rwkvpipe.model.family import build
from rwkvpipe.plan import Plan
from rwkvpipe.show.metrics import read_metrics
from rwkvpipe.tokenizer.load import load_tokenizer
from rwkvpipe.tokenizer.trie import read_vocab
from rwkvpipe.weights import store

CONFIG = """\
run: demo
tokenizers: {plain: {kind: bytes}, words: {kind: trie, corpora: [sums]}}
corpora:
  sums: {path: docs.txt, tokenizer: plain, valid: 0.1}
  tasks: {synthetic: counting.questions, count: 9, format: question}
benchmarks: {exact: {task: answer, path: exam.jsonl}}
stages:
  - {name: base, kind: pretrain, data: sums, model: {n_layer: 2}, train: {steps: 10, lr: 1e-3}, bench: [exact]}
  - {name: reason, kind: grpo, data: tasks, start: base, lora: {rank: 4}, rollout: {samples: 4}, train: {steps: 10}}
"""
ODD = [
    None,
    True,
    0,
    -1,
    1,
    10**30,
    1e308,
    float("nan"),
    "",
    "\ud800",
    "a\nb",
    "../x",
    [],
    {},
    [[]],
    {"a": 1},
    "x" * 999,
]
TOKENS = [
    b"\n",
    b"\x00",
    b"\xef\xbb\xbf",
    b"{",
    b"[" * 5000,
    b'"',
    b"NaN",
    b"-",
    b"9" * 5000,
    b"\xff" * 8,
    b"!!python/x ",
]


def documents(path: Path, **spec) -> list:
    return list(corpus.documents(path, CorpusConfig(path=str(path), tokenizer="t", **spec)))


def binidx(path: Path) -> None:
    data = Binidx(path.with_suffix(""), 300)
    assert len(data.documents) >= 0
    data.tokens(0, len(data))


def checkpoint(path: Path) -> None:
    store.describe(path)
    store.read(path)


# file name: what reads it
READERS: dict[str, Callable[[Path], object]] = {
    "config.yaml": lambda path: Plan(agree.load([path])).steps,
    "settings.json": read_settings,
    "texts.jsonl": documents,
    "talks.jsonl": lambda path: documents(path, format="chat"),
    "asked.jsonl": lambda path: list(corpus.questions(path, CorpusConfig(path="x", format="question"))),
    "rows.npy": lambda path: documents(path, format="array"),
    "rows.npz": lambda path: documents(path, format="array"),
    "list.json": documents,
    "nested.json": lambda path: documents(path, field="a[*].b[*].c"),
    "texts.jsonl.gz": documents,
    "texts.jsonl.zst": documents,
    "texts.parquet": documents,
    "texts.arrow": documents,
    "stream.arrow": documents,
    "plain.txt": documents,
    "any.jsonl": lambda path: list(read_jsonl(path)),
    "metrics.jsonl": read_metrics,
    "vocab.txt": read_vocab,
    "tokenizer.json": load_tokenizer,
    "pair.idx": binidx,
    "pair.bin": binidx,
    "model.safetensors": checkpoint,
    "model.pth": checkpoint,
}


def tables(home: Path) -> None:
    """Tables that are no text."""
    found = pa.Table.from_pylist([{"text": f"one {n}", "n": n} for n in range(9)])
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in found.to_pylist())
    (home / "texts.jsonl.gz").write_bytes(gzip.compress(lines))
    (home / "texts.jsonl.zst").write_bytes(pa.compress(lines, codec="zstd", asbytes=True))
    pq.write_table(found, home / "texts.parquet", row_group_size=4)
    for name, new in (("texts.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with new(str(home / name), found.schema) as sink:
            sink.write_table(found, max_chunksize=4)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """A good file for each reader."""
    home = tmp_path_factory.mktemp("whole")
    model = build(RwkvConfig(n_layer=2, n_embd=16, head_size=8, vocab_size=12))
    store.write_tensors(home / "model.safetensors", model.state_dict(), {"format": "pt"})
    torch.save(model.state_dict(), home / "model.pth")
    with BinidxWriter(home / "pair", np.uint16) as writer:
        writer.add([1, 2, 3])
        writer.add([4, 5])
    rows = io.BytesIO()
    np.save(rows, np.array([[1, 2], [3, 4]]))
    (home / "rows.npy").write_bytes(rows.getvalue())
    np.savez(home / "rows.npz", values=np.arange(5), lengths=[2, 3])
    tables(home)
    names = ("tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds")
    texts = {
        "config.yaml": CONFIG,
        "settings.json": json.dumps({"kind": "sft", "seed": 1, "lora": {"rank": 2}, "train": {"steps": 3, "lr": 0.1}}),
        "texts.jsonl": '{"text": "one"}\n{"text": "two ä"}\n',
        "list.json": '[{"text": "one"},\n{"text": "two ä"}]',
        "nested.json": '{\n"a": [{"b": [{"c": "x"}, {"c": "y"}]}]\n}',
        "talks.jsonl": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n',
        "asked.jsonl": '{"question": "a", "answer": "1"}\n{"question": "b", "options": ["c", "d"], "label": 1}\n',
        "plain.txt": "one\r\ntwo\n",
        "any.jsonl": '{"a": [1, 2.5, null, "x"]}\n',
        "metrics.jsonl": "".join(json.dumps({"step": n} | dict.fromkeys(names, n)) + "\n" for n in (1, 2)),
        "vocab.txt": "1 'a' 1\n2 'b c' 3\n3 b'\\xff' 1\n4 'ä' 2\n",
        "tokenizer.json": '{"kind": "integer", "size": 9}',
    }
    for name, text in texts.items():
        (home / name).write_text(text)
    return {path.name: path.read_bytes() for path in home.iterdir()}


def places(value, path: tuple = ()) -> Iterator[tuple]:
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        yield from places(part, (*path, key))


def another(value, lots: random.Random):
    """A plain value with one part taken away, doubled, wrapped or replaced."""
    path = lots.choice(list(places(value)))
    if not path:
        return lots.choice([value, [value], lots.choice(ODD)])
    home = value
    for key in path[:-1]:
        home = home[key]
    key, kind = path[-1], lots.randrange(6)
    if kind == 0:
        del home[key]
    elif kind == 1 and isinstance(home, list):
        home.append(home[key])
    elif kind == 1:
        home[lots.choice(["zz", "", "text", "seed", "\ud800"])] = home.pop(key)
    else:
        home[key] = [home[key]] if kind == 2 else lots.choice(ODD)
    return value


def damaged(data: bytes, lots: random.Random) -> bytes:
    """Bytes with one to three faults: cut, flipped, put in, taken out, doubled."""
    for _ in range(lots.choice([1, 1, 2, 3])):
        start, end = sorted(lots.choices(range(min(len(data), lots.choice([40, 400, len(data)])) + 1), k=2))
        kind = lots.randrange(6)
        if kind == 0:
            data = data[:start]
        elif kind == 1:
            data = data[:start] + data[end:]
        elif kind == 2:
            data = data[:start] + lots.choice(TOKENS) + data[start:]
        elif kind == 3:
            data = data[:start] + lots.randbytes(min(end - start, 9)) + data[start + min(end - start, 9) :]
        elif kind == 4:
            data = (
                data[:start] + lots.choice([bytes(8), b"\xff" * 8, (2**40).to_bytes(8, "little")]) + data[start + 8 :]
            )
        else:
            data = data + data[start:end]
    return data


def mutated(name: str, data: bytes, lots: random.Random) -> bytes:
    """A damaged file: half of those with a structure are damaged in it, so that they can still be read."""
    kind = Path(name).suffix
    if lots.random() < 0.5 or kind not in (".json", ".jsonl", ".yaml", ".safetensors"):
        return damaged(data, lots)
    if kind == ".yaml":
        return yaml.safe_dump(another(yaml.safe_load(data), lots)).encode("utf-8", "replace")
    if kind == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        head = json.dumps(another(json.loads(data[8 : 8 + size]), lots)).encode()
        return len(head).to_bytes(8, "little") + head + data[8 + size :]
    if kind == ".json":
        return json.dumps(another(json.loads(data), lots), indent=lots.choice([None, 1])).encode()
    lines = data.decode().splitlines()
    row = lots.randrange(len(lines))
    lines[row] = json.dumps(another(json.loads(lines[row]), lots))
    return ("\n".join(lines) + "\n").encode()


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(name, whole, tmp_path):
    for other, data in whole.items():
        (tmp_path / other).write_bytes(data)
    READERS[name](tmp_path / name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_in_one_line(name, seed, whole, tmp_path, monkeypatch):
    lots = random.Random(f"{name} {seed}")
    monkeypatch.chdir(tmp_path)
    for other, data in whole.items():
        if other.split(".")[0] == name.split(".")[0]:
            Path(other).write_bytes(data)
    refused = 0
    for _ in range(120):
        Path(name).write_bytes(mutated(name, whole[name], lots))
        try:
            READERS[name](Path(name))
        except PipeError as error:
            line = explain(error)
            assert line.isprintable() and len(line) <= 600
            assert Path(name).stem in line or name == "config.yaml", line  # or the key alone
            refused += 1
    assert refused, "every damage went unnoticed"
    assert {path.name for path in tmp_path.iterdir()} <= whole.keys()
