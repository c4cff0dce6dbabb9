"""States tuned apart from their model go into it, and into no other."""

import pytest
import torch

from rwkvpipe import merge
from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.model.family import build
from rwkvpipe.weights import store
from rwkvpipe.weights.states import read_states

SIZES = {"n_layer": 2, "n_embd": 32, "head_size": 16, "vocab_size": 20}


def states(layers=2, heads=2):
    stream = torch.Generator().manual_seed(0)
    return {f"blocks.{n}.att.time_state": torch.randn(heads, 16, 16, generator=stream) for n in range(layers)}


def merged(folder, family, given):
    """The model and the same with states, as merging gives it."""
    model = build(RwkvConfig(**SIZES, family=family))
    model.initialise(1)
    with torch.no_grad():
        for block in model.blocks:
            block.att.output.weight.normal_(generator=torch.Generator().manual_seed(2))
    store.write(folder / "model.safetensors", model.config, model.state_dict())
    torch.save({f"model.{name}": value for name, value in given.items()}, folder / "rwkv-0.pth")
    words = ["--model", folder / "model.safetensors", "--adapter", folder / "rwkv-0.pth"]
    merge.main([*map(str, words), "--out", str(folder / "m.safetensors")])
    return model.eval(), store.load_model(folder / "m.safetensors")


@pytest.mark.parametrize("family", ["rwkv6", "rwkv7"])
def test_a_model_with_states_starts_from_them(tmp_path, family):
    given, ids = states(), torch.arange(9)[None]
    plain, tuned = merged(tmp_path, family, given)
    start = plain.start(1)
    start.wkv = [value[None] for value in given.values()]
    with torch.no_grad():
        torch.testing.assert_close(tuned(ids)[0], plain(ids, start)[0])
        assert not torch.allclose(tuned(ids)[0], plain(ids)[0], atol=1e-3)


@pytest.mark.parametrize(
    ("family", "given", "said"),
    [
        ("rwkv7", states(layers=3), "blocks.2.att.time_state is unknown"),
        ("rwkv7", states(layers=1), "blocks.1.att.time_state is missing"),
        ("rwkv6", states(heads=3), r"is \(3, 16, 16\), needed is \(2, 16, 16\)"),
        ("rwkv5", states(), "initial states, which RWKV-5 has none of"),
    ],
)
def test_states_of_another_model_are_refused(tmp_path, family, given, said):
    with pytest.raises(WeightsError, match=said):
        merged(tmp_path, family, given)
    assert not (tmp_path / "m.safetensors").exists()


def test_other_files_are_no_states(tmp_path):
    torch.save({"emb.weight": torch.zeros(2), **states()}, tmp_path / "a.pth")
    assert read_states(tmp_path / "a.pth") is None
