"""Steps of rwkv-trainer's own model and loss, on demand; runs in the peer's environment."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

folder = Path(sys.argv[1])
case = json.loads((folder / "case.json").read_text())
os.environ.update(
    RWKV_MY_TESTING="x070",
    RWKV_TORCH_FALLBACK="1",
    RWKV_JIT_ON="0",
    RWKV_FLOAT_MODE="fp32",
    RWKV_HEAD_SIZE_A=str(case["head_size"]),
    RWKV_CTXLEN=str(case["ctx_len"]),
)
from rwkv_trainer.model.model import RWKV  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
width = case["n_embd"]
sizes = {"n_layer": case["n_layer"], "n_embd": width, "dim_att": width, "dim_ffn": 4 * width}
sizes |= {"head_size_a": case["head_size"], "head_size_divisor": 8, "pre_ffn": 0, "my_pos_emb": 0, "my_testing": "x070"}
others = {"head_qk": 0, "dropout": 0, "grad_cp": 0, "my_qa_mask": 0, "train_type": "", "weight_decay": 0.001}
model = RWKV(SimpleNamespace(vocab_size=case["vocab_size"], ctx_len=case["ctx_len"], **sizes, **others))
shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
given = {name: x.view(shapes[name]) for name, x in load_file(folder / "model.safetensors").items()}
missing, unknown = model.load_state_dict(given, strict=False)
# the first layer has a value residual that it never uses
assert not unknown and all(".att.v" in name for name in missing), (missing, unknown)
ids = load_file(folder / "ids.safetensors")["ids"]
batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
settings = {"lr": case["lr"], "betas": (0.9, 0.99), "eps": 1e-18, "weight_decay": 0.0, "fused": True}
optimizer = torch.optim.AdamW(model.parameters(), **settings)
for order in sys.stdin:
    if order.strip() == "loss":
        with torch.no_grad():
            answer = {"loss": float(model.training_step(batch, 0))}
    else:
        begin, since = time.process_time(), time.monotonic()
        model.zero_grad(set_to_none=True)
        model.training_step(batch, 0).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        answer = {"cpu_seconds": time.process_time() - begin, "seconds": time.monotonic() - since}
    print(json.dumps(answer), flush=True)
