"""Memory of a training step: as it is, with blocks computed again, with all logits at once, beside few bits.

python -m benchmarks.spare

Each case has a process of its own; memory is what that holds before the first step, and the most it held in it.
"""

import ctypes
import json
import subprocess
import sys
import time

import torch

from rwkvpipe.base.config import LoraConfig, RwkvConfig, TrainConfig
from rwkvpipe.data.batches import Batch
from rwkvpipe.model.family import build
from rwkvpipe.train import loss
from rwkvpipe.train.optim import adamw
from rwkvpipe.weights.lora import inject

FULL = {"n_layer": 12, "n_embd": 256, "vocab_size": 65536}  # where logits weigh most
LORA = {"n_layer": 12, "n_embd": 768, "vocab_size": 8192}  # where matrices do
TOKENS, ROWS = 512, 2
CASES = ("full", "full, recomputed", "full, all logits")
CASES += ("lora", "lora, recomputed", "lora, int8", "lora, nf4", "lora, nf4, recomputed")


def _memory(field: str) -> float:
    """Megabytes of this process: VmRSS, or VmHWM, the most since the last reset."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def _all_logits(model, features, targets, mask, share):
    return loss.masked_cross_entropy(model.logits(features), targets, mask, total=share.targets)


def one(case: str) -> dict:
    """Memory and time of a case, in this process."""
    torch.set_num_threads(1)
    sizes = LORA if case.startswith("lora") else FULL
    model = build(RwkvConfig(**sizes))
    model.initialise(0)
    if case.startswith("lora"):
        bits = next((kind for kind in ("int8", "nf4") if kind in case), None)
        inject(model, LoraConfig(rank=16, quantise=bits))
    model.train().recompute = "recomputed" in case
    if "all logits" in case:
        loss.language_loss = _all_logits
    config = TrainConfig(steps=9, l2_wrap=0, ctx_len=TOKENS)
    losses = loss.lm_losses(ROWS, config)
    ids = torch.randint(sizes["vocab_size"], (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    optimizer, batch = adamw(model, config), Batch(ids[:, :-1], ids[:, 1:])
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    begin = time.process_time()
    for part in losses(model, batch):
        part.backward()
        del part
    optimizer.step()
    return {"held": before, "most": _memory("VmHWM"), "cpu_seconds": time.process_time() - begin}


def measure(cases: list[str]) -> dict:
    """The cases one after the other."""
    found = {}
    for case in cases:
        call = [sys.executable, "-c", f"from benchmarks import spare; print(spare.json.dumps(spare.one({case!r})))"]
        found[case] = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
    return {"benchmark": "spare", "sizes": {"full": FULL, "lora": LORA}, "tokens": TOKENS, "rows": ROWS, "cases": found}


def table(found: dict) -> str:
    """The numbers for people."""
    lines = [f"{'':24} {'MB held':>8} {'most':>7} {'CPU s':>7}"]
    for case, each in found["cases"].items():
        lines.append(f"{case:24} {each['held']:8.0f} {each['most']:7.0f} {each['cpu_seconds']:7.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(measure(list(CASES))))
