"""Steps of rwkvtune's own model and loss, on demand; runs in the peer's environment."""

import json
import sys
import time
from pathlib import Path

import torch
from rwkvtune.models.configuration import RWKVConfig
from rwkvtune.models.rwkv7.model import RWKV7Model
from rwkvtune.training.lightning_module import L2Wrap
from safetensors.torch import load_file

folder = Path(sys.argv[1])
case = json.loads((folder / "case.json").read_text())
torch.set_num_threads(1)
width = case["n_embd"]
sizes = {"n_layer": case["n_layer"], "n_embd": width, "vocab_size": case["vocab_size"], "ctx_len": case["ctx_len"]}
sizes |= {"head_size_a": case["head_size"], "dim_ffn": 4 * width, "dim_att_lora": case["d_decay"]}
model = RWKV7Model(RWKVConfig(**sizes, dim_gate_lora=case["d_gate"], dim_mv_lora=case["d_mv"])).train()
shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
given = {name: x.view(shapes[name]) for name, x in load_file(folder / "model.safetensors").items()}
missing, unknown = model.load_state_dict(given, strict=False)
# the first layer has a value residual that it never uses
assert not unknown and all(".att.v" in name for name in missing), (missing, unknown)
ids = load_file(folder / "ids.safetensors")["ids"]
settings = {"lr": case["lr"], "betas": (0.9, 0.99), "eps": 1e-18, "weight_decay": 0.0, "fused": True}
optimizer = torch.optim.AdamW(model.parameters(), **settings)


def training_loss() -> torch.Tensor:
    """As its training step computes it; what it calls labels has to be shifted by the caller."""
    logits = model(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return L2Wrap.apply(loss, logits)


for order in sys.stdin:
    if order.strip() == "loss":
        with torch.no_grad():
            answer = {"loss": float(training_loss())}
    else:
        begin = time.process_time()
        model.zero_grad(set_to_none=True)
        training_loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        answer = {"cpu_seconds": time.process_time() - begin}
    print(json.dumps(answer), flush=True)
