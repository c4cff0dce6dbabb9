"""rwkvpipe's engine reads and writes, on demand."""

import json
import sys
import time
from pathlib import Path

import torch

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.infer.engine import Engine
from rwkvpipe.infer.row import Job
from rwkvpipe.weights.store import load_model


class Numbers:
    """Ids that write nothing: what is measured is the model and the engine."""

    def __init__(self, size: int):
        self.size, self.eos = size, None

    def encode(self, text: str) -> list[int]:
        """Ids of numbers."""
        return [int(word) for word in text.split()]

    def decode_bytes(self, ids) -> bytes:
        """Nothing."""
        return b""

    def owns(self, number: int) -> bool:
        """All of them."""
        return True


folder = Path(sys.argv[1])
case = json.loads((folder / "case.json").read_text())
torch.set_num_threads(1)
engine = Engine(load_model(folder / "model.safetensors"), Numbers(case["vocab_size"]), case["rows"])
ids, sampling = case["ids"], SamplingConfig(temperature=0.0, max_tokens=case["tokens"] + 1, stop=())
logits, state = engine.reader.read([ids])
for order in sys.stdin:
    kind = order.strip()
    begin, tokens = time.process_time(), len(ids)
    if kind in ("logits", "read"):
        logits, state = engine.reader.read([ids])
    else:
        rows = case["rows"] if kind == "rows" else 1
        slots, tokens = engine.slots(rows), rows * case["tokens"]
        slots.enter([Job(n, 0, ids, sampling, logits, state, 0) for n in range(rows)])
        while slots.busy:
            slots.step()
    spent = time.process_time() - begin
    answer = {"logits": logits[0].tolist()} if kind == "logits" else {"tokens": tokens, "cpu_seconds": spent}
    print(json.dumps(answer), flush=True)
