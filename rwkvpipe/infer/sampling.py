"""Logits to next ids, row by row.

Order `hf` is that of transformers and vLLM, order `rwkv` that of RWKV's demo sampler (RWKV-LM, `sample_logits`).

Chances are whole numbers, 2^40 for the likeliest id: sums of them are exact in any order, so that this form and the
native one (`cuda/sample_cpu.cpp`) choose the same ids. All that is rounded is an exponential in fp64, by the same
operations in the same order on both sides.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rwkvpipe.base.config import SamplingConfig

UNIT = 40
LEAST = -UNIT - 2  # what is lighter than 2^-42 of the likeliest weighs nothing
COLDEST = 2.0**-100  # of temperatures above 0: logits over it are still numbers in fp32
LOG2E = 1.4426950408889634
# of 2^f, |f| <= 1/2, the highest first: 3e-9 of the value
POWERS = (
    0.00015461444551858103,
    0.0013400428177950461,
    0.009618056679025936,
    0.05550327226668492,
    0.24022650922284594,
    0.6931472067028341,
    1.0,
)


def _columns(ids: Sequence[int], logits: Tensor) -> Tensor:
    """Those ids that the model has, as an index of columns."""
    known = [i for i in ids if 0 <= i < logits.shape[-1]]
    return torch.tensor(known, dtype=torch.long, device=logits.device)


def _places(mask: Tensor) -> tuple[Tensor, ...]:
    """Row and column of what is true."""
    if mask.device.type == "cpu":
        return tuple(map(torch.from_numpy, np.divmod(np.flatnonzero(mask.numpy()), mask.shape[1])))
    return mask.nonzero(as_tuple=True)


def penalise(logits: Tensor, counts: Tensor | None, config: SamplingConfig, *, seen: Tensor | None = None) -> Tensor:
    """Penalties (but for `spare`), then `bias`, then `ban`: logits (R, V) of what may come next.

    counts (R, V) says how often each id was generated (`decay` makes it less), seen (R, V) bool which ids occurred
    at all, prompt included, those that `counts` counts among them; without it, those alone. `repetition_penalty` goes
    by seen, `presence` and `frequency` by counts.
    """
    if counts is not None:
        spots = _places(counts > 0 if seen is None else seen)
        plain, times = logits[spots], counts[spots].to(logits)
        values = plain
        if config.repetition_penalty != 1.0:
            p = config.repetition_penalty
            values = torch.where(values > 0, values / p, values * p)
        if config.presence or config.frequency:
            values = values - (times > 0).to(logits) * config.presence - times * config.frequency
        if config.spare:
            values = torch.where(torch.isin(spots[1], _columns(config.spare, logits)), plain, values)
        logits = logits.index_put(spots, values)
    if config.bias:
        spots = _columns(list(config.bias), logits)
        values = torch.tensor([config.bias[i] for i in spots.tolist()], dtype=logits.dtype, device=logits.device)
        logits = logits.index_add(1, spots, values.expand(len(logits), -1))
    if config.ban:
        logits = logits.index_fill(1, _columns(config.ban, logits), -torch.inf)
    return logits


def inverse(config: SamplingConfig) -> float:
    """1 / temperature."""
    return 1 / max(config.temperature, COLDEST)


def weigh(powers: Tensor) -> Tensor:
    """2^(x + UNIT), rounded to whole, of fp64 up to about 0."""
    powers = powers.clamp(min=LEAST)
    whole = powers.round()
    rest, found = powers - whole, torch.full_like(powers, POWERS[0])
    for factor in POWERS[1:]:
        found.mul_(rest).add_(factor)
    scale = (whole.long() + (1023 + UNIT) << 52).view(torch.float64)  # 2^whole, exactly
    return (found * scale).round().long()


def log2(number: Tensor) -> Tensor:
    """log2 of whole numbers above 0."""
    part, power = torch.frexp(number.double())
    s = (part - 1) / (part + 1)
    square, found = s * s, torch.zeros_like(s)
    for k in range(17, -1, -1):
        found = found * square + 1 / (2 * k + 1)
    return power + 2 * s * found * LOG2E


def descending(values: Tensor) -> Tensor:
    """The values of each row, the largest first."""
    if values.device.type == "cpu":  # numpy's takes a fifteenth of the time of PyTorch's
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)[:, ::-1].copy())
    return values.sort(dim=-1, descending=True).values


def largest(values: Tensor, ordered: Tensor, count: Tensor) -> Tensor:
    """Where the `count` (R, 1) largest values of each row are, of equal ones the first; `ordered` as `descending`."""
    cut = ordered.gather(-1, count - 1)
    kept = values >= cut
    over = kept.sum(-1, keepdim=True) - count
    if bool(over.any()):
        ties = values == cut
        kept = kept & (~ties | (ties.cumsum(-1) <= ties.sum(-1, keepdim=True) - over))
    return kept


def _goal(whole: Tensor, top_p: float) -> Tensor:
    """What is to be reached of weights that are so much together, at least 1."""
    return torch.minimum((whole.double() * top_p).ceil().long(), whole).clamp(min=1)


def _hf(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Weights (R, V): temperature, then the cuts.

    Values from the k-th largest on stay; of what is left, the shortest descending prefix whose probability reaches
    top_p (one id at least; among equals the lower id comes first). top_k 0 and top_p 1 cut nothing.
    """
    if 0 < config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    top, scale = logits.double().amax(-1, keepdim=True), LOG2E * inverse(config)
    weights = weigh((logits.double() - top) * scale)
    if config.top_p < 1.0:
        goal, ordered = _goal(weights.sum(-1, keepdim=True), config.top_p), descending(logits)
        mass = weigh((ordered.double() - top) * scale)
        before = mass.cumsum(-1) - mass  # what the likelier ones hold together
        weights = weights * largest(logits, ordered, (before < goal).sum(-1, keepdim=True).clamp(min=1))
    return weights


def _rwkv(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Weights (R, V) in the demo sampler's order: cuts first, temperature last."""
    V = logits.shape[-1]
    values = logits.double()
    top = values.amax(-1, keepdim=True)
    weights, kept, ordered = weigh((values - top) * LOG2E), logits > -torch.inf, descending(logits)
    if 0 < config.top_k < V:
        kept = kept & largest(logits, ordered, torch.full_like(ordered[:, :1], config.top_k, dtype=torch.long))
    if config.top_p < 1.0:
        goal = _goal(weights.sum(-1, keepdim=True), config.top_p)
        mass = weigh((ordered.double() - top) * LOG2E)
        cut = ordered.gather(-1, (mass.cumsum(-1) < goal).sum(-1, keepdim=True).clamp(max=V - 1))
        kept = kept & (logits >= cut)
        ties = kept & (logits == cut)
        if config.top_p > 0:
            # the ids at the cut share what the likelier ones leave of top_p
            left = goal - (weights * (kept & ~ties)).sum(-1, keepdim=True)
            share = (left // ties.sum(-1, keepdim=True).clamp(min=1)).clamp(min=1)
            weights = torch.where(ties, share, weights)
            values = torch.where(ties, (log2(share) - UNIT) / LOG2E + top, values)
    if config.temperature != 1.0:
        top = values.masked_fill(~kept, -torch.inf).amax(-1, keepdim=True)
        weights = weigh((values - top) * (LOG2E * inverse(config)))
    return weights * kept


def chances(
    logits: Tensor, config: SamplingConfig, counts: Tensor | None = None, *, seen: Tensor | None = None
) -> Tensor:
    """What each id weighs, (R, V) whole numbers, after the penalties and cuts; temperature is above 0."""
    return (_rwkv if config.order == "rwkv" else _hf)(penalise(logits, counts, config, seen=seen), config)


def probabilities(
    logits: Tensor, config: SamplingConfig, counts: Tensor | None = None, *, seen: Tensor | None = None
) -> Tensor:
    """What each id's chance is to come next: (R, V) fp64, rows sum to 1."""
    if config.temperature == 0:
        logits = penalise(logits, counts, config, seen=seen)
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float64).scatter(-1, best, 1.0)
    weights = chances(logits, config, counts, seen=seen).double()
    return weights / weights.sum(-1, keepdim=True)


def sample(
    logits: Tensor,
    config: SamplingConfig,
    counts: Tensor | None,
    draws: Tensor | None,
    *,
    seen: Tensor | None = None,
) -> Tensor:
    """Next ids (R,) for logits (R, V); counts and seen as for `penalise`.

    Each row has a number of its own in `draws` (R,), fp64 in [0, 1). Temperature 0 needs none.
    """
    if config.temperature == 0:
        return penalise(logits, counts, config, seen=seen).argmax(-1)
    below = chances(logits, config, counts, seen=seen).cumsum(-1)  # (R, V)
    whole = below[:, -1:]
    wanted = torch.minimum((draws.to(below.device)[:, None] * whole.double()).long(), whole - 1)
    # right: an id of chance 0 has an empty interval and is never met; logits that are no numbers end anywhere
    return torch.searchsorted(below, wanted, right=True)[:, 0].clamp(max=below.shape[-1] - 1)
