"""Names of other programs become RWKV-LM's, and versions that cannot be used are named."""

import json

import pytest
import torch

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.model.family import build
from rwkvpipe.weights import store
from rwkvpipe.weights.layouts import hf7
from rwkvpipe.weights.tensors import held, write_tensors

CONFIG = RwkvConfig(n_layer=2, n_embd=64, head_size=32, vocab_size=11, d_decay=24, d_aaa=20, d_mv=12, d_gate=40)
# in the layout of flash-linear-attention and rwkv7-hf, of a model of these sizes
NAMES = {
    "lm_head.weight": (11, 64),
    "model.embeddings.weight": (11, 64),
    "model.norm.bias": (64,),
    "model.layers.0.pre_norm.weight": (64,),
    "model.layers.0.attn_norm.weight": (64,),
    "model.layers.1.ffn_norm.bias": (64,),
    "model.layers.0.attn.x_r": (1, 1, 64),
    "model.layers.0.attn.k_k": (64,),
    "model.layers.0.attn.k_a": (64,),
    "model.layers.0.attn.r_k": (2, 32),
    "model.layers.0.attn.r_proj.weight": (64, 64),
    "model.layers.0.attn.o_proj.weight": (64, 64),
    "model.layers.0.attn.g_norm.bias": (64,),
    "model.layers.0.attn.w_lora.lora.0.weight": (24, 64),
    "model.layers.0.attn.w_lora.lora.2.weight": (64, 24),
    "model.layers.0.attn.w_lora.lora.2.bias": (64,),
    "model.layers.1.attn.v_lora.lora.0.weight": (12, 64),
    "model.layers.1.attn.g_lora.lora.2.weight": (64, 40),
    "model.layers.0.ffn.x_k": (64,),
    "model.layers.0.ffn.key.weight": (256, 64),
}


@pytest.fixture(scope="module")
def tensors():
    model = build(CONFIG)
    stream = torch.Generator().manual_seed(3)
    return {name: torch.randn(value.shape, generator=stream) for name, value in model.state_dict().items()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape and torch.equal(found[name], value), name


def test_the_hugging_face_layout_has_the_names_and_shapes_that_its_programs_use(tensors):
    made = held(tensors).made(hf7(tensors))
    assert {name: tuple(made.like[name].shape) for name in NAMES} == NAMES
    assert len(made) == len(tensors)


def test_the_hugging_face_layout_comes_back_bit_for_bit(tmp_path, tensors):
    made = held(tensors).made(hf7(tensors))
    write_tensors(tmp_path / "model.safetensors", made)
    found = store.open_model(tmp_path)
    same(dict(found.tensors), tensors)
    assert found.config == CONFIG.model_copy(update={"dim_ffn": 256})
    assert "Hugging Face" in found.layout


def test_mixes_stacked_by_old_versions_are_cut_apart(tmp_path, tensors):
    made = dict(held(tensors).made(hf7(tensors)))
    for layer in range(2):
        rows = [made.pop(f"model.layers.{layer}.attn.x_{letter}") for letter in "rwkvag"]
        made[f"model.layers.{layer}.attn.x_x"] = torch.cat([row.reshape(1, -1) for row in rows])
    write_tensors(tmp_path / "model.safetensors", made)
    same(store.read(tmp_path)[1], tensors)


def test_a_flat_bonus_takes_its_heads_from_a_foreign_config(tmp_path, tensors):
    made = dict(held(tensors).made(hf7(tensors)))
    flat = {name: value.flatten() if name.endswith("r_k") else value for name, value in made.items()}
    write_tensors(tmp_path / "model.safetensors", flat)
    for described in ({"head_dim": 32}, {"num_heads": 2}, {"head_size_a": 32}):
        (tmp_path / "config.json").write_text(json.dumps(described))
        same(store.read(tmp_path)[1], tensors)


@pytest.mark.parametrize(
    ("described", "said"), [({}, "0.00032"), ({"norm_eps": 2e-5}, None), ({"norm_eps": 1e-6}, "3.2e-05")]
)
def test_norms_that_were_trained_with_another_epsilon_are_told(tmp_path, tensors, caplog, described, said):
    write_tensors(tmp_path / "model.safetensors", held(tensors).made(hf7(tensors)))
    (tmp_path / "config.json").write_text(json.dumps(described))
    store.open_model(tmp_path)
    text = f"trained with epsilon {said} in the norm of heads, here it is 0.00064"
    assert [text in row.getMessage() for row in caplog.records] == ([True] if said else [])


def test_an_unknown_name_in_the_hugging_face_layout_is_named(tmp_path, tensors):
    made = dict(held(tensors).made(hf7(tensors)))
    for name in ("model.layers.0.attn.q_proj.weight", "model.rotary.weight"):
        write_tensors(tmp_path / "model.safetensors", made | {name: torch.ones(2)})
        with pytest.raises(WeightsError, match="unknown"):
            store.read(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_forward_module.", "model.", "_forward_module.model."])
def test_prefixes_go_from_the_front_alone(tmp_path, tensors, prefix):
    torch.save({prefix + name: value for name, value in tensors.items()}, tmp_path / "a.pth")
    same(store.read(tmp_path / "a.pth")[1], tensors)
    torch.save({f"{prefix}emb.weight": tensors["emb.weight"], **tensors}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"emb\.weight stands twice"):
        store.read(tmp_path / "a.pth")


def block(*names, **shapes):
    """Some tensors of a block, and an embedding."""
    found = {"emb.weight": (11, 64), "head.weight": (11, 64), **{f"blocks.0.{name}": (64, 64) for name in names}}
    found |= {f"blocks.0.att.{name}": shape for name, shape in shapes.items()}
    return {name: torch.zeros(shape) for name, shape in found.items()}


KEY, NORM, GATE = "att.key.weight", "att.ln_x.weight", "att.gate.weight"
OLD = {
    r"RWKV-4,": block(KEY, time_decay=(64,), time_first=(64,)),
    r"RWKV-5\.0,": block(KEY, NORM, time_decay=(2,)),
    r"RWKV-5\.1,": block(KEY, NORM, GATE, time_decay=(2,)),
    r"RWKV-5\.1, ": block(KEY, NORM, GATE, time_decay=(2, 1)),
    r"RWKV-6a": block(KEY, NORM, time_maa_x=(1, 1, 64), gate_w1=(64, 64)),
    r"RWKV-7a": block(KEY, "ffn.s_emb.weight", r_k=(2, 32)),
    r"RWKV-7b": block(KEY, "qkv.qq.weight", r_k=(2, 32)),
    r"an adapter": {"blocks.0.att.key.lora_A": torch.zeros(2, 64)},
    r"quantised": block(KEY, "att.key.qweight"),
    r"a transformer": {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)},
    r"a Mamba model": {"backbone.layers.0.mixer.A_log": torch.zeros(2)},
    r"no RWKV checkpoint \(it holds fc1\.weight": {"fc1.weight": torch.zeros(2)},
}


@pytest.mark.parametrize("said", OLD)
def test_what_cannot_be_used_is_named(tmp_path, said):
    torch.save(OLD[said], tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=f"this is {said}") as error:
        store.sizes(tmp_path / "a.pth")
    assert "\n" not in str(error.value) and str(tmp_path / "a.pth") in str(error.value)
