"""An adapter's folder for PEFT says what PEFT reads, and refuses what it has no place for."""

import json

import pytest
import torch

from rwkvpipe import export
from rwkvpipe.base.config import LoraConfig, RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.model.family import build
from rwkvpipe.train.stage import write_adapter
from rwkvpipe.weights.lora import adapter, inject, merged
from rwkvpipe.weights.tensors import read_tensors


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
