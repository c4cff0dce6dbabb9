"""Tokens read and written by rwkvpipe, on demand."""

import json
import sys
import time
from pathlib import Path

import torch

from rwkvpipe.infer.decode import Decoder
from rwkvpipe.weights.store import load_model

torch.set_num_threads(1)
model = load_model(Path(sys.argv[1]) / "model.safetensors")
decoders: dict[str, Decoder] = {}
for order in sys.stdin:
    what, *words = order.split()
    with torch.inference_mode():
        if what == "logits":
            step, state = Decoder(model), model.start(1)
            for number in range(1, 9):
                logits = step.step(torch.tensor([number]), state)
            answer = {"logits": logits[0, :1000].tolist()}
        elif what == "step":
            count, kind, rows = int(words[0]), words[1], int(words[2])
            step = decoders.setdefault(kind, decoders.get(kind) or Decoder(model, kind))
            state, ids = model.start(rows), torch.arange(rows) + 1
            step.step(ids, state)
            begin = time.process_time()
            for _ in range(count):
                step.step(ids, state)
            answer = {"cpu_seconds": time.process_time() - begin}
        else:
            ids = torch.arange(256)[None] % 1000
            begin = time.process_time()
            model.logits(model.features(ids)[0][:, -1])
            answer = {"cpu_seconds": time.process_time() - begin}
    print(json.dumps(answer), flush=True)
