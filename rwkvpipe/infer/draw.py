"""The next id of one row, on a CPU: the chances of `sampling`, worked out for the ids alone that the cuts leave.

A row of a large vocabulary stays in the processor's cache, and is never sorted whole unless all its ids are as likely.
"""

import numpy as np

from rwkvpipe.base.config import SamplingConfig


def _weights(row: np.ndarray, heat: float) -> np.ndarray:
    """What ids weigh, the heaviest 1, in fp64."""
    with np.errstate(invalid="ignore"):
        found = np.subtract(row, row.max(), dtype=np.float64)
        if heat != 1.0:
            found /= heat
        return np.exp(found, out=found)


def _largest(values: np.ndarray, ordered: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest values are, of equal ones the first; `ordered` falls."""
    cut = ordered[count - 1]
    kept = values >= cut
    if (over := int(kept.sum()) - count) > 0:
        kept[np.flatnonzero(values == cut)[-over:]] = False
    return kept


def _best(row: np.ndarray, top_k: int) -> np.ndarray:
    """Where the k-th largest value and larger ones are, equals included."""
    return row >= np.partition(row, len(row) - top_k)[len(row) - top_k]


def _near(weights: np.ndarray, whole: float, top_p: float) -> np.ndarray:
    """Where what may count for top_p is: all that are lighter hold less than 1 - top_p together."""
    return weights >= whole * (1 - top_p) / (2 * len(weights))


def _hf(row: np.ndarray, config: SamplingConfig) -> tuple[np.ndarray | None, np.ndarray]:
    """Ids that stay (None for all), rising, and what they weigh."""
    ids, by_mass = None, config.top_p < 1.0
    if 0 < config.top_k < len(row):
        ids = np.flatnonzero(_best(row, config.top_k))
    elif by_mass:  # in fp32 first, which halves the time and moves the whole by a ten millionth at most
        with np.errstate(invalid="ignore"):
            light = np.exp((row - row.max()) / np.float32(config.temperature))
        whole = light.sum(dtype=np.float64)
        ids = np.flatnonzero(_near(light, whole, config.top_p))
    weights = _weights(row if ids is None else row[ids], config.temperature)
    if by_mass:
        if 0 < config.top_k < len(row):
            whole = weights.sum()
        ordered = np.sort(weights)[::-1]
        count = int((np.cumsum(ordered) - ordered < config.top_p * whole).sum())
        kept = _largest(weights, ordered, max(count, 1))
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def _rwkv(row: np.ndarray, config: SamplingConfig) -> tuple[np.ndarray | None, np.ndarray]:
    """The same in the demo sampler's order."""
    ids, chances = None, _weights(row, 1.0)
    chances /= chances.sum()
    by_rank, by_mass = 0 < config.top_k < len(row), config.top_p < 1.0
    if by_rank or by_mass:
        near = _near(chances, 1.0, config.top_p) if by_mass else False
        ids = np.flatnonzero(near | _best(row, config.top_k) if by_rank else near)
        chances = chances[ids]
        ordered = np.sort(chances)[::-1]
        if by_rank:
            chances[~_largest(chances, ordered, config.top_k)] = 0.0
        if by_mass:
            cut = ordered[min(int((np.cumsum(ordered) < config.top_p).sum()), len(ordered) - 1)]
            chances[chances < cut] = 0.0
            ties = chances == cut
            if config.top_p > 0 and ties.any():
                chances[ties] = max(0.0, cut + (config.top_p - chances.sum()) / ties.sum())
    return ids, chances if config.temperature == 1.0 else chances ** (1 / config.temperature)


def draw(row: np.ndarray, config: SamplingConfig, number: float) -> int:
    """The next id for logits (V,), penalties in them, by a number in [0, 1); temperature is above 0."""
    if not np.isfinite(row.max()):  # no numbers: any id, whoever counts its log-probability will see
        return 0
    ids, weights = (_rwkv if config.order == "rwkv" else _hf)(row, config)
    below = np.cumsum(weights)
    # right: an id of chance 0 has an empty interval and is never met
    found = min(int(np.searchsorted(below, number * below[-1], side="right")), len(below) - 1)
    return found if ids is None else int(ids[found])
