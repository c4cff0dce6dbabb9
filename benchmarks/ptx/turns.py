"""Kernels that begin while those before them still run, until they take their turn: what they must not do before."""

from collections import defaultdict

import numpy as np

from benchmarks.ptx.fault import Fault

PAGE = 1 << 14  # words of memory that are looked at together


class Words:
    """Some words of memory, of four bytes."""

    def __init__(self) -> None:
        self.pages: defaultdict[int, np.ndarray] = defaultdict(lambda: np.zeros(PAGE, bool))

    def _parts(self, words: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        pages = words // PAGE
        return [(self.pages[int(page)], words[pages == page] % PAGE) for page in np.unique(pages)]

    def add(self, words: np.ndarray) -> None:
        """These, too."""
        for page, places in self._parts(words):
            page[places] = True

    def any(self, words: np.ndarray) -> bool:
        """Whether some of these are among them."""
        return any(page[places].any() for page, places in self._parts(words))


class Turns:
    """Kernels that follow one that was launched, which all others before were done with.

    Before its turn a thread may read what none of them writes, be it earlier or later, and write nothing.
    """

    def __init__(self) -> None:
        self.written: Words | None = None  # nobody knows what ran before the first
        self.ahead = Words()

    def begin(self, follows: bool) -> None:
        """The next kernel. Raises Fault if it follows none."""
        if follows and self.written is None:
            raise Fault("a kernel follows what nobody knows: the first one is to be launched")
        if not follows:
            self.written, self.ahead = Words(), Words()

    def read(self, at: np.ndarray, size: int) -> None:
        """Threads before their turn read so many bytes each. Raises Fault."""
        words = _words(at, size)
        if self.written is not None and self.written.any(words):
            raise Fault(f"read before its turn: {int(at[0]):#x} or beside, which a kernel before may still write")
        self.ahead.add(words)

    def write(self, at: np.ndarray, size: int, before: bool) -> None:
        """Threads write so many bytes each, some of them before their turn if it says so. Raises Fault."""
        if before:
            raise Fault(f"written before its turn: {int(at[0]):#x} or beside")
        words = _words(at, size)
        if self.ahead.any(words):
            raise Fault(f"written: {int(at[0]):#x} or beside, which another thread has read before its turn")
        if self.written is not None:
            self.written.add(words)


def _words(at: np.ndarray, size: int) -> np.ndarray:
    first = at // 4
    return first if size <= 4 else np.concatenate([first + n for n in range(size // 4)])
