"""A block of threads of a card, in step: the threads that are furthest behind go on, until all have ended or wait.

Where threads of a warp do something together those that came first wait for the others, as they do on a card.

What a card asks of its threads is asked here, too: all lanes of a warp at what they do together, all threads of a block
at a barrier.
"""

from collections import Counter

import numpy as np

from benchmarks.ptx import steps
from benchmarks.ptx.fault import Fault
from benchmarks.ptx.memory import WARP, Memory
from benchmarks.ptx.program import ENDS, Instruction, Kernel
from benchmarks.ptx.threads import NOWHERE, Threads

OF_THEIR_OWN = ("ld", "st", "mma", "bar", "shfl", "prefetch", "ldmatrix", "cp")  # counted by their names
TOGETHER = ("mma", "shfl", "ldmatrix")
FLOATS = ("fma", "add", "sub", "mul", "max", "min")


class Machine:
    """Runs a kernel's blocks; `counts` adds up what a card would have done, warp by warp."""

    def __init__(self, kernel: Kernel, threads: int, memory: Memory, parameters: bytes, follows: bool = False):
        self.threads = Threads(kernel, threads, memory, parameters, follows)
        self.steps = [[steps.step(self.threads, each) for each in block.instructions] for block in kernel.blocks]
        self.together = [any(map(_together, block.instructions)) for block in kernel.blocks]
        self.ahead = [Counter(_class(each) for each in block.instructions) for block in kernel.blocks]

    @property
    def counts(self) -> Counter[str]:
        """Instructions that warps began, by their kind; wavefronts of shared memory, and sectors of other."""
        return self.threads.counts

    def run(self, block: int, shared: int) -> None:
        """One block, with so many bytes of shared memory. Raises Fault."""
        now = self.threads
        now.begin(block, shared)
        while True:
            ready = np.where(now.waits, NOWHERE, now.at)
            first = int(ready.min())
            if first < NOWHERE:
                self._block(*self._next(ready, first))
            elif now.waits.any():
                self._meet()
            elif now.turn[: now.asked].all():
                return
            else:
                raise Fault("a thread ended and had not taken its turn")

    def _next(self, ready: np.ndarray, first: int) -> tuple[int, np.ndarray]:
        """The instructions to go on with, and the threads: whole warps where they do something together."""
        here = ready == first
        if not self.together[first] or self.threads.whole(here).all():
            return first, here
        for later in np.unique(ready[ready < NOWHERE]):
            found = ready == later
            found &= self.threads.whole(found) | (not self.together[later])
            if found.any():
                return int(later), found
        return first, here  # which is a fault

    def _block(self, first: int, here: np.ndarray) -> None:
        warps = int(here.reshape(-1, WARP).any(1).sum())
        for name, count in self.ahead[first].items():
            self.counts[name] += count * warps
        self.threads.at[here] = first + 1
        with np.errstate(all="ignore"):
            for step in self.steps[first]:
                step(here)

    def _meet(self) -> None:
        """All that have not ended wait at a barrier."""
        now = self.threads
        if (now.at[: now.asked] == NOWHERE).any():
            raise Fault("some threads of the block have ended and left others at a barrier")
        if len(np.unique(now.at[now.waits])) > 1:
            raise Fault("threads of a block wait at different barriers")
        if now.joined is not None:
            now.joined(now.waits)
        now.joined = None
        now.waits[:] = False
        now.shared.meet()


def _together(each: Instruction) -> bool:
    return each.name[0] in TOGETHER or each.name[0] == "bar"


def _class(each: Instruction) -> str:
    what = each.name[0]
    if what in OF_THEIR_OWN:
        return f"{what}.{each.name[1]}" if what in ("ld", "st") else what
    if what in FLOATS and "f32" in each.name:
        return "float"
    if what in ("ex2", "rcp", "sqrt", "lg2"):
        return "special"
    return "branch" if what in ENDS else "other"
