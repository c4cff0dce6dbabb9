"""GRPO's losses against their formulas in complex numbers, token by token: values, and gradients without autograd.

A function of real numbers has its derivative in the imaginary part of f(x + ih) / h, to the last digit. What has no
gradient, and which side of a clip holds, is read from real parts.
"""

import cmath
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rwkvpipe.base.config import RolloutConfig, SamplingConfig
from rwkvpipe.train import policy
from rwkvpipe.train.policy import Rollout, grpo_losses

H = 1e-30
LONGEST, PART = 5, 2
ROWS, WIDTH = 6, 3


def data():
    """A step of six completions: one of no token, tokens of unlike weight, gains of both signs and none."""
    stream = torch.Generator().manual_seed(11)
    old, reference = (0.4 * torch.randn(ROWS, WIDTH, generator=stream, dtype=torch.float64) - 2 for _ in range(2))
    new = old + 0.5 * torch.randn(ROWS, WIDTH, generator=stream, dtype=torch.float64)
    sure = torch.rand(ROWS, WIDTH, generator=stream, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0], [0.5, 2, 0], [1, 0, 1], [1, 0, 0]], dtype=torch.float64)
    gain = torch.tensor([0.9, -1.3, 0.4, -0.6, 0.0, 1.1], dtype=torch.float64)
    taught = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.float64)
    held = torch.tensor([1, 1, 0, 0, 1, 1], dtype=torch.float64)
    return SimpleNamespace(old=old, new=new, ref=reference, sure=sure, mask=mask, gain=gain, taught=taught, held=held)


def cost(c, ratio, gain, whole, new):
    """What a token costs without divergence; `whole` is the product of its completion's ratios."""
    low, high = 1 - (c.epsilon or 0.2), 1 + (c.epsilon_high or c.epsilon or 0.2)
    if c.loss == "sapo":
        tau = (c.soft or (1.0, 1.05))[0 if gain > 0 else 1]
        return -gain * (4 / tau) / (1 + cmath.exp(-tau * (ratio - 1)))
    if c.loss == "vespo":
        k, tilt = (c.gamma or (2, 3, 3, 2))[slice(0, 2) if gain >= 0 else slice(2, 4)]
        return -gain * whole**k * math.exp(tilt * (1 - whole)) * new
    if c.loss == "cispo":
        return -gain * min(max(ratio.real, low), high) * new
    first = c.delta if c.delta is not None and ratio.real > c.delta else ratio
    second = low if ratio.real < low else high if ratio.real > high else ratio
    return -gain * (first if (first * gain).real <= (second * gain).real else second)


def row_cost(c, d, i, new, extra):
    """The sum of what the tokens of a completion cost, and the sum of their weights."""
    weights = d.mask[i].tolist()
    shifts = [new[t] - d.old[i, t].item() for t in range(WIDTH)]
    count = sum(weights)
    mean = sum(w * s for w, s in zip(weights, shifts, strict=True)) / max(count, 1)
    whole = math.exp(min(max(sum(w * s.real for w, s in zip(weights, shifts, strict=True)), math.log(1e-8)), 20))
    gain, total = d.gain[i].item(), 0j
    for t, weight in enumerate(weights):
        if not weight:
            continue
        ratio = cmath.exp(mean if c.level == "sequence" else shifts[t])
        value = cost(c, ratio, gain, whole, new[t])
        if c.off_policy is not None and gain < 0 and -mean.real > c.off_policy:
            value = 0j
        if extra:
            value *= d.taught[i, t].item()
        if c.beta:
            apart = d.ref[i, t].item() - new[t]
            divergence = {"k1": -apart, "k2": apart * apart / 2, "k3": cmath.exp(apart) - apart - 1}[c.kl]
            divergence *= ratio if c.kl_ratio else 1
            value += c.beta * divergence * (d.held[i].item() if extra else 1)
        total += weight * value
    return total, count


def wanted(c, d, new, extra):
    """The loss of a step."""
    each = [row_cost(c, d, i, new[i], extra) for i in range(ROWS)]
    tokens = sum(count for _, count in each)
    if c.loss in ("grpo", "sapo"):
        found = sum(total / max(count, 1) for total, count in each) / ROWS
    elif c.loss == "bnpo":
        parts = [each[first : first + PART] for first in range(0, ROWS, PART)]
        found = sum(sum(t for t, _ in part) / max(sum(n for _, n in part), 1) for part in parts) / len(parts)
    elif c.loss == "dr_grpo":
        found = sum(total for total, _ in each) / (ROWS * LONGEST)
    elif c.loss == "luspo":
        found = sum(total for total, _ in each) / ROWS
    else:
        found = sum(total for total, _ in each) / max(tokens, 1)
    counts = d.mask * d.taught if extra else d.mask
    return found - c.entropy * float((d.sure * counts).sum() / max(counts.sum(), 1)) if c.entropy else found


class Told(nn.Module):
    """A model that is the log-probabilities it gives; a row's ids begin with its number."""

    def __init__(self, d):
        super().__init__()
        self.new, self.sure = nn.Parameter(d.new.clone()), nn.Parameter(d.sure.clone())


def looked_up(model, part, temperature, precision, told):
    rows, width = part.ids[:, 0], part.mask.shape[1]
    if told is not None:
        told.append(model.sure[rows, :width])
    return model.new[rows, :width]


def settings(loss, level):
    """Every combination that is allowed for a loss at a level, and a bonus of entropy in some."""
    own = {"sapo": [{}, {"soft": (0.7, 2.0)}], "vespo": [{}, {"gamma": (1.5, 1.0, 2.5, 0.5)}]}
    own["bnpo"] = [{"part": PART}]
    clips = [{}, {"epsilon": 0.1, "epsilon_high": 0.35}, {"delta": 1.3}, {"epsilon_high": 0.1, "delta": 1.6}]
    if loss in ("sapo", "vespo"):
        clips = [{}]
    elif loss == "cispo":
        clips = clips[:2]
    kinds = [{}] + [{"beta": 0.3, "kl": kl, "kl_ratio": r} for kl in ("k1", "k2", "k3") for r in (False, True)]
    bounds = [{}, {"off_policy": 0.15}]
    for number, parts in enumerate(itertools.product(own.get(loss, [{}]), clips, kinds, bounds)):
        asked = {key: value for part in parts for key, value in part.items()}
        bonus = {"entropy": 0.2} if number % 3 == 0 else {}
        sampling = SamplingConfig(max_tokens=LONGEST)
        yield number, RolloutConfig(loss=loss, level=level, sampling=sampling, **asked, **bonus)


LOSSES = [
    (loss, level)
    for loss in ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
    for level in {"luspo": ["sequence"], "vespo": ["token"]}.get(loss, ["token", "sequence"])
]


@pytest.mark.parametrize("loss, level", LOSSES)
def test_every_combination_is_its_formula_in_value_and_gradient(monkeypatch, loss, level):
    monkeypatch.setattr(policy, "completion_logprobs", looked_up)
    d, seen = data(), set()
    ids = torch.arange(ROWS)[:, None].repeat(1, WIDTH + 1)
    plain = d.new.tolist()
    for number, config in settings(loss, level):
        extra = bool(number // 2 % 2)
        more = {"taught": d.taught, "held": d.held} if extra else {}
        more |= {"reference": d.ref} if config.beta else {}
        rollout = Rollout(ids, torch.ones(ROWS, dtype=torch.long), d.mask, d.gain, d.old, **more)
        model = Told(d)
        found = sum(grpo_losses(config, (1, 2, 4, 6)[number // 3 % 4])(model, rollout))
        found.backward()
        said = str(config.model_dump(exclude_defaults=True))
        assert found.item() == pytest.approx(wanted(config, d, plain, extra).real, abs=1e-13), said
        for i in range(ROWS):
            for t in range(WIDTH):
                moved = [list(row) for row in plain]
                moved[i][t] += 1j * H
                slope = wanted(config, d, moved, extra).imag / H
                assert model.new.grad[i, t].item() == pytest.approx(slope, abs=1e-12), (said, i, t)
        if config.entropy:
            counts = d.mask * d.taught if extra else d.mask
            torch.testing.assert_close(model.sure.grad, -config.entropy * counts / counts.sum(), atol=1e-13, rtol=0)
        seen.add(round(found.item(), 9))
    assert len(seen) > 5
