"""Instructions that threads do together: meet at a barrier, read each other, multiply matrices."""

import numpy as np

from benchmarks.ptx import operations
from benchmarks.ptx.fault import Fault
from benchmarks.ptx.memory import WARP
from benchmarks.ptx.program import Instruction
from benchmarks.ptx.threads import NOWHERE, Step, Threads, listed


def whole(m: Threads, here: np.ndarray, each: Instruction) -> None:
    """All lanes of a warp do this together; those that ended may be missing, but for matrices."""
    gone = (m.at == NOWHERE) & (each.name[0] != "mma")
    together = (here | gone).reshape(-1, WARP).all(1)
    if (here.reshape(-1, WARP).any(1) & ~together).any():
        raise Fault(f"some lanes of a warp alone come to {'.'.join(each.name)}")


def barrier(m: Threads, each: Instruction) -> Step:
    """bar.sync and bar.red of a block, bar.warp.sync of a warp."""
    if each.name[1] == "warp":
        return lambda here: whole(m, here, each)
    joined = _joined(m, each) if each.name[1] == "red" else None
    if each.name[1] not in ("sync", "red"):
        raise ValueError(f"PTX that is not known: {'.'.join(each.name)}")

    def wait(here: np.ndarray) -> None:
        whole(m, here, each)
        m.waits[here] = True
        m.joined = joined

    return wait


def _joined(m: Threads, each: Instruction) -> Step:
    """Whether something holds for any, or for all, of the threads that meet."""
    if each.name[2] not in ("or", "and"):
        raise ValueError(f"PTX that is not known: {'.'.join(each.name)}")
    to, asked = m.destination(each.operands[0]), m.registers[each.operands[-1].lstrip("!")]
    turned, join = each.operands[-1].startswith("!"), np.any if each.name[2] == "or" else np.all
    return lambda here: m.put(to, np.full(m.threads, join(asked[here] ^ turned)), here)


def shuffle(m: Threads, each: Instruction) -> Step:
    """shfl: a number of another lane."""
    to, source, by, rest, _ = each.operands
    to, _, too = to.partition("|")
    to, source = m.destination(to), m.source(source, np.dtype("u4"))
    by, rest = m.source(by, np.dtype("u4")), m.source(rest, np.dtype("u4"))
    how = each.name[2]
    if how not in ("bfly", "down", "up", "idx"):
        raise ValueError(f"PTX that is not known: {'.'.join(each.name)}")
    lane = (m.lane % WARP).astype(np.int64)

    def shuffle(here: np.ndarray) -> None:
        whole(m, here, each)
        last, first = rest.astype(np.int64) & 31, rest.astype(np.int64) >> 8 & 31
        by_, lowest = by.astype(np.int64) & 31, lane & first
        if how == "idx":
            asked = lowest | (by_ & ~first)
        else:
            asked = {"bfly": lane ^ by_, "down": lane + by_, "up": lane - by_}[how]
        there = asked >= last if how == "up" else asked <= (lowest | (last & ~first))
        asked = np.where(there, asked, lane)
        m.put(to, source[m.lane - lane + asked], here)
        if too:
            m.put(m.registers[too], there, here)

    return shuffle


def matrices(m: Threads, each: Instruction) -> Step:
    """mma: products of matrices that lie among the lanes of a warp."""
    if each.name[3:] != ("m16n8k8", "row", "col", "f32", "tf32", "tf32", "f32"):
        raise ValueError(f"PTX that is not known: {'.'.join(each.name)}")
    to, a, b, c = (listed(part) for part in each.operands)
    to = [m.destination(part) for part in to]
    a, b, c = ([m.source(part, np.dtype("f4")) for part in parts] for parts in (a, b, c))

    def multiply(here: np.ndarray) -> None:
        whole(m, here, each)
        for register, found in zip(to, operations.matrices(a, b, c), strict=True):
            m.put(register, found, here)

    return multiply
