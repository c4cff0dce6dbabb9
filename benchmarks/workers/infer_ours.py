"""rwkvpipe's engine reads and writes, on demand."""

import json
import sys
import time
from pathlib import Path

import torch

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.infer.decode import decoder
from rwkvpipe.infer.engine import Engine
from rwkvpipe.infer.memory import SCORED, row_bytes
from rwkvpipe.infer.reading import CHUNK, LOGITS
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
ids = case["ids"]
greedy = SamplingConfig(temperature=0.0, max_tokens=case["tokens"] + 1, stop=())
drawn = SamplingConfig(top_p=0.85, presence=0.3, frequency=0.3, max_tokens=case["tokens"] + 1, stop=())
logits, state = engine.reader.read([ids])


def write(rows: int, sampling: SamplingConfig) -> int:
    """Write on after the prompt; how many tokens."""
    slots = engine.slots(rows)
    slots.enter([Job(n, 0, ids, sampling, logits, state, 0) for n in range(rows)])
    while slots.busy:
        slots.step()
    return rows * case["tokens"]


def kernel(rows: int) -> int:
    """The native steps alone."""
    step, now, newest = decoder(engine.model), state.take([0] * rows), torch.arange(rows) + 1
    with torch.inference_mode():
        for _ in range(case["tokens"]):
            step.step(newest, now)
    return rows * case["tokens"]


def resident(which: str) -> int:
    """Bytes that the process holds (VmRSS), or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def hold(rows: int) -> dict:
    """Read and write in a new engine: bytes that it was to take, and took at most."""
    Path("/proc/self/clear_refs").write_text("5")  # from here on what is held at most counts anew
    before = resident("VmRSS")
    other = Engine(engine.model, engine.tokenizer, rows)
    prompts = [" ".join(str(1 + (n + k) % 999) for k in range(300)) for n in range(rows)]
    list(other.generate(prompts, drawn))
    list(other.loglikelihood([(prompt, " ".join(map(str, range(1, 60)))) for prompt in prompts]))
    asked = rows * row_bytes(engine.model.config, CHUNK) + SCORED * min(rows * CHUNK * engine.tokenizer.size, LOGITS)
    return {"bytes": asked, "held": resident("VmHWM") - before}


for order in sys.stdin:
    kind, _, count = order.strip().partition(" ")
    begin, tokens, answer = time.process_time(), len(ids), {}
    if kind == "hold":
        answer = hold(int(count))
    elif kind in ("logits", "read"):
        logits, state = engine.reader.read([ids])
    elif kind == "kernel":
        tokens = kernel(case["rows"] if count else 1)
    else:
        tokens = write(case["rows"] if count or kind == "rows" else 1, drawn if kind == "drawn" else greedy)
    spent = time.process_time() - begin
    answer |= {"logits": logits[0].tolist()} if kind == "logits" else {"tokens": tokens, "cpu_seconds": spent}
    print(json.dumps(answer), flush=True)
