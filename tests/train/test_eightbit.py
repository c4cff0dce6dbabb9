"""Moments of eight bits are made, kept and gone on from as others are, and refused where they cannot be had."""

import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from rwkvpipe import pretrain
from rwkvpipe.base.config import Settings, TrainConfig
from rwkvpipe.base.errors import ConfigError, Stopped
from rwkvpipe.base.files import write_json
from rwkvpipe.train.eightbit import check_optimizer
from rwkvpipe.train.loop import Hooks, Run, fit
from rwkvpipe.train.optim import adamw

CONFIG = TrainConfig(steps=6, warmup=2, lr=0.01, eps=1e-8, log_every=1, optimizer="adamw8bit")


class Plain:
    """What is used of the library's optimizer, with one moment of eight bits."""

    def __init__(self, groups, betas, eps):
        self.param_groups, self.betas, self.eps, self.state = groups, betas, eps, defaultdict(dict)

    def init_state(self, group, value, number, place):
        assert self.param_groups[number] is group and group["params"][place] is value
        zeros = torch.zeros_like(value, dtype=torch.uint8)
        self.state[value] = {"step": 0, "state1": zeros, "absmax1": torch.ones(1)}

    def step(self):
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is None:
                    continue
                state = self.state[value]
                state["step"] += 1
                moment = self.betas[0] * state["state1"] / 255 * state["absmax1"] + value.grad.abs()
                state["absmax1"] = moment.max().reshape(1)
                state["state1"] = (moment / state["absmax1"] * 255).round().to(torch.uint8)
                value *= 1 - group["lr"] * group["weight_decay"]
                value -= group["lr"] / state["step"] * value.grad / (moment + self.eps)


def library(optimizer):
    found = ModuleType("bitsandbytes")
    found.optim = SimpleNamespace(AdamW8bit=optimizer)
    return found


@pytest.fixture(params=["stub", "bitsandbytes"])
def given(request, monkeypatch):
    """The library, or a stub in its place."""
    if request.param == "stub":
        monkeypatch.setitem(sys.modules, "bitsandbytes", library(Plain))
    else:
        pytest.importorskip("bitsandbytes", reason="the library is not installed")


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.frozen = nn.Linear(80, 64), nn.Linear(64, 64).requires_grad_(False)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        return self.frozen(self.body(x))


def run(folder, stop_at=None):
    def batches(step, carried):
        while step != stop_at:
            x = torch.randn(6, 80, generator=torch.Generator().manual_seed(step))
            yield SimpleNamespace(x=x, targets=torch.ones(6, dtype=torch.long))
            step += 1
        raise KeyboardInterrupt

    def losses(model, batch):
        yield model(batch.x).square().mean()

    model = Toy()
    fit(model, batches, losses, config=CONFIG, run=Run(folder, "mark", 9, 7), hooks=Hooks())
    return model.state_dict()


def test_a_killed_run_ends_in_the_same_weights(given, tmp_path):
    whole, begun = run(tmp_path / "whole"), Toy().state_dict()
    for at in (1, 4):
        with pytest.raises(Stopped):
            run(tmp_path / f"cut{at}", at)
        again = run(tmp_path / f"cut{at}")
        for name, value in whole.items():
            assert torch.equal(value, again[name]), name
            assert torch.equal(value, begun[name]) == (not name.startswith("body")), name


def test_moments_take_a_byte_a_number_and_each_group_its_rate(given):
    model = nn.ModuleDict({"att": nn.Linear(80, 64)})
    model.att.register_parameter("w0", nn.Parameter(torch.zeros(5)))
    optimizer = adamw(model, CONFIG)
    rules = {
        name: (group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups for name in group["names"]
    }
    assert rules == {"att.weight": (1.0, 0.001), "att.bias": (1.0, 0.0), "att.w0": (2.0, 0.0)}
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    kept = optimizer.state[model.att.weight]
    assert kept["state1"].dtype == torch.uint8 and kept["state1"].shape == (64, 80)
    assert all(isinstance(part, torch.Tensor) for part in kept.values()) and int(kept["step"]) == 1


def test_it_follows_adam_of_32_bits():
    pytest.importorskip("bitsandbytes", reason="the library is not installed")
    found = []
    for name in ("adamw", "adamw8bit"):
        model = Toy()
        optimizer = adamw(model, CONFIG.model_copy(update={"optimizer": name}))
        for step in range(20):
            x = torch.randn(6, 80, generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        found.append(model.body.weight.detach() - Toy().body.weight.detach())
    assert (found[0] - found[1]).norm() < 0.1 * found[0].norm()


def broken(error):
    class Broken(Plain):
        def step(self):
            if error is not None:
                raise error

    return library(Broken)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (None, r"needs the library bitsandbytes, which is not installed \(pip install bitsandbytes\); or choose adamw"),
        (broken(NotImplementedError("no\nkernel")), "bitsandbytes cannot do it on cpu: no kernel; choose adamw"),
        (broken(None), "bitsandbytes moves nothing on cpu"),
    ],
)
def test_what_a_machine_cannot_do_is_told_in_one_line_before_anything_is_read(tmp_path, monkeypatch, module, said):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    asked = Settings(kind="pretrain", seed=1, train=CONFIG)
    write_json(tmp_path / "settings.json", asked.model_dump(mode="json"))
    words = ["--model", "absent", "--data", "absent", "--out", str(tmp_path / "model.safetensors")]
    with pytest.raises(ConfigError, match=f"^train.optimizer: adamw8bit:? {said}") as told:
        pretrain.main([str(tmp_path / "settings.json"), *words])
    assert "\n" not in str(told.value)


def test_moments_of_eight_bits_are_not_cut_among_processes():
    with pytest.raises(ConfigError, match="memory.shard"):
        check_optimizer(CONFIG, torch.device("cpu"), "weights")
    check_optimizer(TrainConfig(steps=1), torch.device("cpu"), "weights")
