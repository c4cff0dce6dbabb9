"""What was trained beside weights goes with their tensors, whatever file holds them, and with no others."""

import json

import pytest
import torch

from rwkvpipe import inspect, merge, sft
from rwkvpipe.base.config import ExportConfig, LoraConfig, RwkvConfig, Settings, TrainConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.base.files import digest, write_json
from rwkvpipe.data.binidx import BinidxWriter
from rwkvpipe.model.family import build
from rwkvpipe.weights import store
from rwkvpipe.weights.beside import load_base
from rwkvpipe.weights.export import export
from rwkvpipe.weights.speaker import load_speaker

SIZES = {"n_layer": 2, "n_embd": 64, "head_size": 64, "vocab_size": 24}
WAYS = {"pth": "m.pth", "safetensors": "s/other.safetensors", "hub": "hub", "hf": "hf", "gguf": "m.gguf"}


def trained(folder, start, **asked):
    """An adapter, or states, of three steps beside `start`."""
    with BinidxWriter(folder / "corpus" / "train", "uint16") as writer:
        for first in range(1, 12):
            writer.add([first, 2 * first - 1, 0], [0, 1, 1])
    write_json(folder / "corpus" / "corpus.json", {"vocab_size": 24})
    value = Settings(kind="sft", seed=5, train=TrainConfig(steps=3, ctx_len=16, batch=4, lr=0.05, warmup=0), **asked)
    write_json(folder / "settings.json", value.model_dump(mode="json"))
    words = ["--model", str(start), "--data", str(folder / "corpus"), "--out", str(folder / "chat/adapter.safetensors")]
    sft.main([str(folder / "settings.json"), *words])
    return folder / "chat" / "adapter.safetensors"


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    model = build(RwkvConfig(**SIZES))
    model.initialise(3)
    path = tmp_path / "tiny" / "model.safetensors"
    store.write(path, model.config, model.state_dict())
    return path


def older(adapter):
    """The adapter as it was written when it told the digest of a file alone."""
    tensors, told = store.read_tensors(adapter)
    path = adapter.with_name("older.safetensors")
    store.write_tensors(path, tensors, {key: value for key, value in told.items() if not key.startswith("base_")})
    return path


def merged(model, adapter, out):
    merge.main(["--model", str(model), "--adapter", str(adapter), "--out", str(out)])
    return digest(out)


@pytest.mark.parametrize("asked", [{"lora": LoraConfig(rank=2)}, {"state": True}])
def test_equal_tensors_in_any_file_are_the_same_weights(tmp_path, start, asked):
    adapter = trained(tmp_path, start, **asked)
    wanted = merged(start, adapter, tmp_path / "wanted.safetensors")
    spoken = load_speaker(start, adapter).state_dict()
    for format, name in WAYS.items():
        export(start, tmp_path / name, ExportConfig(format=format))
        assert format == "safetensors" or digest(store.find(tmp_path / name)) != digest(start)
        for each in (adapter, older(adapter)):
            assert merged(tmp_path / name, each, tmp_path / "out.safetensors") == wanted, (format, each)
            found = load_speaker(tmp_path / name, each).state_dict()
            assert all(torch.equal(found[key], value) for key, value in spoken.items())


def test_an_adapter_trained_beside_a_pth_goes_with_what_it_is_converted_to(tmp_path, start):
    export(start, tmp_path / "m.pth", ExportConfig(format="pth"))
    adapter = trained(tmp_path, tmp_path / "m.pth", lora=LoraConfig(rank=2))
    wanted = merged(tmp_path / "m.pth", adapter, tmp_path / "a.safetensors")
    assert merged(start, adapter, tmp_path / "b.safetensors") == wanted
    assert merged(tmp_path / "m.pth", older(adapter), tmp_path / "c.safetensors") == wanted


@pytest.mark.parametrize("asked", [{"lora": LoraConfig(rank=2)}, {"state": True}])
@pytest.mark.parametrize("read", [load_speaker, lambda *given: merge.with_adapter(*given)])
def test_other_weights_are_refused_and_the_right_ones_are_told(tmp_path, start, asked, read):
    adapter = trained(tmp_path, start, **asked)
    config, tensors = store.read(start)
    store.write(tmp_path / "other/model.safetensors", config, tensors | {"ln_out.bias": tensors["ln_out.bias"] + 1})
    known = rf"beside tiny/model.safetensors \(float32, sha256 {digest(start)[:16]}\.\.\.\); give those"
    with pytest.raises(WeightsError, match=f"beside other weights than .*other/model.safetensors: {known}"):
        read(tmp_path / "other/model.safetensors", adapter)
    known = rf"beside a file \(sha256 {digest(start)[:16]}\.\.\.\); give those"
    with pytest.raises(WeightsError, match=f"beside other weights than .*: {known}"):
        read(tmp_path / "other/model.safetensors", older(adapter))


def test_the_same_in_another_precision_are_other_weights(tmp_path, start):
    adapter = trained(tmp_path, start, lora=LoraConfig(rank=2))
    export(start, tmp_path / "half.pth", ExportConfig(format="pth", dtype="bf16"))
    with pytest.raises(WeightsError, match="half.pth, which are in bfloat16: beside tiny/model.safetensors"):
        merged(tmp_path / "half.pth", adapter, tmp_path / "out.safetensors")
    beside = trained(tmp_path / "b", tmp_path / "half.pth", lora=LoraConfig(rank=2))
    export(tmp_path / "half.pth", tmp_path / "wide.pth", ExportConfig(format="pth", dtype="fp32"))
    with pytest.raises(WeightsError, match="wide.pth, which are in float32: beside .*/half.pth .bfloat16"):
        load_speaker(tmp_path / "wide.pth", beside)
    assert load_speaker(tmp_path / "half.pth", beside)


def test_what_no_model_reads_makes_no_other_weights(tmp_path, start):
    adapter = trained(tmp_path, start, lora=LoraConfig(rank=2))
    tensors = dict(store.read(start)[1])
    extra = {f"blocks.0.att.v{n}": tensors[f"blocks.1.att.v{n}"] for n in range(3)}
    torch.save(tensors | extra, tmp_path / "released.pth")
    wanted = merged(start, adapter, tmp_path / "a.safetensors")
    assert merged(tmp_path / "released.pth", adapter, tmp_path / "b.safetensors") == wanted


def test_the_digest_of_tensors_stays_from_version_to_version(tmp_path):
    config = build(RwkvConfig(**SIZES)).config
    like = build(config).state_dict()
    tensors = {name: torch.arange(value.numel()).view(value.shape).bfloat16() for name, value in like.items()}
    store.write(tmp_path / "m.safetensors", config, tensors)
    base = load_base(tmp_path / "m.safetensors", "cpu", apart=True)[1]
    assert base.tensors[:16] == "680c1bd188f54d99" and base.dtype == "bfloat16"
    assert load_base(tmp_path / "m.safetensors", "cpu", apart=False)[1].tensors == ""  # nothing tells of them


def test_training_and_speaking_read_each_tensor_once(tmp_path, start, monkeypatch):
    adapter, read = trained(tmp_path, start, lora=LoraConfig(rank=2)), []
    kept = store.open_model

    def counted(path):
        found = kept(path)
        load = found.tensors.load
        object.__setattr__(found.tensors, "load", lambda name: read.append(name) or load(name))
        return found

    monkeypatch.setattr(store, "open_model", counted)
    for use in (lambda: load_speaker(start, adapter), lambda: load_base(start, "cpu", apart=True)):
        read.clear()
        use()
        assert len(read) == len(set(read)) == len(store.open_model(start).tensors)


def test_inspecting_an_adapter_names_its_weights(tmp_path, start, capsys):
    adapter = trained(tmp_path, start, lora=LoraConfig(rank=2))
    inspect.main([str(adapter), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["base_name"] == "tiny/model.safetensors" and facts["base_sha256"] == digest(start)
