"""Learning rates and parameter groups are those of the references."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.train.optim import (
    RwkvLmSchedule,
    adamw,
    decay_at,
    lr_at,
    parameter_groups,
    rwkv_lm_lr,
    set_rate,
    whole_length,
)


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


def test_a_stage_takes_the_rates_and_decays_of_rwkv_lm_by_its_tokens_or_its_epochs(goldens):
    cases = json.loads((goldens / "rwkv/lr_schedule.json").read_text())["schedules"]
    met = set()
    for case in cases:
        given = {"lr_init": 6e-4, "lr_final": 6e-5, "warmup_steps": 10, "weight_decay": 0.001} | case["config"]
        exit_tokens = given.get("my_exit_tokens", 0)
        epochs = given.get("epoch_count", 100) * given.get("epoch_steps", 2520)
        far = {"tokens": abs(exit_tokens)} if exit_tokens else {"steps": epochs}
        far |= {"schedule": "rwkv" if exit_tokens > 0 else "rwkv_mean" if exit_tokens else "rwkv_exp"}
        far |= {} if exit_tokens > 0 else {"exp_steps": epochs}
        far |= {"begun": given.get("epoch_begin", 0) * given.get("epoch_steps", 2520)}
        names = {"lr": "lr_init", "lr_final": "lr_final", "warmup": "warmup_steps", "weight_decay": "weight_decay"}
        far |= {name: given[other] for name, other in names.items()}
        far |= {"weight_decay_final": given.get("weight_decay_final"), "ctx_len": 512, "batch": 16}
        config = whole_length(TrainConfig(**far), 0)
        for step, *wanted in case["rows"]:
            if "EXIT" in wanted:
                assert step >= config.steps
            else:
                assert lr_at(config, step) == pytest.approx(wanted[0], rel=1e-12, abs=0)
                assert decay_at(config, step) == pytest.approx(wanted[2], rel=1e-12, abs=0)
        met.add(case["name"])
    assert len(met) == len(cases) == 7


def test_a_decay_that_moves_reaches_the_groups_that_decay_alone():
    model = Names({"blocks.0.att.key.weight": (4, 4), "blocks.0.att.w0": (4,)})
    config = TrainConfig(steps=9, warmup=1, weight_decay=0.1, weight_decay_final=0.01, schedule="rwkv")
    optimizer = adamw(model, config)
    set_rate(optimizer, 1.0, decay_at(config, 8))
    found = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]}
    assert found == {"blocks.0.att.key.weight": decay_at(config, 8), "blocks.0.att.w0": 0.0}
    assert 0.01 <= decay_at(config, 8) < decay_at(config, 4) < 0.1


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"weight_decay_final": 0.01}, "weight_decay_final belongs to schedules rwkv, rwkv_exp and rwkv_mean"),
        ({"weight_decay_final": 0.01, "schedule": "rwkv", "weight_decay": 0}, "weight_decay_final belongs to"),
        ({"begun": 3}, "begun belongs to schedules rwkv, rwkv_exp and rwkv_mean"),
        ({"begun": 9, "schedule": "rwkv"}, "begun: 9 of 9 steps are made, and none is left"),
        ({"exp_steps": 30, "schedule": "rwkv"}, "exp_steps belongs to schedules rwkv_exp and rwkv_mean"),
        ({"exp_steps": 10, "schedule": "rwkv_mean"}, "exp_steps: 10 are over before the 10 of warmup"),
    ],
)
def test_what_would_say_nothing_of_a_schedule_is_refused(more, problem):
    with pytest.raises(ValueError, match=problem):
        TrainConfig(steps=9, **more)


def test_a_stage_that_was_begun_elsewhere_has_the_rest_of_the_steps():
    config = whole_length(TrainConfig(epochs=1.5, batch=4, begun=3, schedule="rwkv"), 20)
    assert config.steps == 8 - 3
    with pytest.raises(ConfigError, match="train.begun: 9 of 8 steps are made"):
        whole_length(TrainConfig(epochs=1.5, batch=4, begun=9, schedule="rwkv"), 20)


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


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd", "rwkv", "rwkv_exp", "rwkv_mean"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 40])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_every_schedule_starts_above_zero_and_never_leaves_its_bounds(schedule, warmup, steps):
    last = None if schedule == "constant" else 0.0
    config = TrainConfig(steps=steps, warmup=warmup, lr=1e-3, lr_final=last, schedule=schedule)
    rates = [lr_at(config, n) for n in range(steps)]
    assert rates[0] > 0
    assert all(0 <= rate <= 1e-3 for rate in rates)


@pytest.mark.parametrize("last", [None, 0.0, 0.001])
def test_until_it_falls_the_rate_of_wsd_is_that_of_constant_to_the_last_digit(last):
    longer = TrainConfig(steps=12, warmup=1, lr=0.01, lr_final=last, schedule="wsd", decay=0.5)
    shorter = TrainConfig(steps=6, warmup=1, lr=0.01, schedule="constant")
    assert [lr_at(longer, step) for step in range(6)] == [lr_at(shorter, step) for step in range(6)]


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


def test_weights_move_as_torch_moves_them_bit_for_bit_and_stay_without_a_gradient():
    stream, config = torch.Generator().manual_seed(0), TrainConfig(steps=9, weight_decay=0.1)
    given = {"blocks.0.att.w0": (1, 1, 4), "blocks.0.att.key.weight": (4, 5), "head.weight": (3, 4)}
    ours, theirs = Names(given), Names(given)
    optimizer, groups = adamw(ours, config), parameter_groups(theirs, config)
    other = torch.optim.AdamW(groups, betas=tuple(config.betas), eps=config.eps, fused=True)
    for step in range(5):
        set_rate(optimizer, 0.01 * (step + 1)), set_rate(other, 0.01 * (step + 1))
        for name in given:
            grad = torch.randn(given[name], generator=stream)
            for model in (ours, theirs):
                model.given[name].grad = None if name == "head.weight" and step < 2 else grad.clone()
        optimizer.step(), other.step()
    for name in given:
        assert torch.equal(ours.given[name], theirs.given[name])
        for kind, moment in other.state[theirs.given[name]].items():
            assert torch.equal(optimizer.state[ours.given[name]][kind], moment)


def test_training_does_not_import_the_compiler_of_torch():
    said = """
import sys, torch
from rwkvpipe.base.config import RwkvConfig, TrainConfig
from rwkvpipe.model.family import build
from rwkvpipe.train.optim import adamw
with torch.device("meta"):
    build(RwkvConfig(vocab_size=30, n_layer=2, n_embd=32, head_size=16))
model = build(RwkvConfig(vocab_size=30, n_layer=2, n_embd=32, head_size=16))
optimizer = adamw(model, TrainConfig(steps=1))
model(torch.arange(6).view(2, 3))[0].sum().backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
sys.exit("torch._dynamo" in sys.modules or "sympy" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", said], check=True)
