"""The threads of a block: their registers, where each of them is, and the memory they share."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from benchmarks.ptx import operations
from benchmarks.ptx.memory import WARP, Memory, Shared
from benchmarks.ptx.program import Kernel

NOWHERE = np.iinfo(np.int32).max  # of a thread that has ended
Step = Callable[[np.ndarray], None]
"""What threads do, of which a mask (threads,) tells those that come to it."""


class Threads:
    """Numbers of all threads side by side; `at` is the block of instructions that each goes to next.

    `turn` tells which have waited for the kernels before; if this one `follows` them, none has when it begins.
    """

    def __init__(self, kernel: Kernel, threads: int, memory: Memory, parameters: bytes, follows: bool):
        self.kernel, self.asked, self.memory, self.follows = kernel, threads, memory, follows
        self.threads = threads = threads + -threads % WARP  # what fills the last warp ends before it begins
        self.parameters = np.frombuffer(parameters + bytes(-len(parameters) % 8), np.uint8)
        self.lane = np.arange(threads)
        self.warp_bit = (np.uint32(1) << (self.lane // WARP).astype(np.uint32)).astype(np.uint32)
        self.counts: Counter[str] = Counter()
        kinds = kernel.registers.items()
        self.registers = {name: np.zeros(threads, operations.TYPES[kind]) for name, kind in kinds}
        self.special = {
            "%tid.x": self.lane.astype(np.uint32),
            "%tid.y": np.zeros(threads, np.uint32),
            "%ntid.x": np.full(threads, self.asked, np.uint32),
            "%ctaid.x": np.zeros(threads, np.uint32),
            "%laneid": (self.lane % WARP).astype(np.uint32),
        }
        self.begin(0, 0)

    def begin(self, block: int, shared: int) -> None:
        """A block, with so many bytes of shared memory."""
        self.special["%ctaid.x"][:] = block
        self.shared = Shared(shared)
        self.coming: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # asked for: by which threads, where to, what
        self.at = np.where(self.lane < self.asked, 0, NOWHERE).astype(np.int32)
        self.waits = np.zeros(self.threads, bool)
        self.turn = np.full(self.threads, not self.follows)
        self.joined: Step | None = None  # what all that wait come to know

    def whole(self, here: np.ndarray) -> np.ndarray:
        """Of each thread whether all of its warp are here, or have ended, or none is."""
        warps = here.reshape(-1, WARP)
        gone = (self.at == NOWHERE).reshape(-1, WARP)
        return np.repeat((warps | gone).all(1) | ~warps.any(1), WARP)

    def source(self, text: str, of: np.dtype) -> np.ndarray:
        """A register, or a number that stands there, seen as a type."""
        if text in self.special:
            return self.special[text].view(of)
        if text.startswith("%"):
            register = self.registers[text]
            if register.dtype.itemsize == of.itemsize:
                return register.view(of)
            if register.dtype.itemsize > of.itemsize:
                return register.view(of)[:: register.dtype.itemsize // of.itemsize]
            raise ValueError(f"{text} is less than {of}")
        if text[:2] in ("0f", "0F"):
            return np.full(self.threads, int(text[2:], 16), np.uint32).view(of)
        if text == self.kernel.parameter or text == "shared":
            return np.zeros(self.threads, of)
        mask = (1 << of.itemsize * 8) - 1
        return np.full(self.threads, int(text, 0) & mask, f"u{of.itemsize}").view(of)

    def destination(self, text: str) -> np.ndarray | None:
        """The register that something goes to, if it goes anywhere."""
        return None if text == "_" else self.registers[text]

    @staticmethod
    def put(to: np.ndarray | None, found: np.ndarray, here: np.ndarray) -> None:
        """What was found goes to a register, of these threads."""
        if to is None:
            return
        if found.shape != to.shape:
            found = np.broadcast_to(found, to.shape)
        if not found.flags.c_contiguous:
            found = np.ascontiguousarray(found)
        if found.dtype != to.dtype:
            found = found.view(to.dtype) if found.dtype.itemsize == to.dtype.itemsize else found.astype(to.dtype)
        np.copyto(to, found, where=here)


def listed(text: str) -> list[str]:
    """What stands in braces."""
    return [part.strip() for part in text.strip("{}").split(",")]
