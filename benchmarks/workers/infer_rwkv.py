"""The package rwkv reads and writes, on demand; runs in the peer's environment."""

import json
import os
import sys
import time
from pathlib import Path

import torch

folder = Path(sys.argv[1])
case = json.loads((folder / "case.json").read_text())
os.environ.update(RWKV_JIT_ON="1", RWKV_CUDA_ON="0", RWKV_V7_ON="1")
from rwkv.model import RWKV  # noqa: E402

torch.set_num_threads(1)
model, ids = RWKV(model=str(folder / "model"), strategy="cpu fp32"), case["ids"]
for order in sys.stdin:
    kind = order.strip()
    begin, tokens = time.process_time(), len(ids)
    if kind in ("logits", "read"):
        logits, state = model.forward(ids, None)
    else:
        tokens, now, newest = case["tokens"], [x.clone() for x in state], logits
        for _ in range(tokens):
            newest, now = model.forward([int(newest.argmax())], now)
    spent = time.process_time() - begin
    answer = {"logits": logits.tolist()} if kind == "logits" else {"tokens": tokens, "cpu_seconds": spent}
    print("\n" + json.dumps(answer), flush=True)
