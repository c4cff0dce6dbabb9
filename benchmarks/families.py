"""One step of training (forward, backward, clip, AdamW) on one thread: CPU time of each family at equal sizes."""

import time
from dataclasses import asdict
from statistics import median

import torch

from benchmarks.page import rows
from benchmarks.train import Case, conditions
from rwkvpipe.base.config import RwkvConfig, TrainConfig
from rwkvpipe.base.sizes import FAMILIES
from rwkvpipe.data.batches import Batch
from rwkvpipe.kernel import choice
from rwkvpipe.model.family import build
from rwkvpipe.train.loss import lm_losses
from rwkvpipe.train.optim import adamw


def trainee(family: str, case: Case):
    """A model of the family, and a function that trains it one step and gives its CPU seconds."""
    sizes = {name: getattr(case, name) for name in ("n_layer", "n_embd", "head_size", "vocab_size")}
    model = build(RwkvConfig(family=family, dim_ffn=4 * case.n_embd, **sizes)).train()
    model.initialise(0)
    choice.settle(model)
    config = TrainConfig(steps=1000, lr=case.lr, ctx_len=case.ctx_len, batch=case.batch)
    optimizer, losses = adamw(model, config), lm_losses(case.batch, config)
    ids = torch.randint(case.vocab_size, (case.batch, case.ctx_len + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:])

    def step() -> float:
        begin = time.process_time()
        model.zero_grad(set_to_none=True)
        for part in losses(model, batch):
            part.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        return time.process_time() - begin

    return model, step


def measure(rounds: int, case: Case) -> dict:
    """CPU seconds of steps of every family, one after the other in each turn; the first turn warms up."""
    torch.set_num_threads(1)
    trainees = {family: trainee(family, case) for family in FAMILIES}
    turns = [{family: step() for family, (_, step) in trainees.items()} for _ in range(rounds + 1)][1:]
    found = {
        family: {
            "parameters": sum(value.numel() for value in model.parameters()),
            "cpu_seconds": [turn[family] for turn in turns],
        }
        for family, (model, _) in trainees.items()
    }
    return {"what": "families", "case": asdict(case), "families": found, **conditions()}


def table(found: dict) -> str:
    """The numbers for people."""
    case, like = found["case"], found["families"]["rwkv7"]["cpu_seconds"]
    body = []
    for family, row in found["families"].items():
        seconds = row["cpu_seconds"]
        times = [one / other for one, other in zip(seconds, like, strict=True)]
        said = f"{median(times):.2f} ({min(times):.2f} to {max(times):.2f})" if family != "rwkv7" else "1"
        body.append([family, f"{row['parameters']:,}", f"{median(seconds):.3f}", said])
    model = f"{case['n_layer']} layers of {case['n_embd']}, {case['batch']} rows of {case['ctx_len']}"
    return rows([model, "parameters", "CPU s", "times rwkv7's"], body).rstrip("\n")
