"""States tuned apart from their model go into it, and into no other."""

import pytest
import torch

from rwkvpipe import merge, pretrain
from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import ConfigError, WeightsError
from rwkvpipe.base.files import read_jsonl, write_json
from rwkvpipe.data.binidx import BinidxWriter
from rwkvpipe.model.family import build
from rwkvpipe.weights import store
from rwkvpipe.weights.lora import disabled
from rwkvpipe.weights.states import read_states, tune_states

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


@pytest.mark.parametrize("family", ["rwkv6", "rwkv7"])
def test_tuning_states_trains_them_alone_and_its_file_merges_into_the_same_model(tmp_path, monkeypatch, family):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    model = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=17, family=family))
    model.initialise(3)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    store.write(tmp_path / "m.safetensors", model.config, model.state_dict())
    with BinidxWriter(tmp_path / "train", "uint16") as writer:
        for first in range(40):
            writer.add([first % 7 + n for n in range(9)] + [0])
    write_json(tmp_path / "corpus.json", {"vocab_size": 17})
    train = {"steps": 30, "ctx_len": 18, "batch": 4, "lr": 0.3, "warmup": 1, "log_every": 1}
    write_json(tmp_path / "settings.json", {"kind": "pretrain", "seed": 1, "state": True, "train": train})
    words = [str(tmp_path / "settings.json"), "--model", str(tmp_path / "m.safetensors"), "--data", str(tmp_path)]
    pretrain.main([*words, "--out", str(tmp_path / "out/adapter.safetensors")])
    rows = list(read_jsonl(tmp_path / "out/metrics.jsonl"))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    tensors, told = store.read_tensors(tmp_path / "out/adapter.safetensors")
    assert set(tensors) == {f"blocks.{n}.att.time_state" for n in (0, 1)} and told["base"]
    words = ["--adapter", str(tmp_path / "out/adapter.safetensors"), "--out", str(tmp_path / "new/model.safetensors")]
    merge.main(["--model", str(tmp_path / "m.safetensors"), *words])
    config, found = store.read(tmp_path / "new/model.safetensors")
    assert config.time_state and all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    tuned = store.load_model(tmp_path / "m.safetensors")
    tune_states(tuned)
    ids = torch.arange(9)[None]
    start = tuned(ids)[0]
    torch.testing.assert_close(start, model(ids)[0], rtol=0, atol=0)
    with torch.no_grad():
        for name, value in tensors.items():
            tuned.get_parameter(name).copy_(value)
        torch.testing.assert_close(tuned(ids)[0], store.load_model(tmp_path / "new/model.safetensors")(ids)[0])
        with disabled(tuned):
            torch.testing.assert_close(tuned(ids)[0], start, rtol=0, atol=0)
    store.write(tmp_path / "other.safetensors", model.config, {k: v + 1 for k, v in model.state_dict().items()})
    with pytest.raises(WeightsError, match="beside other weights"):
        merge.main(["--model", str(tmp_path / "other.safetensors"), *words])


def test_a_family_without_states_is_refused():
    with pytest.raises(ConfigError, match="state: RWKV-5 has no initial states"):
        tune_states(build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=17, family="rwkv5")))
