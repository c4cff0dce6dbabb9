"""The next id of each row and its log-probability, in one native call on a CPU (`cuda/sample_cpu.cpp`).

`sampling` is the reference, which chooses the same ids, and what computes elsewhere.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.infer.sampling import COLDEST, inverse, sample
from rwkvpipe.kernel import build


def logprob(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (...) of ids (...) under logits (..., V)."""
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


@dataclass(frozen=True, eq=False)
class Asked:
    """Rows of logits (R, V) that an id each is to be chosen from, by numbers `draws` (R,) where temperature is not 0.

    Log-probabilities are those under `plain` (R, V) / temperature, where the ids `barred` (n,) come, too; they are
    never chosen. `counts` and `seen` (R, V) are as for `penalise`. Other types than native code reads are made them
    here. Raises ValueError where a shape is another one: native code would read beyond it.
    """

    logits: Tensor
    plain: Tensor
    barred: Tensor | None = None
    draws: Tensor | None = None
    counts: Tensor | None = None
    seen: Tensor | None = None

    def __post_init__(self):
        whole = tuple(self.logits.shape)
        for name, dtype, shape in (
            ("plain", torch.float32, whole),
            ("barred", torch.int64, None),
            ("draws", torch.float64, whole[:1]),
            ("counts", torch.float32, whole),
            ("seen", torch.bool, whole),
        ):
            given = getattr(self, name)
            if given is None:
                continue
            if shape is not None and tuple(given.shape) != shape:
                raise ValueError(f"{name} is {tuple(given.shape)} beside logits {whole}; {shape} was expected")
            object.__setattr__(self, name, given.to(dtype))


def choose(asked: Asked, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Ids (R,) and their log-probabilities (R,)."""
    if build.native(asked.logits):
        return _native(asked, config)
    logits, heat = asked.logits, max(config.temperature, COLDEST) if config.temperature else 1.0
    if asked.barred is not None:
        logits = logits.index_fill(-1, asked.barred, -torch.inf)
    ids = sample(logits, config, asked.counts, asked.draws, seen=asked.seen)
    return ids, logprob(asked.plain if heat == 1.0 else asked.plain / heat, ids)


def weights(asked: Asked, config: SamplingConfig) -> Tensor:
    """What each id weighs to the native form: (R, V) whole numbers, as `sampling.chances` has them."""
    told = torch.empty(asked.logits.shape, dtype=torch.long)
    _native(asked, config, told)
    return told


@lru_cache(maxsize=64)
def _lists(bias: tuple[tuple[int, float], ...], spare: tuple[int, ...], ban: tuple[int, ...], size: int):
    """Ids that are biased, spared and banned, one after the other, how many each, and the biases."""
    known = [[n for n in ids if 0 <= n < size] for ids in (dict(bias), spare, ban)]
    values = [value for n, value in bias if 0 <= n < size]
    return torch.tensor(sum(known, []), dtype=torch.long), tuple(map(len, known)), torch.tensor(values)


@lru_cache(maxsize=64)
def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _native(asked: Asked, config: SamplingConfig, told: Tensor | None = None) -> tuple[Tensor, Tensor]:
    logits, greedy = asked.logits.contiguous(), config.temperature == 0
    listed, (biased, spared, barred), bias = _lists(
        tuple(config.bias.items()), config.spare, config.ban, logits.shape[-1]
    )
    if asked.barred is not None:
        if len(asked.barred):
            low, high = torch.aminmax(asked.barred)
            if low < 0 or high >= logits.shape[-1]:
                raise IndexError("an id is barred that there is no logit of")
        listed, barred = torch.cat((listed, asked.barred)), barred + len(asked.barred)
    numbers = _numbers(
        1.0 if greedy else inverse(config),
        config.top_p,
        config.repetition_penalty,
        config.presence,
        config.frequency,
    )
    sizes = (*logits.shape, config.top_k, int(config.order == "rwkv"), int(greedy), biased, spared, barred)
    counts, seen, draws = (None if x is None else x.contiguous() for x in (asked.counts, asked.seen, asked.draws))
    given = (logits, asked.plain.contiguous(), counts, seen, listed, bias, numbers)
    ids, found = torch.empty(len(logits), dtype=torch.long), torch.empty(len(logits))
    build.call("sample_rows", sizes, *given, draws, ids, found, told)
    return ids, found
