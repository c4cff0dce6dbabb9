"""Steps of rwkvpipe, on demand, in the precision that is named."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.data.batches import Batch
from rwkvpipe.kernel import choice
from rwkvpipe.train.loss import lm_losses
from rwkvpipe.train.optim import adamw
from rwkvpipe.weights.store import load_model

folder, precision = Path(sys.argv[1]), sys.argv[2]
case = json.loads((folder / "case.json").read_text())
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
model = load_model(folder / "model.safetensors").train()
choice.settle(model, rounded=precision == "bf16")
ids = load_file(folder / "ids.safetensors")["ids"]
sizes = {"ctx_len": case["ctx_len"], "batch": case["batch"]}
config = TrainConfig(steps=1000, lr=case["lr"], precision=precision, **sizes)
optimizer = adamw(model, config)
losses, batch = lm_losses(case["batch"], config), Batch(ids[:, :-1], ids[:, 1:])


def gradients() -> None:
    """As the loop of training computes them: what they are made of is gone before the next ones."""
    model.zero_grad(set_to_none=True)
    for part in losses(model, batch):
        part.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)


for order in sys.stdin:
    if order.strip() == "loss":
        with torch.no_grad():
            answer = {"loss": float(sum(losses(model, batch)))}
    else:
        begin, since = time.process_time(), time.monotonic()
        gradients()
        optimizer.step()
        answer = {"cpu_seconds": time.process_time() - begin, "seconds": time.monotonic() - since}
    print(json.dumps(answer), flush=True)
