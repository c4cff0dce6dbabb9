"""Learning rates and parameter groups are those of the references."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.train.optim import RwkvLmSchedule, adamw, lr_at, parameter_groups, rwkv_lm_lr, set_rate


def test_the_rate_of_rwkv_lm_is_met_to_twelve_digits(goldens):
    for case in json.loads((goldens / "rwkv/lr_schedule.json").read_text())["schedules"]:
        given = {"lr_init": 6e-4, "lr_final": 6e-5, "ctx_len": 512, "real_bsz": 16, "weight_decay": 0.001}
        given |= {"warmup_steps": 10, "epoch_count": 100, "epoch_steps": 2520} | case["config"]
        schedule = RwkvLmSchedule(
            given["lr_init"],
            given["lr_final"],
            given["warmup_steps"],
            given["ctx_len"] * given["real_bsz"],
            given.get("my_exit_tokens", 0),
            given.get("epoch_begin", 0),
            given["epoch_steps"],
            given["epoch_count"],
            given.get("my_pile_edecay", 0),
            given["weight_decay"],
            given.get("weight_decay_final", 0),
        )
        for row in case["rows"]:
            found = rwkv_lm_lr(schedule, row[0])
            if "EXIT" in row:
                assert found is None
            else:
                assert found[0] == pytest.approx(row[1], rel=1e-12, abs=0)
                assert 2 * found[0] == pytest.approx(row[2], rel=1e-12, abs=0)
                assert found[1] == pytest.approx(row[3], rel=1e-12, abs=0)


def test_the_cosine_of_fine_tuning_is_met(goldens):
    for case in json.loads((goldens / "tune/lr_schedule.json").read_text()):
        config = TrainConfig(
            steps=case["total_steps"], warmup=case["warmup_steps"], lr=case["lr_init"], lr_final=case["lr_final"]
        )
        for number, rate in zip(case["steps"], case["lr"], strict=True):
            assert lr_at(config, number - 1) == pytest.approx(rate, rel=1e-9)


def test_the_rwkv_schedule_is_the_one_of_its_exit_tokens(goldens):
    data = np.load(goldens / "rwkv/train_x070.npz", allow_pickle=False)
    meta = json.loads(str(data["meta"]))
    steps = meta["exit_tokens"] // (meta["ctx_len"] * meta["bsz"])
    config = TrainConfig(
        steps=steps, warmup=meta["warmup"], lr=meta["lr_init"], lr_final=meta["lr_final"], schedule="rwkv"
    )
    np.testing.assert_allclose([lr_at(config, n) for n in range(8)], data["lr"], rtol=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd", "rwkv"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 40])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_every_schedule_starts_above_zero_and_never_leaves_its_bounds(schedule, warmup, steps):
    config = TrainConfig(steps=steps, warmup=warmup, lr=1e-3, lr_final=0.0, schedule=schedule)
    rates = [lr_at(config, n) for n in range(steps)]
    assert rates[0] > 0
    assert all(0 <= rate <= 1e-3 for rate in rates)


def test_wsd_stays_and_then_falls_linearly():
    config = TrainConfig(steps=100, warmup=10, lr=1.0, lr_final=0.0, schedule="wsd", decay=0.2)
    rates = [lr_at(config, n) for n in range(100)]
    assert set(rates[9:80]) == {1.0}
    np.testing.assert_allclose(rates[80:], np.arange(19, -1, -1) / 20, atol=1e-12)


class Names(nn.Module):
    """Parameters under given names and shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        self.given = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}

    def named_parameters(self, *args, **kwargs):
        return iter(self.given.items())


@pytest.mark.parametrize("family", ["x052", "x060", "x070"])
def test_groups_are_those_of_rwkv_lm(goldens, family):
    rules = np.load(goldens / f"rwkv/train_{family}.npz", allow_pickle=False)
    weights = np.load(goldens / f"rwkv/model_{family}_b.npz", allow_pickle=False)
    model = Names({k[2:]: weights[k].shape for k in weights.files if k.startswith("w/")})
    found = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(model, TrainConfig(steps=1, weight_decay=0.1))
        for name in group["names"]
    }
    wanted = {k[6:]: tuple(rules[k]) for k in rules.files if k.startswith("group/")}
    assert found == wanted


def test_initial_states_decay_and_move_at_the_plain_rate():
    model = Names({"blocks.0.att.time_state": (2, 4, 4), "blocks.0.att.time_decay_w2": (4, 4)})
    groups = parameter_groups(model, TrainConfig(steps=1, weight_decay=0.1))
    found = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert found == {"blocks.0.att.time_state": (1.0, 0.1), "blocks.0.att.time_decay_w2": (1.0, 0.0)}


def test_a_frozen_tensor_is_in_no_group_and_rates_follow_their_scale():
    model = Names({"blocks.0.att.w0": (1, 1, 4), "blocks.0.att.key.weight": (4, 4), "head.weight": (4, 4)})
    model.given["head.weight"].requires_grad_(False)
    optimizer = adamw(model, TrainConfig(steps=1))
    assert sorted(n for g in optimizer.param_groups for n in g["names"]) == [
        "blocks.0.att.key.weight",
        "blocks.0.att.w0",
    ]
    set_rate(optimizer, 0.5)
    assert {g["lr_scale"]: g["lr"] for g in optimizer.param_groups} == {2.0: 1.0, 1.0: 0.5}
