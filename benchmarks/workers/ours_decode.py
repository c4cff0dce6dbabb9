"""Tokens read and written by rwkvpipe, on demand."""

import json
import sys
import time
from pathlib import Path

import torch

from rwkvpipe.infer.decode import Decoder
from rwkvpipe.infer.packed import keep
from rwkvpipe.weights.store import load_model

torch.set_num_threads(1)
models: dict[str, torch.nn.Module] = {}
decoders: dict[str, Decoder] = {}
for name in ("fp32", "trained", "bf16", "int8"):
    models[name] = load_model(Path(sys.argv[1]) / "model.safetensors").eval()
    kind = name
    if name == "trained":  # as much, in numbers that are not of bf16
        kind = "fp32"
        torch._foreach_mul_([x.data for x in models[name].parameters()], 1 + 2**-12)
    keep(models[name], kind)
    decoders[name] = Decoder(models[name], kind)
for order in sys.stdin:
    what, *words = order.split()
    with torch.inference_mode():
        if what == "logits":
            step, state = decoders["fp32"], models["fp32"].start(1)
            for number in range(1, 9):
                logits = step.step(torch.tensor([number]), state)
            answer = {"logits": logits[0, :1000].tolist()}
        elif what == "step":
            count, kind, rows = int(words[0]), words[1], int(words[2])
            step, state, ids = decoders[kind], models[kind].start(rows), torch.arange(rows) + 1
            step.step(ids, state)
            begin = time.process_time()
            for _ in range(count):
                step.step(ids, state)
            answer = {"cpu_seconds": time.process_time() - begin}
        else:
            model, ids = models[words[0]], torch.arange(256)[None] % 1000
            begin = time.process_time()
            model.logits(model.features(ids)[0][:, -1])
            answer = {"cpu_seconds": time.process_time() - begin}
    print(json.dumps(answer), flush=True)
