"""An adapter's folder for PEFT says what PEFT reads, and refuses what it has no place for."""

import json

import pytest
import torch

from rwkvpipe import convert, export, merge
from rwkvpipe.base.config import LoraConfig, RwkvConfig
from rwkvpipe.base.errors import PipeError, WeightsError
from rwkvpipe.model.family import build
from rwkvpipe.train.stage import write_adapter
from rwkvpipe.weights.lora import adapter, check_fits, disabled, folded, inject, merged
from rwkvpipe.weights.peft import open_adapter
from rwkvpipe.weights.store import load_model, mark
from rwkvpipe.weights.tensors import read_tensors, write_tensors


def exported(folder, format="peft", family="rwkv7", zeros=False, **changes):
    """Settings and tensors of the folder, the adapter's own, and the model's before."""
    model = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=20, family=family))
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=stream))
        model.blocks[1].att.key.weight[2] *= 0 if zeros else 1
    base = {name: value.detach().clone() for name, value in model.state_dict().items()}
    asked = LoraConfig(**{"rank": 3, "targets": ["att.key", "ffn.value"]} | changes)
    inject(model, asked)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=stream) * (value.requires_grad and not zeros))
    write_adapter(folder / "adapter.safetensors", model, asked, base="")
    export.main([str(folder / "adapter.safetensors"), "--to", format, "--out", str(folder / "out")])
    settings = json.loads((folder / "out/adapter_config.json").read_text())
    return settings, read_tensors(folder / "out/adapter_model.safetensors")[0], (asked, adapter(model), base)


@pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
def test_a_pissa_is_a_lora_of_twice_the_rank(tmp_path, family):
    settings, tensors, (asked, own, base) = exported(tmp_path, family=family, kind="pissa", alpha=6, full=["ln1"])
    assert settings["peft_type"] == "LORA" and settings["r"] == 6 and settings["lora_alpha"] == 12
    assert settings["target_modules"] == ["att.key", "ffn.value"]
    assert settings["modules_to_save"] == ["blocks.0.ln1", "blocks.1.ln1"]
    head = "base_model.model.blocks.1.att.key"
    product = 2 * tensors[f"{head}.lora_B.weight"] @ tensors[f"{head}.lora_A.weight"]
    wanted = merged(base, own, asked)["blocks.1.att.key.weight"]
    torch.testing.assert_close(base["blocks.1.att.key.weight"] + product, wanted, atol=1e-4, rtol=1e-5)
    assert torch.equal(tensors["base_model.model.blocks.0.ln1.bias"], own["blocks.0.ln1.bias"])


def test_names_are_those_of_the_model_that_they_are_for(tmp_path):
    settings, tensors, _ = exported(
        tmp_path, "peft_hf", kind="dora", targets=["blocks.1.att.key", "head"], full=["emb"]
    )
    assert settings["use_dora"] and settings["target_modules"] == ["lm_head", "model.layers.1.attn.k_proj"]
    head = "base_model.model.model.layers.1.attn.k_proj"
    assert {f"{head}.lora_A.weight", f"{head}.lora_B.weight", f"{head}.lora_magnitude_vector"} < tensors.keys()
    assert "base_model.model.model.embeddings.weight" in tensors and settings["modules_to_save"] == ["model.embeddings"]
    settings, tensors, _ = exported(tmp_path, kind="disha", targets=None)
    assert settings["peft_type"] == "MISS" and settings["r"] == 3
    assert tensors["base_model.model.blocks.0.ffn.key.miss_block"].shape == (3, 128)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"full": ["att.w0"]}, "blocks.0.att.w0 is no whole module"),
        ({"full": ["ln1.weight"]}, "blocks.0.ln1.weight is no whole module"),
        ({"kind": "dora", "zeros": True}, "blocks.1.att.key has rows of zeros"),
        ({"format": "peft_hf", "family": "rwkv6"}, "peft_hf is that of RWKV-7, this is rwkv6"),
    ],
)
def test_what_peft_has_no_place_for_is_refused(tmp_path, changes, said):
    with pytest.raises(WeightsError, match=said):
        exported(tmp_path, **changes)
    assert not (tmp_path / "out/README.md").exists()


@pytest.mark.parametrize("format", ["peft", "peft_hf"])
@pytest.mark.parametrize("kind", ["lora", "pissa", "dora", "disha"])
def test_a_folder_comes_back_as_what_it_was_written_from(tmp_path, format, kind):
    _, _, (asked, own, base) = exported(tmp_path, format, kind=kind, full=["ln_x", "ln1"], targets=None)
    tensors, config = open_adapter(tmp_path / "out")
    again, wanted = merged(base, tensors, config), merged(base, own, asked)
    assert again.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(again[name], value, atol=1e-5, rtol=1e-5, msg=name)
    with torch.device("meta"):
        check_fits(build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=20)), tensors, config)


def test_targets_by_their_last_part_are_those_of_peft(tmp_path):
    exported(tmp_path, "peft_hf", kind="lora", targets=["att.key", "att.value"], rslora=True)
    path = tmp_path / "out/adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"target_modules": ["k_proj", "v_proj"]}))
    assert open_adapter(tmp_path / "out")[1].targets == ("att.key", "att.value")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rank_pattern": {"key": 4}}, "rank_pattern is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16', which is not supported"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is"),
        ({"target_modules": "all-linear"}, "target_modules is 'all-linear'"),
        ({"peft_type": "IA3"}, "peft_type IA3 is not supported"),
        ({"lora_alpha": None}, "names no lora_alpha"),
        ({"r": "many"}, "rank"),
        ({"target_modules": ["att.key", "ffn.value", "att.value"]}, "blocks.0.att.value.lora_A is missing"),
        ({"target_modules": ["att.key"]}, "blocks.0.ffn.value.lora_A is unknown"),
    ],
)
def test_a_folder_that_would_have_to_be_guessed_at_is_refused(tmp_path, changes, said):
    exported(tmp_path, kind="lora")
    path = tmp_path / "out/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=20))
    write_tensors(tmp_path / "base.safetensors", model.state_dict())
    words = [tmp_path / "base.safetensors", "--adapter", tmp_path / "out", "--out", tmp_path / "new/model.safetensors"]
    with pytest.raises(PipeError, match=said):
        convert.main([str(word) for word in words])
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_weights_are_converted_with_a_folder_in_them(tmp_path, ending):
    _, _, (asked, own, base) = exported(tmp_path, "peft_hf", kind="dora", full=["ln2"])
    if ending == "bin":
        file = tmp_path / "out/adapter_model.safetensors"
        torch.save(read_tensors(file)[0], tmp_path / "out/adapter_model.bin")
        file.unlink()
    write_tensors(tmp_path / "base.safetensors", base)
    words = [tmp_path / "base.safetensors", "--adapter", tmp_path / "out", "--out", tmp_path / "new/model.safetensors"]
    convert.main([str(word) for word in words])
    found, wanted = read_tensors(tmp_path / "new/model.safetensors")[0], merged(base, own, asked)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("second", ["lora", "pissa", "dora", "disha"])
@pytest.mark.parametrize("first", ["lora", "disha"])
def test_an_adapter_of_an_adapter_is_both_and_the_base_comes_back(tmp_path, first, second):
    sizes = RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=20)
    model = build(sizes)
    model.initialise(0)
    ids, path = torch.arange(12)[None], tmp_path / "base.safetensors"
    for number, kind in enumerate((first, second)):
        write_tensors(path, model.state_dict())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        asked = LoraConfig(kind=kind, rank=2, full=["ln_x"])
        inject(model, asked, number)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.1 * torch.randn(value.shape) * value.requires_grad)
            wanted, _ = model(ids)
            with folded(model):
                assert (model(ids)[0] - wanted).abs().max() < 1e-4
            with disabled(model):
                assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
            assert torch.equal(model(ids)[0], wanted)
        own = tmp_path / f"{number}/adapter.safetensors"
        write_adapter(own, model, asked, base=mark(path))
        merged_path = tmp_path / f"{number}/model.safetensors"
        merge.main(["--model", str(path), "--adapter", str(own), "--out", str(merged_path)])
        model, path = load_model(merged_path), tmp_path / "second.safetensors"
        with torch.no_grad():
            assert (model(ids)[0] - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("given", ["pth", "text", "folder"])
def test_what_is_no_adapter_is_not_called_damaged(tmp_path, given):
    torch.save({"a": torch.ones(2)}, tmp_path / "pth")
    (tmp_path / "text").write_text("{}" * 9)
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError, match=f"{given}: is no safetensors file"):
        export.main([str(tmp_path / given), "--to", "peft", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
