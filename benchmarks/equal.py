"""What must be the same, by how much it differs; and what long rows hold in memory: the tables of docs/training.md.

python -m benchmarks.equal

Each length has a process of its own; memory is the most that held beyond what it held before the first step.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.page import rows
from benchmarks.spare import _memory
from rwkvpipe.base.config import RwkvConfig, TrainConfig
from rwkvpipe.data.batches import Batch
from rwkvpipe.model.family import build
from rwkvpipe.train.infctx import chunked_lm_losses
from rwkvpipe.train.loss import lm_losses

DOCS = Path(__file__).resolve().parents[1] / "docs"
FAMILIES = ("rwkv5", "rwkv6", "rwkv7")
SIZES = {"n_layer": 4, "n_embd": 128, "vocab_size": 2048}
LENGTHS, CHUNK = (8192, 16384, 32768), 512
DOCUMENTS = ((90, 30, 8), (128,), (1, 60, 17))  # lengths, row by row


def _model(family: str) -> nn.Module:
    model = build(RwkvConfig(family=family, n_layer=3, n_embd=128, vocab_size=512))
    model.initialise(1)
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.05 * torch.randn(value.shape, generator=stream)
    return model


def _batch(parts: list[list[Tensor]], packed: bool, weighed: bool = False) -> Batch:
    width = max(sum(len(ids) - 1 for ids in row) for row in parts)
    ids, targets = torch.zeros(len(parts), width, dtype=torch.long), torch.full((len(parts), width), -1)
    starts, mask = torch.zeros(len(parts), width, dtype=torch.bool), torch.zeros(len(parts), width)
    for number, row in enumerate(parts):
        first = 0
        for tokens in row:
            last = first + len(tokens) - 1
            ids[number, first:last], targets[number, first:last] = tokens[:-1], tokens[1:]
            mask[number, first:last] = (tokens[1:] % 5) / 2  # weights that a document has wherever it stands
            starts[number, first], first = True, last
    return Batch(ids, targets, mask if weighed else None, starts if packed else None)


def _gradients(model: nn.Module, losses, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for part in losses(model, batch):
        part.backward()
        total += part.item()
    return total, {name: value.grad for name, value in model.named_parameters()}


def equalities() -> list[dict]:
    """How far loss and gradients of one step are apart, made in two ways, in fp32."""
    found, stream = [], torch.Generator().manual_seed(0)
    texts = [[torch.randint(1, 512, (n + 1,), generator=stream) for n in row] for row in DOCUMENTS]
    apart = [[text] for row in texts for text in row]
    alone, packed = _batch(apart, False), _batch(texts, True)
    weighed, together = _batch(apart, False, True), _batch(texts, True, True)
    plain, chunked = TrainConfig(steps=1), TrainConfig(steps=1, chunk=32, bptt="full")
    ways = {
        "packed rows, documents alone": (lm_losses(9, plain), packed, lm_losses(9, plain), alone),
        "a row at a time, all at once": (lm_losses(1, plain), alone, lm_losses(99, plain), alone),
        "chunks of 32 tokens, full gradient; whole rows": (
            chunked_lm_losses(9, chunked), alone, lm_losses(9, plain), alone),
        "packed, in chunks; documents alone": (chunked_lm_losses(9, chunked), packed, lm_losses(9, plain), alone),
        "packed tokens of different weights, in chunks; documents alone": (
            chunked_lm_losses(2, chunked), together, lm_losses(9, plain), weighed),
    }  # fmt: skip
    for family in FAMILIES:
        model = _model(family)
        for name, (one, first, other, second) in ways.items():
            loss, grads = _gradients(model, one, first)
            wanted, like = _gradients(model, other, second)
            off = max(float((g - like[n]).abs().max() / like[n].abs().max().clamp(min=1e-9)) for n, g in grads.items())
            found.append({"family": family, "ways": name, "loss": abs(loss - wanted), "gradient": off})
    return found


def one(length: int, chunk: int | None, bptt: str, family: str = "rwkv7") -> dict:
    """Megabytes that a step on one row of so many tokens holds, in this process."""
    torch.set_num_threads(2)
    model = build(RwkvConfig(family=family, **SIZES))
    model.initialise(0)
    config = TrainConfig(steps=1, ctx_len=length, chunk=chunk, bptt=bptt if chunk else None)
    losses = (lm_losses if chunk is None else chunked_lm_losses)(1, config)
    stream = torch.Generator().manual_seed(0)

    def step(size: int) -> None:
        ids = torch.randint(SIZES["vocab_size"], (1, size + 1), generator=stream)
        for part in losses(model, Batch(ids[:, :-1], ids[:, 1:])):
            part.backward()

    step(64)
    before = _memory("VmRSS")
    step(length)
    made = {"family": family, "length": length, "chunk": chunk, "bptt": bptt}
    return made | {"megabytes": _memory("VmHWM") - before}


def lengths() -> list[dict]:
    """Rows of several lengths, in chunks and whole."""
    found, ends = [], (LENGTHS[0], LENGTHS[-1])
    ways = [("rwkv7", CHUNK, "truncated", LENGTHS), ("rwkv7", CHUNK, "full", LENGTHS), ("rwkv7", None, "", ends[:1])]
    for family in FAMILIES[:-1]:
        ways += [(family, CHUNK, "truncated", ends), (family, CHUNK, "full", ends), (family, None, "", ends[:1])]
    for family, chunk, bptt, some in ways:
        for length in some:
            asked = f"{length}, {chunk}, {bptt!r}, {family!r}"
            call = f"from benchmarks import equal; print(equal.json.dumps(equal.one({asked})))"
            said = subprocess.run([sys.executable, "-c", call], check=True, capture_output=True, text=True).stdout
            found.append(json.loads(said.splitlines()[-1]))
            print(found[-1])
    return found


def filled(page: str, found: dict) -> str:
    """A page with its two tables made of what was measured."""
    body = [[e["ways"], e["family"], f"{e['loss']:.1e}", f"{e['gradient']:.1e}"] for e in found["equal"]]
    equal = rows(["made in two ways", "family", "loss", "gradient"], body)
    body = [
        [
            e.get("family", "rwkv7"), f"{e['length']:,}",
            f"chunks of {e['chunk']}, {e['bptt']}" if e["chunk"] else "whole", f"{e['megabytes']:.0f}",
        ]
        for e in found["long"]
    ]  # fmt: skip
    for mark, table in (("equal", equal), ("long", rows(["family", "tokens", "read", "MB"], body))):
        head, _, rest = page.partition(f"<!-- {mark} -->\n")
        page = f"{head}<!-- {mark} -->\n\n{table}\n<!-- end -->\n{rest.partition('<!-- end -->' + chr(10))[2]}"
    return page


def main() -> None:
    """Measure, keep the numbers beside the page, and fill it."""
    found = {"equal": equalities(), "long": lengths()}
    (DOCS / "training.jsonl").write_text(json.dumps(found) + "\n")
    page = DOCS / "training.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
