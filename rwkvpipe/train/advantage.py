"""How much better each completion is than others of its prompt: what GRPO multiplies log-probabilities by.

Formulas as in TRL's GRPOTrainer (https://github.com/huggingface/trl), whose defaults these are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvpipe.base.errors import ConfigError

TINY = 1e-4  # added to what is divided by


def _deviation(values: Tensor, known: Tensor, dim: int) -> Tensor:
    """Sample deviation over the known values; 0 where fewer than two are known."""
    count = known.sum(dim, keepdim=True)
    mean = values.sum(dim, keepdim=True) / count.clamp(min=1)
    square = ((values - mean) * known).square().sum(dim, keepdim=True)
    return (square / (count - 1).clamp(min=1)).sqrt()


def _centred(rows: Tensor) -> Tensor:
    """Rows (groups, group, ...) less the mean of their group; exactly 0 where all are equal, and for NaN."""
    known = ~rows.isnan()
    mean = torch.where(known, rows, 0.0).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    highest = rows.masked_fill(~known, -torch.inf).amax(1, keepdim=True)
    lowest = rows.masked_fill(~known, torch.inf).amin(1, keepdim=True)
    return torch.where(known & (highest > lowest), rows - mean, 0.0)


@dataclass(frozen=True)
class Bounds:
    """What is done to advantages when they are made, in any scale: first the clip, then what weak groups count."""

    clip: float | None = None
    """Their largest size."""
    low: float | None = None
    """A group whose best reward is below it counts `share`."""
    share: float = 1.0


def normalised(grades: Tensor, weights: Sequence[float], group: int) -> Tensor:
    """Rewards one by one (N, F), NaN where one has nothing to say, each divided by its deviation in its group, then
    weighted and summed: (N,) fp64, of mean 0 in every group (GDPO, arXiv 2601.05242)."""
    rows = grades.detach().double().view(-1, group, grades.shape[1])  # (groups, group, F)
    known = ~rows.isnan()
    each = _centred(rows) / (_deviation(torch.where(known, rows, 0.0), known, 1) + TINY)
    return (each * torch.tensor(list(weights), dtype=torch.float64)).sum(2).flatten()


def advantages(
    rewards: Tensor | Sequence[float],
    group: int,
    scale: str = "group",
    *,
    bounds: Bounds | None = None,
    apart: Tensor | None = None,
) -> Tensor:
    """How much better each completion is than its group: (N,) fp64 from rewards (N,), groups of `group` in a row.

    r minus the group's mean, divided by (deviation + 1e-4) of the group, of the batch, or by nothing (`none`).
    A group whose rewards are all equal gets exactly 0. NaN rewards get 0 and count in no mean and no deviation.
    `apart`, what `normalised` gave, stands in the place of r minus the mean; it is divided by that of the batch.
    """
    bounds = bounds or Bounds()
    rewards = torch.as_tensor(rewards, dtype=torch.float64).detach()
    if group < 1 or len(rewards) % group:
        raise ConfigError(f"rollout.samples: {len(rewards)} rewards do not make groups of {group}")
    if scale not in ("group", "batch", "none"):
        raise ConfigError(f"rollout.scale: {scale!r} is none of group, batch, none")
    rows = rewards.view(-1, group)  # (groups, group)
    known = ~rows.isnan()
    values = torch.where(known, rows, 0.0)
    if apart is not None:
        values = torch.where(known, apart.view_as(rows), 0.0)
        centred = values / (_deviation(values.flatten(), known.flatten(), 0) + TINY)
    elif scale == "group":
        centred = _centred(rows) / (_deviation(values, known, 1) + TINY)
    elif scale == "batch":
        centred = _centred(rows) / (_deviation(values.flatten(), known.flatten(), 0) + TINY)
    else:
        centred = _centred(rows)
    if bounds.clip is not None:
        centred = centred.clamp(-bounds.clip, bounds.clip)
    if bounds.low is not None:
        highest = rows.masked_fill(~known, -torch.inf).amax(1, keepdim=True)
        centred = torch.where(highest < bounds.low, bounds.share * centred, centred)
    return centred.flatten()
