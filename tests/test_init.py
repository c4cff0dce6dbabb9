"""A new model is a function of its settings and its vocabulary."""

import json

import pytest

from rwkvpipe import init
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.base.files import digest
from rwkvpipe.weights import store

MODEL = {"n_layer": 2, "n_embd": 32, "head_size": 16}


def initialised(folder, name="init.safetensors", **changes):
    asked = {"kind": "pretrain", "seed": 4, "model": MODEL, "train": {"steps": 3}} | changes
    (folder / "settings.json").write_text(json.dumps(asked))
    init.main([str(folder / "settings.json"), "--tokenizer", "bytes", "--out", str(folder / name)])
    return folder / name


def test_the_same_seed_gives_the_same_model(tmp_path):
    one, two = digest(initialised(tmp_path, "a.safetensors")), digest(initialised(tmp_path, "b.safetensors"))
    assert one == two != digest(initialised(tmp_path, "c.safetensors", seed=5))


def test_a_new_model_takes_its_vocabulary_from_the_tokenizer_or_a_larger_one(tmp_path):
    size = store.sizes(initialised(tmp_path)).vocab_size
    assert size in (256, 257)
    larger = initialised(tmp_path, model=MODEL | {"vocab_size": 300})
    assert store.sizes(larger).vocab_size == 300
    with pytest.raises(ConfigError, match="model.vocab_size is 100"):
        initialised(tmp_path, model=MODEL | {"vocab_size": 100})
    with pytest.raises(ConfigError, match="model is missing"):
        initialised(tmp_path, model=None)
