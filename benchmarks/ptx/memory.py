"""What threads read and write: where they may, what nobody has written, races; and what it costs a card.

A card gives shared memory in wavefronts of 128 bytes, one word of each of 32 banks. Memory it reads in sectors of 32
bytes.
"""

import ctypes
from functools import lru_cache

import numpy as np

from benchmarks.ptx.fault import Fault
from benchmarks.ptx.turns import Turns

WARP, BANKS, WORD, SECTOR = 32, 32, 4, 32
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Memory:
    """Areas of this process that kernels may read and write, each in its turn."""

    def __init__(self) -> None:
        self.areas: list[tuple[int, int]] = []  # from, to
        self.turns = Turns()

    def allow(self, start: int, size: int) -> None:
        """These bytes, too."""
        if size:
            self.areas.append((start, start + size))

    def cells(self, at: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For numbers of `size` bytes at these places: memory, which of them lie there, and where. Raises Fault."""
        if (at % size).any():
            raise Fault(f"{size} bytes at {int(at[(at % size) > 0][0]):#x} are not aligned")
        found, left = [], np.ones(len(at), bool)
        for start, end in self.areas:
            here = left & (at >= start) & (at + size <= end)
            if here.any():
                base = start - start % 16
                kind = UNSIGNED[size]
                memory = np.ctypeslib.as_array(_pointer(base, kind), ((end - base) // size,))
                found.append((memory, np.flatnonzero(here), (at[here] - base) // size))
                left &= ~here
        if left.any():
            raise Fault(f"{size} bytes at {int(at[left][0]):#x} belong to no tensor that was given")
        return found

    def read(self, at: np.ndarray, size: int, turn: np.ndarray) -> np.ndarray:
        """Numbers as they lie there; `turn` tells whose turn it is."""
        if not turn.all():
            self.turns.read(at[~turn], size)
        to = np.zeros(len(at), UNSIGNED[size])
        for memory, which, places in self.cells(at, size):
            to[which] = memory[places]
        return to

    def write(self, at: np.ndarray, size: int, numbers: np.ndarray, turn: np.ndarray) -> None:
        """The same the other way."""
        self.turns.write(at, size, not turn.all())
        for memory, which, places in self.cells(at, size):
            memory[places] = numbers[which]


def _pointer(address: int, kind: type) -> object:
    return ctypes.cast(address, ctypes.POINTER(np.ctypeslib.as_ctypes_type(kind)))


def _one(words: np.ndarray, which: np.ndarray) -> int:
    """One of those for which something holds."""
    return int(words[which.astype(bool)][0])


class Shared:
    """Memory of a block: bytes, who has written and read each word since the last barrier, as a bit for each warp, and
    which words are asked for and have not arrived."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size + -size % 16, 0xFF, np.uint8)
        self.size = size
        self.written = np.zeros(len(self.bytes) // WORD, bool)
        self.coming = np.zeros(len(self.written), bool)
        self.readers = np.zeros(len(self.written), np.uint32)
        self.writers = np.zeros(len(self.written), np.uint32)

    def meet(self) -> None:
        """All threads have come to a barrier."""
        self.readers[:] = 0
        self.writers[:] = 0

    def _checked(self, at: np.ndarray, size: int) -> np.ndarray:
        if (at % size).any() or len(at) and int(at.max()) + size > self.size:
            raise Fault(f"{size} bytes at {int(at.max())} of {self.size} of shared memory, or not aligned")
        for n in range(max(1, size // WORD)):
            if self.coming[at // WORD + n].any():
                raise Fault(
                    f"word {_one(at // WORD + n, self.coming[at // WORD + n])} of shared memory has not arrived"
                )
        return at // WORD

    def ask(self, at: np.ndarray, size: int, warps: np.ndarray) -> None:
        """These bytes are to be overwritten at any time until they `arrive`."""
        first = self._checked(at, size)
        for n in range(size // WORD):
            if ((self.readers[first + n] | self.writers[first + n]) & ~warps).any():
                raise Fault("a race: shared memory is asked for where another warp reads or writes")
        for n in range(size // WORD):
            self.coming[first + n] = True

    def arrive(self, at: np.ndarray, words: np.ndarray, warps: np.ndarray) -> None:
        """What was asked for is there: (threads, words) from these places on."""
        for n in range(words.shape[1]):
            self.coming[at // WORD + n] = False
            self.write(at + n * WORD, WORD, np.ascontiguousarray(words[:, n]), warps)

    def read(self, at: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        """Numbers as they lie there. Raises Fault for those that nobody wrote, or another warp has just written."""
        first = self._checked(at, size)
        for n in range(max(1, size // WORD)):
            words = first + n
            if not self.written[words].all():
                raise Fault(f"word {_one(words, ~self.written[words])} of shared memory was never written")
            if (self.writers[words] & ~warps).any():
                raise Fault(f"a race: word {_one(words, self.writers[words] & ~warps)} was written by another warp")
            np.bitwise_or.at(self.readers, words, warps)
        return self.bytes.view(UNSIGNED[size])[at // size]

    def write(self, at: np.ndarray, size: int, numbers: np.ndarray, warps: np.ndarray) -> None:
        """The same the other way; warps may write the same number to one place."""
        first, cells = self._checked(at, size), self.bytes.view(UNSIGNED[size])
        for n in range(max(1, size // WORD)):
            words = first + n
            np.bitwise_or.at(self.writers, words, warps)
            others = (self.writers[words] & ~warps) > 0
            same = (cells[at // size] == numbers) & self.written[words]
            if (others & ~same).any() and self._differ(at[others], numbers[others], cells, size):
                raise Fault(f"a race: word {int(words[others][0])} was written by two warps")
            if (self.readers[words] & ~warps).any():
                raise Fault(
                    f"a race: word {int(words[(self.readers[words] & ~warps) > 0][0])} was read by another warp"
                )
        cells[at // size] = numbers
        for n in range(max(1, size // WORD)):
            self.written[first + n] = True

    @staticmethod
    def _differ(at: np.ndarray, numbers: np.ndarray, cells: np.ndarray, size: int) -> bool:
        """Whether numbers for the same place are not the same, neither among themselves nor as what lies there."""
        order = np.argsort(at, kind="stable")
        at, numbers = at[order], numbers[order]
        twice = at[1:] == at[:-1]
        if (numbers[1:] != numbers[:-1])[twice].any():
            return True
        alone = np.ones(len(at), bool)
        alone[1:] &= ~twice
        alone[:-1] &= ~twice
        return bool((cells[at[alone] // size] != numbers[alone]).any())


def wavefronts(at: np.ndarray, size: int, lanes: np.ndarray) -> int:
    """How often shared memory must be asked for `size` bytes of each thread; `lanes` are the threads' numbers."""
    line = BANKS * WORD
    return _wavefronts((at - at[0] // line * line).astype(np.int64).tobytes(), size, lanes.tobytes())


@lru_cache(1 << 14)
def _wavefronts(places: bytes, size: int, numbers: bytes) -> int:
    """The same; kernels ask in few patterns, again and again."""
    at, lanes = np.frombuffer(places, np.int64), np.frombuffer(numbers, np.int64)
    words = max(1, size // WORD)
    together = WARP // words  # lanes that are served at a time
    groups = lanes // together
    first = at // WORD
    asked = (first[:, None] + np.arange(words)).ravel()
    pairs = np.unique(np.stack([np.repeat(groups, words), asked], 1), axis=0)
    banks, counts = np.unique(pairs[:, 0] * BANKS + pairs[:, 1] % BANKS, return_counts=True)
    most = np.zeros(int(groups.max()) + 1, np.int64)
    np.maximum.at(most, banks // BANKS, counts)
    return int(most.sum())


def sectors(at: np.ndarray, size: int, lanes: np.ndarray) -> int:
    """Sectors of memory that a warp asks for at once, all warps together."""
    pairs = np.stack([lanes // WARP, (at // SECTOR).astype(np.int64)], 1)
    ends = np.stack([lanes // WARP, ((at + size - 1) // SECTOR).astype(np.int64)], 1)
    return len(np.unique(np.concatenate([pairs, ends]), axis=0))
