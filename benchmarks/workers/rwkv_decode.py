"""Tokens read and written by the package rwkv, on demand; runs in the peer's environment."""

import json
import os
import sys
import time
from pathlib import Path

os.environ.update(RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
os.environ["RWKV_V7_ON"] = str(int((Path(sys.argv[1]) / "family").read_text() == "rwkv7"))
import torch
from rwkv.model import RWKV

torch.set_num_threads(1)
model = RWKV(model=str(Path(sys.argv[1]) / "model"), strategy="cpu fp32")
for order in sys.stdin:
    what, *words = order.split()
    if what == "logits":
        state = None
        for number in range(1, 9):
            logits, state = model.forward([number], state)
        answer = {"logits": logits[:1000].tolist()}
    elif what == "step":
        _, state = model.forward([1], None)
        begin = time.process_time()
        for _ in range(int(words[0])):
            _, state = model.forward([1], state)
        answer = {"cpu_seconds": time.process_time() - begin}
    else:
        ids = [number % 1000 for number in range(256)]
        begin = time.process_time()
        model.forward(ids, None)
        answer = {"cpu_seconds": time.process_time() - begin}
    print(json.dumps(answer), flush=True)
