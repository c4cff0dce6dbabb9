"""The verb writes what it is asked for and says in one line what it cannot."""

import pytest
import torch

from rwkvpipe import export
from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.model.family import build
from rwkvpipe.weights import store


@pytest.fixture
def model(tmp_path):
    made = build(RwkvConfig(n_layer=2, n_embd=64, vocab_size=257))
    made.initialise(4)
    store.write(tmp_path / "given.safetensors", made.config, made.state_dict())
    return str(tmp_path / "given.safetensors")


def test_a_format_is_named_or_described(tmp_path, model):
    export.main([model, "--to", "pth", "--out", str(tmp_path / "m.pth")])
    export.main([model, "--spec", '{"format":"gguf","dtype":"fp16"}', "--out", str(tmp_path / "m.gguf")])
    export.main([model, "--to", "hub", "--tokenizer", "bytes", "--out", str(tmp_path / "hub")])
    wanted = store.read(model)[1]
    for name, kind in (("m.pth", torch.float32), ("m.gguf", torch.float16), ("hub", torch.float32)):
        found = store.read(tmp_path / name)[1]
        assert all(torch.equal(found[key], value.to(kind)) for key, value in wanted.items()), name


@pytest.mark.parametrize("words", [["--to", "onnx"], [], ["--to", "pth", "--spec", "{}"], ["--spec", '{"form":"pth"}']])
def test_an_unknown_format_is_refused(tmp_path, model, words):
    with pytest.raises(ConfigError):
        export.main([model, *words, "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
