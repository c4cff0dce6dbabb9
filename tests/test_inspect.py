"""Inspecting tells what a file holds."""

import json

import pytest
import torch

from rwkvpipe import inspect
from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import PipeError, WeightsError
from rwkvpipe.model.family import build
from rwkvpipe.weights import store


def test_inspecting_says_what_a_file_is(tmp_path, pair, capsys):
    base, adapter, model = pair
    inspect.main([str(base), "--json"])
    facts = json.loads(capsys.readouterr().out)
    wanted = {"family": "rwkv7", "dtype": "bfloat16", "n_layer": 2, "n_embd": 32, "head_size": 16}
    assert facts.items() >= wanted.items()
    assert facts["sizes_of"] == "no released model"
    assert facts["format"] == "safetensors" and facts["layout"] == "RWKV-LM"
    assert facts["vocabulary"] == model.config.vocab_size
    assert facts["parameters"] == sum(v.numel() for v in store.read(base)[1].values())
    inspect.main([str(adapter), "--json"])
    assert json.loads(capsys.readouterr().out)["adapter"]["rank"] == 2
    inspect.main([str(base)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["n_embd", "32"] for line in lines)
    with pytest.raises(WeightsError, match="no such file"):
        inspect.main([str(tmp_path / "none")])


def test_initial_states_alone_are_known_as_such(tmp_path, capsys):
    path = tmp_path / "rwkv-0.pth"
    torch.save({f"blocks.{n}.att.time_state": torch.zeros(4, 16, 16) for n in range(3)}, path)
    inspect.main([str(path), "--json"])
    assert json.loads(capsys.readouterr().out)["initial_states"].startswith("of 3 layers, 4 x 16 x 16; merge")
    with pytest.raises(WeightsError, match="this is initial states without their model; merge them into it"):
        store.read(path)


def test_the_sizes_of_a_released_model_are_known_without_its_data(tmp_path, capsys):
    with torch.device("meta"):
        like = {name: value.bfloat16() for name, value in build(RwkvConfig(preset="rwkv7-0.1b")).state_dict().items()}
    path = tmp_path / "8a1b2c3d-rwkv7-g1-0.4b-20250722-ctx4096" / "model.safetensors"
    path.parent.mkdir()
    header, end = {}, 0
    for name, value in like.items():
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [end, end + value.nbytes]}
        end += value.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:  # the data is a hole
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    inspect.main([str(path), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["sizes_of"] == "rwkv7-0.1b" and facts["parameters"] == 191_034_624
    assert facts["odd"] == "its name speaks of rwkv7-0.4b, its sizes are rwkv7-0.1b"


@pytest.mark.parametrize("settings", ["{", "[1]", '{"rank": "x"}'])
def test_an_adapter_with_damaged_settings_is_named(tmp_path, settings):
    path = tmp_path / "adapter.safetensors"
    store.write_tensors(path, {"blocks.0.att.key.lora_A": torch.zeros(2, 2)}, {"lora": settings})
    with pytest.raises(PipeError) as caught:
        inspect.main([str(path)])
    assert "\n" not in str(caught.value) and "adapter" in str(caught.value)
