"""In which order rows come: functions of the row's running number and a seed, so that a step needs no memory.

RWKV-LM's magic prime, passes each in an order of its own, and shares of several corpora.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

BLOCK = 1 << 16  # rows among which the shares of several corpora come out
TABLE = 1 << 22  # the most indices whose order is held in memory
ROUNDS = 4
WORD = (1 << 64) - 1


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def magic_prime(chunks: int) -> int | None:
    """The largest prime of the form 3n + 2 up to chunks - 1, None if there is none (RWKV-LM, make_data.py).

    Modulo such a prime cubes are all different, so each chunk but the last few comes once in so many rows.
    """
    start = chunks - 1 - (chunks - 3) % 3  # the largest 3n + 2 that is not above chunks - 1
    return next((number for number in range(start, 1, -3) if _prime(number)), None)


def place(step: int, row: int, prime: int, batch: int = 1) -> int:
    """The chunk that a row of a step reads: RWKV-LM's visit number cubed, times the golden ratio, modulo `prime`."""
    visit = 1 + step * batch + row
    factor = int(prime * ((math.sqrt(5) - 1) / 2))
    return factor * pow(visit, 3, prime) % prime


def _mixed(word: int) -> int:
    """64 bits that depend on all bits of the word (the finaliser of splitmix64)."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & WORD
    return word ^ (word >> 31)


def scrambled(count: int, keys: Sequence[int]) -> Callable[[int], int]:
    """A permutation of the numbers below `count`, computed one by one: a Feistel network, walked until it is inside.

    `keys` are ROUNDS numbers of 64 bits. What comes out of the range goes in again, at most a few times.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1

    def index(number: int) -> int:
        while True:
            left, right = number >> half, number & low
            for key in keys:
                left, right = right, left ^ (_mixed((right + key) & WORD) & low)
            number = left << half | right
            if number < count:
                return number

    return index


def shuffled(count: int, seed: int) -> Callable[[int], int]:
    """Function from a running number to an index: pass after pass, each in an order of its own."""

    @lru_cache(maxsize=2)  # a batch may end one pass and begin the next
    def order(epoch: int) -> Callable[[int], int]:
        lots = np.random.default_rng([seed, epoch])
        if count > TABLE:
            return scrambled(count, [int(key) for key in lots.integers(0, WORD, ROUNDS, np.uint64, endpoint=True)])
        return lots.permutation(count).__getitem__

    def index(number: int) -> int:
        epoch, position = divmod(number, count)
        return int(order(epoch)(position))

    return index


class Shares:
    """Which corpus a row comes from, and the how manieth of that corpus it is: functions of its running number.

    Each block of rows holds each corpus as often as its weight says, to within one row over all blocks so far, spread
    over the block by lots of the seed. `weights` are numbers above 0, none below a thousandth of all.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        exact = [Fraction(str(weight)) for weight in weights]
        self.edges = [sum(exact[:number]) / sum(exact) for number in range(len(exact) + 1)]
        self.parts = [float(after - before) for before, after in zip(self.edges, self.edges[1:], strict=False)]
        self.seed = seed
        self.block = lru_cache(maxsize=2)(self._block)

    def before(self, block: int) -> np.ndarray:
        """Rows (n,) of each corpus in all blocks before one."""
        return np.diff([math.floor(edge * block * BLOCK) for edge in self.edges])

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The corpus (BLOCK,) of each row of a block, and how many rows of that corpus come before it (BLOCK,)."""
        first = self.before(block)
        counts = self.before(block + 1) - first
        lots = np.random.default_rng([self.seed, block, len(counts)])
        # the k-th of n rows of a corpus comes somewhere in the k-th n-th of the block
        times = [(np.arange(count) + lots.random(count)) / count for count in counts]
        numbers = [start + np.arange(count) for start, count in zip(first, counts, strict=True)]
        order = np.argsort(np.concatenate(times), kind="stable")
        corpora = np.repeat(np.arange(len(counts)), counts)
        return corpora[order], np.concatenate(numbers)[order]

    def pick(self, number: int) -> tuple[int, int]:
        """(corpus, number within it) of a row."""
        if len(self.parts) == 1:
            return 0, number
        block, place = divmod(number, BLOCK)
        corpora, numbers = self.block(block)
        return int(corpora[place]), int(numbers[place])
