"""Sizes belong to families, and those of released models have names."""

import pytest

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.base.sizes import PRESETS, claimed
from rwkvpipe.base.strict import check


def sizes(**given):
    return check(RwkvConfig, given, "config.yaml")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"family": "rwkv5", "d_decay": 64}, "d_decay does not belong to family rwkv5; it has none of its own"),
        ({"family": "rwkv5", "time_state": True}, "time_state does not belong to family rwkv5"),
        ({"family": "rwkv6", "d_gate": 64}, "d_gate does not belong to family rwkv6; .* d_mix, d_decay, time_state"),
        ({"d_mix": 32}, "d_mix does not belong to family rwkv7"),
        ({"family": "rwkv8"}, "family: .*'rwkv5', 'rwkv6' or 'rwkv7'.*got 'rwkv8'"),
        ({"n_embd": 100}, "n_embd 100 is not a multiple of head_size 64"),
        ({"preset": "rwkv7-0.2b"}, "there is no preset rwkv7-0.2b; did you mean rwkv7-7.2b|rwkv7-0.1b"),
        ({"preset": "gpt"}, "there is no preset gpt; known: rwkv5-0.1b, "),
        ({"preset": "rwkv7-0.1b", "family": "rwkv6"}, "preset rwkv7-0.1b is no model of family rwkv6"),
        ({"preset": 7}, "preset: .*string"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(given, said):
    with pytest.raises(ConfigError, match=said) as caught:
        sizes(**given)
    assert "\n" not in str(caught.value)


def test_a_preset_is_a_starting_point():
    assert sizes(preset="rwkv7-0.1b") == sizes(preset="0.1B") == sizes(preset="0.1b", family="rwkv7")
    assert sizes(preset="3b", family="rwkv6") == sizes(preset="rwkv6-3b") != sizes(preset="rwkv5-3b")
    found = sizes(preset="rwkv7-0.4b", n_layer=6, vocab_size=None)
    assert (found.n_layer, found.n_embd, found.vocab_size, found.d_gate) == (6, 1024, None, 128)


def test_settings_that_were_written_down_are_the_same_settings():
    for name in PRESETS:
        found = sizes(preset=name)
        assert sizes(**found.model_dump(mode="json")) == found


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("RWKV-5-World-0.4B-v2-20231113-ctx4096.pth", "rwkv5-0.4b"),
        ("RWKV-5-World-1B5-v2-20231025-ctx4096.pth", "rwkv5-1.5b"),
        ("RWKV-5-World-3B-v2-20231118-ctx16k.pth", "rwkv5-3b"),
        ("RWKV-5-World-7B-v2-20240128-ctx4096.pth", "rwkv5-7b"),
        ("RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth", "rwkv6-1.6b"),
        ("RWKV-x060-World-7B-v3-20241112-ctx4096.pth", "rwkv6-7b"),
        ("RWKV-x060-World-14B-v2.1-20240719-ctx4096.pth", "rwkv6-14b"),
        ("RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth", "rwkv7-0.1b"),
        ("RWKV-x070-World-2.9B-v3-20250211-ctx4096.pth", "rwkv7-2.9b"),
        ("rwkv7-g1-0.4b-20250722-ctx4096.pth", "rwkv7-0.4b"),
        ("rwkv7-g0a3-7.2b-20251029-ctx8192.pth", "rwkv7-7.2b"),
        ("rwkv7-g0b-13.3b-20251130-ctx8192.pth", "rwkv7-13.3b"),
        ("rwkv7-1.5b", "rwkv7-1.5b"),
        ("RWKV7-Goose-World2.8-0.1B-HF", "rwkv7-0.1b"),
        ("RWKV7-Goose-World3-2.9B-HF", "rwkv7-2.9b"),
        ("rwkv7-0.4B-g1", "rwkv7-0.4b"),
        ("rwkv-6-world-1b6", "rwkv6-1.6b"),
        ("rwkv-5-world-3b", "rwkv5-3b"),
        ("RWKV-v5-Eagle-World-7B-v2-20240128-ctx4096.pth", "rwkv5-7b"),
        ("v6-Finch-14B-HF", "rwkv6-14b"),
        ("v5-Eagle-7B-HF", "rwkv5-7b"),
        ("conv5-3b.pth", None),
        ("rwkv7a-g1b-0.1b-20250819-ctx4096.pth", None),
        ("rwkv7-g1-0.3b-20250722.pth", None),
        ("model.safetensors", None),
        ("rwkv-final.pth", None),
        ("RWKV-4-World-3B-v1.pth", None),
    ],
)
def test_a_file_s_name_may_speak_of_a_released_model(name, preset):
    assert claimed(name) == preset
