"""What texts have in common at their beginning: read once, its state is copied to all of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rwkvpipe.model.layers import State

SAVED = 64  # tokens that reading a beginning apart must save
LEAST = 16  # tokens that it must have
KEPT = 1 << 28  # bytes of states that are kept at most


@dataclass
class Header:
    """The first `depth` tokens of some texts: `rows` go on from it by themselves, `below` are longer headers."""

    depth: int
    rows: list[int] = field(default_factory=list)
    below: list["Header"] = field(default_factory=list)

    @property
    def example(self) -> int:
        """A text that begins with it."""
        return self.rows[0] if self.rows else self.below[0].example


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike; each keeps one at least of its own."""
    length = min(len(first), len(second)) - 1
    if length <= 0:
        return 0
    if first[:length] == second[:length]:
        return length
    low, high = 0, length  # alike up to low, not up to high
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def headers(texts: Sequence[list[int]]) -> Header:
    """Which beginnings of texts are worth reading once, as a tree. The root is the empty one."""
    order = sorted(range(len(texts)), key=texts.__getitem__)
    alike = np.array([common(texts[a], texts[b]) for a, b in zip(order, order[1:], strict=False)], dtype=np.int64)
    root = Header(0)
    spans = [(0, len(order), root)]
    while spans:
        first, end, above = spans.pop()
        if end - first < 2:
            above.rows += order[first:end]
            continue
        inside = alike[first : end - 1]
        depth = int(inside.min())
        if depth - above.depth >= LEAST and (depth - above.depth) * (end - first - 1) >= SAVED:
            above.below.append(Header(depth))
            above = above.below[-1]
        cuts = [first, *(first + 1 + np.flatnonzero(inside == depth)).tolist(), end]
        spans += [(a, b, above) for a, b in zip(cuts, cuts[1:], strict=False)]
    return root


class States:
    """States after texts that were read, the newest `limit` bytes of them, for texts that go on from there."""

    def __init__(self, limit: int = KEPT):
        self.limit, self.size = limit, 0
        self.kept: dict[tuple[int, ...], State] = {}

    def add(self, ids: Sequence[int], state: State) -> None:
        """Keep the state (of one row) after these ids."""
        key = tuple(ids)
        self.drop(key)
        self.kept[key] = state
        self.size += state.nbytes
        for old in list(self.kept):
            if self.size <= self.limit:
                break
            self.drop(old)

    def drop(self, key: tuple[int, ...]) -> None:
        """Forget a text."""
        if key in self.kept:
            self.size -= self.kept.pop(key).nbytes

    def find(self, ids: Sequence[int]) -> tuple[int, State | None]:
        """The longest beginning of a text that is known, shorter than the text: its length and the state there."""
        best: tuple[int, ...] = ()
        for key in self.kept:
            if len(best) < len(key) < len(ids) and tuple(ids[: len(key)]) == key:
                best = key
        if not best:
            return 0, None
        state = self.kept.pop(best)  # the one used last goes last
        self.kept[best] = state
        return len(best), state

    def alike(self, ids: Sequence[int]) -> int:
        """How many tokens a text has in common with the beginning of one that is known; one at least is left to it."""
        text = tuple(ids)
        return max((common(text, key) for key in self.kept if key[:LEAST] == text[:LEAST]), default=0)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self.kept)
