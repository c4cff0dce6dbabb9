"""Documents put together into rows of one length: best fit, the longest first."""

import numpy as np


def best_fit(sizes: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Bins of at most `room`, each thing (n,) put where it leaves the least room, the largest first.

    Returns the numbers of the things, bin by bin and in their own order within one, and where each bin ends (bins,).
    """
    if len(sizes) and int(sizes.max()) > room:
        raise ValueError(f"a thing of {sizes.max()} is larger than a bin of {room}")
    owner = np.empty(len(sizes), dtype=np.int64)
    waiting: list[list[int]] = [[] for _ in range(room + 1)]  # bins by the room that is left
    left, bins = 0, 0  # `left` has a bit for each such list with bins in it
    for thing in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[thing])
        found = left >> size
        if found:
            free = size + (found & -found).bit_length() - 1
            number = waiting[free].pop()
            if not waiting[free]:
                left ^= 1 << free
        else:
            free, number, bins = room, bins, bins + 1
        owner[thing] = number
        waiting[free - size].append(number)
        left |= 1 << (free - size)
    return np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner, minlength=bins))
