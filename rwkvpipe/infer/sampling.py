"""Logits to next ids, row by row.

Order `hf` is that of transformers and vLLM, order `rwkv` that of RWKV's demo sampler (RWKV-LM, `sample_logits`).
"""

from collections.abc import Sequence
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.infer.draw import draw

LARGE = 1000  # ids from which on it pays to look at rows one by one; how many rows there are must decide nothing


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
        columns = _columns(list(config.bias), logits)
        values = torch.tensor([config.bias[i] for i in columns.tolist()], dtype=logits.dtype, device=logits.device)
        logits = logits.index_add(1, columns, values.expand(len(logits), -1))
    if config.ban:
        logits = logits.index_fill(1, _columns(config.ban, logits), -torch.inf)
    return logits


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


def nucleus(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (R, V) with -inf at all that falls to the cuts.

    Values from the k-th largest on stay; of what is left, the shortest descending prefix whose probability reaches
    top_p (one id at least; among equals the lower id comes first). top_k 0 and top_p 1 cut nothing.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1.0:
        ordered = descending(logits)
        mass = ordered.double().softmax(-1)
        before = mass.cumsum(-1) - mass  # what the likelier ones hold together
        count = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
        logits = logits.masked_fill(~largest(logits, ordered, count), -torch.inf)
    return logits


def _rwkv(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Probabilities (R, V), not normalised, in the demo sampler's order: cuts first, temperature last."""
    chances = logits.double().softmax(-1)
    V = chances.shape[-1]
    if 0 < config.top_k < V or config.top_p < 1.0:
        ordered = descending(chances)
    if 0 < config.top_k < V:
        count = torch.full_like(chances[..., :1], config.top_k, dtype=torch.long)
        chances = chances.masked_fill(~largest(chances, ordered, count), 0.0)
    if config.top_p < 1.0:
        reached = (ordered.cumsum(-1) < config.top_p).sum(-1, keepdim=True).clamp(max=V - 1)
        cut = ordered.gather(-1, reached)
        chances = chances.masked_fill(chances < cut, 0.0)
        if config.top_p > 0:
            # the ids at the cut share what the likelier ones leave of top_p
            ties = chances == cut
            share = (config.top_p - chances.sum(-1, keepdim=True)) / ties.sum(-1, keepdim=True).clamp(min=1)
            chances = torch.where(ties, (cut + share).clamp(min=0), chances)
    return chances if config.temperature == 1.0 else chances.pow(1 / config.temperature)


def _chances(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Chances (R, V) after the penalties, rows sum to 1."""
    if config.order == "rwkv":
        chances = _rwkv(logits, config)
        return chances / chances.sum(-1, keepdim=True)
    return nucleus(logits.double() / config.temperature, config.top_k, config.top_p).softmax(-1)


def probabilities(
    logits: Tensor, config: SamplingConfig, counts: Tensor | None = None, *, seen: Tensor | None = None
) -> Tensor:
    """What each id's chance is to come next: (R, V) fp64, rows sum to 1."""
    logits = penalise(logits, counts, config, seen=seen)
    if config.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float64).scatter(-1, best, 1.0)
    return _chances(logits, config)


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
    logits = penalise(logits, counts, config, seen=seen)
    if config.temperature == 0:
        # PyTorch's takes ten times as long
        return torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)
    if logits.device.type == "cpu" and logits.shape[-1] >= LARGE:
        return torch.tensor([draw(*one) for one in zip(logits.numpy(), repeat(config), draws.tolist(), strict=False)])
    below = _chances(logits, config).cumsum(-1)  # (R, V)
    wanted = draws.to(below)[:, None] * below[:, -1:]
    # right: an id of chance 0 has an empty interval and is never met; logits that are no numbers end anywhere
    return torch.searchsorted(below, wanted, right=True)[:, 0].clamp(max=below.shape[-1] - 1)
