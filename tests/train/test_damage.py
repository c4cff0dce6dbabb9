"""What a run keeps for itself, damaged at random: it is read, or refused in one line, and nothing else comes out."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rwkvpipe.base.config import LoraConfig, RwkvConfig
from rwkvpipe.base.errors import PipeError
from rwkvpipe.model.family import build
from rwkvpipe.train import checkpoint
from rwkvpipe.train.record import Log
from rwkvpipe.train.stage import write_adapter
from rwkvpipe.weights import store
from rwkvpipe.weights.lora import inject, read_adapter

ROUNDS = 60
WORDS = (b"null", b"-1", b"1e999", b"[", b"{", b'"', b"\n", b"\x00", b"\xff\xfe", b"9" * 20, b": ", b"NaN")


def damaged(raw: bytes, lots: random.Random) -> bytes:
    """The same bytes with one to three of: bits flipped, a piece cut out, doubled or replaced, the end cut off."""
    data = bytearray(raw)
    for _ in range(lots.randint(1, 3)):
        # most of what a reader decides stands at the beginning
        place = min(int(len(data) * lots.random() ** lots.choice((1, 4))), max(len(data) - 1, 0))
        kind = lots.randrange(6)
        if kind == 0 and data:
            data[place] ^= 1 << lots.randrange(8)
        elif kind == 1:
            del data[place : place + lots.randint(1, 40)]
        elif kind == 2:
            data[place:place] = data[place : place + lots.randint(1, 40)]
        elif kind == 3:
            data[place:place] = lots.choice(WORDS)
        elif kind == 4:
            data[place : place + lots.randint(1, 8)] = lots.randbytes(lots.randint(1, 8))
        else:
            del data[place:]
    return bytes(data)


def model_file(folder: Path) -> Path:
    model = build(RwkvConfig(n_layer=2, n_embd=8, head_size=8, vocab_size=9))
    model.initialise(0)
    store.write(folder / "model.safetensors", model.config, model.state_dict())
    return folder / "model.safetensors"


def adapter_file(folder: Path) -> Path:
    model = build(RwkvConfig(n_layer=2, n_embd=8, head_size=8, vocab_size=9))
    inject(model, LoraConfig(rank=1))
    write_adapter(folder / "adapter.safetensors", model, LoraConfig(rank=1), base="x")
    return folder / "adapter.safetensors"


def point(folder: Path, suffix: str) -> Path:
    part = checkpoint.write_part(folder, 3, {"a": torch.zeros(4)})
    checkpoint.save(folder, 3, [part], "m", notes={"step": 3})
    return folder / f"step-000000003.{suffix}"


def lines(folder: Path) -> Path:
    text = "".join(json.dumps({"step": n, "text": "\u00e9\u4e2d" * n, "loss": n / 7}) + "\n" for n in range(1, 12))
    (folder / "log.jsonl").write_text(text)
    return folder / "log.jsonl"


READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "metrics": (lines, lambda path: Log(path).rows()),
    "model": (model_file, store.read),
    "adapter": (adapter_file, read_adapter),
    "point": (lambda folder: point(folder, "safetensors"), lambda path: checkpoint.latest(path.parent, "m")),
    "card": (lambda folder: point(folder, "json"), lambda path: checkpoint.latest(path.parent, "m")),
}


def variants(raw: bytes, name: str) -> Iterator[bytes]:
    lots = random.Random(name)
    yield b""
    for _ in range(ROUNDS):
        yield damaged(raw, lots)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_damage_is_refused_in_one_line_or_harmless(tmp_path, name):
    make, read = READERS[name]
    path = make(tmp_path)
    raw = path.read_bytes()
    read(path)
    for data in variants(raw, name):
        path = make(tmp_path) if name in ("point", "card") else path
        path.write_bytes(data)
        try:
            read(path)
        except PipeError as error:
            assert str(error), data
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} for {data[:300]!r}") from error
