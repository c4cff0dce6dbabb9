"""Converting changes names and shapes, never values."""

import pytest
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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rwkv7-g1-0.1b-20250307-ctx4096.pth", "its name speaks of rwkv7-0.1b, its sizes are of no released model"),
        ("mine.pth", None),
    ],
)
def test_a_name_that_promises_other_sizes_is_told(tmp_path, caplog, name, said):
    model = build(RwkvConfig(**MODEL, vocab_size=20))
    torch.save(model.state_dict(), tmp_path / name)
    convert.main([str(tmp_path / name), "--out", str(tmp_path / "model.safetensors")])
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ([f"{tmp_path / name}: {said}"] if said else [])
