"""Memory of a training step: as it is, with blocks computed again, with all logits at once, beside few bits.

Of a step of GRPO and of one of DPO, too, that learn from the second half of each row.

python -m benchmarks.spare

Each case has a process of its own; memory is what that holds before the first step, and the most it held in it.
"""

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from rwkvpipe.base.config import LoraConfig, RolloutConfig, RwkvConfig, TrainConfig
from rwkvpipe.data.batches import Batch
from rwkvpipe.model.family import build
from rwkvpipe.train import likelihood, loss, policy, preference
from rwkvpipe.train.optim import adamw
from rwkvpipe.weights.lora import inject

FULL = {"n_layer": 12, "n_embd": 256, "vocab_size": 65536}  # where logits weigh most
LORA = {"n_layer": 12, "n_embd": 768, "vocab_size": 8192}  # where matrices do
TOKENS, ROWS = 512, 2
CASES = ("full", "full, recomputed", "full, all logits")
CASES += ("grpo", "grpo, all logits", "dpo", "dpo, all logits")
CASES += ("lora", "lora, recomputed", "lora, int8", "lora, nf4", "lora, nf4, recomputed")


def _memory(field: str) -> float:
    """Megabytes of this process: VmRSS, or VmHWM, the most since the last reset."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def _all_logits(model, features, targets, mask, share):
    return loss.masked_cross_entropy(model.logits(features), targets, mask, total=share.targets)


def _all_likely(model, features, ids, *, temperature=1.0, precision="fp32", uncertain=False):
    logits = model.logits(features)
    found = likelihood.token_logprobs(logits, ids, temperature)
    return found, likelihood.token_entropy(logits, temperature) if uncertain else None


def _losses(case: str, model: torch.nn.Module, ids: torch.Tensor, config: TrainConfig) -> Iterator[torch.Tensor]:
    """What a case goes back through."""
    half = TOKENS // 2
    if case.startswith("grpo"):
        mask = torch.ones(ROWS, TOKENS + 1 - half)
        rollout = policy.Rollout(
            ids, torch.full((ROWS,), half), mask, torch.linspace(-1, 1, ROWS), torch.zeros_like(mask)
        )
        return policy.grpo_losses(RolloutConfig(entropy=0.01), ROWS)(model, rollout)
    if case.startswith("dpo"):
        pairs = preference.Pairs(ids, (torch.arange(TOKENS + 1) >= half).float().repeat(ROWS, 1))
        return iter([preference.answer_logprobs(model, pairs, "fp32").sum()])
    return loss.lm_losses(ROWS, config)(model, Batch(ids[:, :-1], ids[:, 1:]))


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
        loss.language_loss, policy.likelihood, preference.likelihood = _all_logits, _all_likely, _all_likely
    config = TrainConfig(steps=9, l2_wrap=0, ctx_len=TOKENS)
    ids = torch.randint(sizes["vocab_size"], (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    optimizer = adamw(model, config)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    begin = time.process_time()
    for part in _losses(case, model, ids, config):
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
