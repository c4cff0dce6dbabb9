"""Converting changes names and shapes, never values."""

import torch

from rwkvpipe import convert
from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.model.family import build
from rwkvpipe.weights import store

MODEL = {"n_layer": 2, "n_embd": 32, "head_size": 16}


def test_converting_keeps_every_bit(tmp_path):
    model = build(RwkvConfig(**MODEL, vocab_size=20))
    model.initialise(1)
    wild = {f"model.{name}": value.bfloat16().squeeze() for name, value in model.state_dict().items()}
    torch.save(wild, tmp_path / "wild.pth")
    out = tmp_path / "out" / "model.safetensors"
    convert.main([str(tmp_path / "wild.pth"), "--out", str(out)])
    for name, value in store.read(out)[1].items():
        assert torch.equal(value, model.state_dict()[name].bfloat16()), name
