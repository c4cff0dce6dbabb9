"""Marks of tokens, one each: 0 is read and not learned, 1 is learned, and any other number is how much it counts.

Where all are 0 or 1 they are one uint8 a token, else one little-endian fp32.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

BLOCK = 1 << 20
WEIGHT = np.dtype("<f4")
RUN = np.dtype([("first", "<i8"), ("count", "<i8"), ("weight", WEIGHT)])


def marks(given) -> np.ndarray:
    """Numbers (n,) from 0 up as marks (n,) uint8, if 0 and 1 are all there are, else fp32."""
    found = np.asarray(given)
    if found.dtype.kind != "f" or np.isin(found, (0, 1)).all():
        return found.astype(np.uint8, copy=False)
    return found.astype(WEIGHT, copy=False)


def weights(found: np.ndarray) -> np.ndarray:
    """How much each of the tokens counts (n,) fp32, by its mark."""
    return found if found.dtype == WEIGHT else (found != 0).astype(WEIGHT)


def narrowed(found: np.ndarray) -> np.ndarray:
    """The same marks (n,) in a byte each, 1 for all that is learned."""
    return (found != 0).astype(np.uint8) if found.dtype == WEIGHT else found


def runs(found: np.ndarray, before: int) -> np.ndarray:
    """Where in marks (n,), of which the first stands behind `before` others, weights other than 0 and 1 stand (m,)."""
    if found.dtype != WEIGHT or not len(found):
        return np.zeros(0, RUN)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(found)) + 1))
    told = np.zeros(len(starts), RUN)
    told["first"], told["weight"] = starts + before, found[starts]
    told["count"] = np.diff(np.concatenate((starts, [len(found)])))
    return told[~np.isin(told["weight"], (0, 1))]


def widened(narrow: Path, told: np.ndarray) -> Iterator[np.ndarray]:
    """Marks of a file of one byte each as weights, some at a time; `told` (m,) RUN, in order, says what is not 1."""
    found, ends = np.memmap(narrow, np.uint8, "r"), told["first"] + told["count"]
    for first in range(0, len(found), BLOCK):
        some = weights(found[first : first + BLOCK])
        low, high = np.searchsorted(ends, first, "right"), np.searchsorted(told["first"], first + len(some))
        for start, count, weight in told[low:high].tolist():
            some[max(0, start - first) : start + count - first] = weight
        yield some
