"""What a checkpoint is, from its names and shapes."""

import pytest
import torch

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.model.family import build, complete, detect

ODD = RwkvConfig(
    n_layer=3, n_embd=24, head_size=8, vocab_size=7, dim_ffn=40, d_decay=5, d_aaa=6, d_mv=3, d_gate=11
)


def test_sizes_come_from_shapes_alone():
    with torch.device("meta"):
        tensors = build(ODD).state_dict()
    assert detect(tensors) == ODD


def test_sizes_left_out_follow_the_references_rules():
    found = complete(RwkvConfig(n_layer=24, n_embd=2048, vocab_size=65536))
    assert (found.dim_ffn, found.d_decay, found.d_aaa, found.d_mv, found.d_gate) == (8192, 96, 96, 64, 256)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("blocks.0.att.time_maa_x", "RWKV-6"),
        ("blocks.0.att.gate.weight", "RWKV-5"),
        ("blocks.0.att.time_decay", "RWKV-4"),
        ("blocks.0.att.key.lora_A", "adapter"),
        ("model.layers.0.self_attn.q_proj.weight", "transformer"),
        ("conv1.weight", "no RWKV"),
    ],
)
def test_another_architecture_is_named(name, kind):
    with pytest.raises(WeightsError, match=kind):
        detect({"emb.weight": torch.zeros(3, 4), name: torch.zeros(4)})


def test_half_a_checkpoint_is_no_accident_of_python():
    with pytest.raises(WeightsError, match=r"ffn\.key"):
        detect({"emb.weight": torch.zeros(3, 4), "blocks.0.att.r_k": torch.zeros(2, 2)})
