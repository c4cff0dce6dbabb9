"""What a checkpoint is, from its names and shapes."""

import resource

import pytest
import torch

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.base.sizes import PRESETS
from rwkvpipe.model.family import build, complete, detect, released

COMMON = {"n_layer": 3, "n_embd": 24, "head_size": 8, "vocab_size": 7, "dim_ffn": 40}
ODD = [
    RwkvConfig(**COMMON, d_decay=5, d_aaa=6, d_mv=3, d_gate=11),
    RwkvConfig(**COMMON, d_decay=5, d_aaa=6, d_mv=3, d_gate=11, time_state=True),
    RwkvConfig(**COMMON, family="rwkv6", d_mix=5, d_decay=3),
    RwkvConfig(**COMMON, family="rwkv6", d_mix=5, d_decay=3, time_state=True),
    RwkvConfig(**COMMON, family="rwkv5"),
]
# numbers of the released models, without those of layer 0 of RWKV-7 that nothing reads
PUBLISHED = {
    "rwkv7-0.1b": 191_034_624,
    "rwkv7-0.4b": 450_767_872,
    "rwkv7-1.5b": 1_527_404_544,
    "rwkv7-2.9b": 2_947_735_040,
    "rwkv7-7.2b": 7_199_141_888,
    "rwkv7-13.3b": 13_269_245_952,
}
ROUNDED = {
    **{
        "rwkv5-0.4b": "4.617e+08",
        "rwkv5-1.5b": "1.578e+09",
        "rwkv5-3b": "3.063e+09",
        "rwkv5-7b": "7.518e+09",
        "rwkv6-1.6b": "1.600e+09",
    },
    **{"rwkv6-3b": "3.100e+09", "rwkv6-7b": "7.636e+09", "rwkv6-14b": "1.407e+10"},
}


def skeleton(config):
    """A model without numbers."""
    with torch.device("meta"):
        return build(config)


@pytest.mark.parametrize("config", ODD)
def test_sizes_come_from_shapes_alone(config):
    assert detect(skeleton(config).state_dict()) == config


def test_sizes_left_out_follow_the_references_rules():
    found = complete(RwkvConfig(n_layer=24, n_embd=2048, vocab_size=65536))
    assert (found.dim_ffn, found.d_decay, found.d_aaa, found.d_mv, found.d_gate) == (8192, 96, 96, 64, 256)
    found = complete(RwkvConfig(family="rwkv6", n_embd=2560, vocab_size=65536))
    assert (found.dim_ffn, found.d_mix, found.d_decay) == (8960, 32, 64)
    assert complete(RwkvConfig(family="rwkv5", n_embd=768, vocab_size=65536)).dim_ffn == 2688


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_numbers_of_parameters(name):
    count = sum(value.numel() for value in skeleton(RwkvConfig(preset=name)).parameters())
    if name in PUBLISHED:
        assert count == PUBLISHED[name]
    D, L = PRESETS[name]["n_embd"], PRESETS[name]["n_layer"]
    F, M, W = int(3.5 * D) // 32 * 32, PRESETS[name].get("d_mix", 0), PRESETS[name].get("d_decay", 0)
    if name.startswith("rwkv5"):
        assert count == 2 * 65536 * D + 4 * D + L * (5 * D * D + 8 * D + 2 * D * F + D * D + 6 * D)
    if name.startswith("rwkv6"):
        mixes = 6 * D + 10 * M * D + D + 2 * W * D + D + 2 * D
        assert count == 2 * 65536 * D + 4 * D + L * (5 * D * D + mixes + 2 * D * F + D * D + 6 * D)
    if name in ROUNDED:
        assert f"{count:.3e}" == ROUNDED[name]


def test_the_skeleton_of_the_largest_model_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = skeleton(RwkvConfig(preset="rwkv7-13.3b"))
    model.initialise(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
    assert len(model.blocks) == 61


def test_released_sizes_are_known_by_their_name():
    for name in PRESETS:
        assert released(RwkvConfig(preset=name)) == name
    assert released(RwkvConfig(preset="rwkv7-0.1b", time_state=True)) == "rwkv7-0.1b"
    assert released(RwkvConfig(preset="rwkv7-0.1b", n_layer=11)) is None


@pytest.mark.parametrize(
    "name, kind",
    [
        ("blocks.0.att.time_maa_rkvw_w1", "x060b"),
        ("blocks.0.att.time_maa_x", "a part of an RWKV-6"),
        ("blocks.1.att.r_k", "a part of an RWKV-7"),
        ("blocks.0.att.gate.weight", "RWKV-5.1"),
        ("blocks.0.att.ln_x.weight", "RWKV-5.0"),
        ("blocks.0.att.time_decay", "RWKV-4"),
        ("blocks.0.att.key.lora_A", "adapter"),
        ("model.layers.0.self_attn.q_proj.weight", "transformer"),
        ("conv1.weight", "no RWKV"),
    ],
)
def test_another_architecture_is_named(name, kind):
    with pytest.raises(WeightsError, match=kind):
        detect({"emb.weight": torch.zeros(3, 4), name: torch.zeros(4)})


MARKS = [
    {"blocks.0.att.r_k": torch.zeros(2, 2)},
    {"blocks.0.att.time_maa_w1": torch.zeros(2, 2)},
    {"blocks.0.att.time_decay": torch.zeros(2, 2), "blocks.0.att.gate.weight": torch.zeros(2, 2)},
]


@pytest.mark.parametrize("marks", MARKS)
def test_a_model_without_its_embedding_is_of_no_older_version(marks):
    with pytest.raises(WeightsError, match=r"^emb\.weight is missing"):
        detect({"blocks.0.att.key.weight": torch.zeros(2, 2), "blocks.0.att.ln_x.weight": torch.zeros(2), **marks})


@pytest.mark.parametrize("marks", MARKS)
def test_half_a_checkpoint_is_no_accident_of_python(marks):
    with pytest.raises(WeightsError, match=r"ffn\.key|time_faaaa"):
        detect({"emb.weight": torch.zeros(3, 4), **marks})


@pytest.mark.parametrize("family", ["rwkv5", "rwkv6"])
def test_the_narrowest_model_has_a_channel_mix(family):
    config = complete(RwkvConfig(family=family, n_layer=2, n_embd=8, head_size=8, vocab_size=7))
    assert config.dim_ffn == 32
    assert detect(build(config).state_dict()) == config


def test_sizes_that_no_model_has_are_named_in_one_line():
    tensors = build(complete(RwkvConfig(family="rwkv5", n_layer=2, n_embd=8, head_size=8, vocab_size=7))).state_dict()
    tensors |= {name: torch.zeros(0, 8) for name in tensors if name.endswith("ffn.key.weight")}
    with pytest.raises(WeightsError, match="dim_ffn") as caught:
        detect(tensors)
    assert "\n" not in str(caught.value)
