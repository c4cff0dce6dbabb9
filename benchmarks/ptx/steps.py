"""Each instruction as a function of the threads that come to it."""

import numpy as np

from benchmarks.ptx import access, operations, together
from benchmarks.ptx.fault import Fault
from benchmarks.ptx.program import Instruction
from benchmarks.ptx.threads import NOWHERE, Step, Threads, listed


def step(m: Threads, each: Instruction) -> Step:
    """An instruction; raises ValueError for one that is not known."""
    special = {
        "ld": access.load,
        "st": access.store,
        "mov": _move,
        "cvt": _convert,
        "setp": _compare,
        "selp": _select,
        "bra": _branch,
        "shfl": together.shuffle,
        "mma": together.matrices,
        "bar": together.barrier,
        "ldmatrix": access.load_matrices,
        "cp": access.copy,
        "griddepcontrol": _take_turn,
    }
    what = each.name[0]
    if what in special:
        return _guarded(m, each, special[what](m, each))
    if what in ("ret", "exit"):
        return _guarded(m, each, lambda here: m.at.__setitem__(here, NOWHERE))
    if what == "trap":
        return _guarded(m, each, lambda here: _trap(m, here))
    if what in ("prefetch", "fence", "membar"):
        return lambda here: None
    if what == "cvta":
        return _guarded(m, each, _copy(m, *each.operands, np.dtype("u8")))
    return _guarded(m, each, _plain(m, each))


def _guarded(m: Threads, each: Instruction, step: Step) -> Step:
    if each.guard is None:
        return step
    guard = m.registers[each.guard]

    def guarded(here: np.ndarray) -> None:
        some = here & (~guard if each.unless else guard)
        if some.any():
            step(some)

    return guarded


def _take_turn(m: Threads, each: Instruction) -> Step:
    """Wait for the kernels before, or let the next one begin; it begins after this one here."""
    if each.name[1] not in ("wait", "launch_dependents"):
        raise ValueError(f"PTX that is not known: {'.'.join(each.name)}")
    waits = each.name[1] == "wait"
    return lambda here: m.turn.__setitem__(here, m.turn[here] | waits)


def _trap(m: Threads, here: np.ndarray) -> None:
    raise Fault(f"a trap, of thread {int(m.lane[here][0])}")


def _plain(m: Threads, each: Instruction) -> Step:
    function, takes, _ = operations.plain(each.name)
    to, *words = each.operands
    to = m.destination(to)
    shift = each.name[0] in ("shl", "shr")
    sources = [m.source(w, np.dtype("u4") if shift and n else takes) for n, w in enumerate(words)]
    if each.name[0] == "mad" and "wide" in each.name:
        sources[2] = m.source(words[2], to.dtype)
    return lambda here: m.put(to, function(*sources), here)


def _copy(m: Threads, to: str, source: str, of: np.dtype) -> Step:
    to, source = m.destination(to), m.source(source, of)
    return lambda here: np.copyto(to.view(of), source, where=here)


def _move(m: Threads, each: Instruction) -> Step:
    of, (to, source) = operations.kind(each.name), each.operands
    half = np.dtype(f"u{of.itemsize // 2}") if of.itemsize > 1 else None
    if source.startswith("{"):
        parts = [m.source(part, half) for part in listed(source)]
        whole = m.destination(to)
        return lambda here: m.put(whole, np.stack(parts, 1).ravel().view(whole.dtype), here)
    if to.startswith("{"):
        parts, whole = [m.destination(part) for part in listed(to)], m.source(source, of)

        def apart(here: np.ndarray) -> None:
            halves = np.ascontiguousarray(whole).view(half).reshape(-1, 2).T.copy()
            for part, found in zip(parts, halves, strict=True):
                m.put(part, found, here)

        return apart
    return _copy(m, to, source, of)


def _convert(m: Threads, each: Instruction) -> Step:
    named = [part for part in each.name if part in operations.TYPES]
    to, *sources = each.operands
    to, sources = m.destination(to), [m.source(word, operations.TYPES[named[-1]]) for word in sources]
    return lambda here: m.put(to, operations.converted(each.name, *sources), here)


def _compare(m: Threads, each: Instruction) -> Step:
    of, (to, *words) = operations.kind(each.name), each.operands
    to = m.destination(to)
    a, b = (m.source(word, of) for word in words[:2])
    if len(words) == 3:
        more, join = m.registers[words[2].lstrip("!")], operations.LOGIC[each.name[2]]
        turned = words[2].startswith("!")

        def both(here: np.ndarray) -> None:
            m.put(to, join(operations.compare(each.name, a, b), ~more if turned else more), here)

        return both
    return lambda here: m.put(to, operations.compare(each.name, a, b), here)


def _select(m: Threads, each: Instruction) -> Step:
    of, (to, yes, no, which) = operations.kind(each.name), each.operands
    to, yes, no = m.destination(to), m.source(yes, of), m.source(no, of)
    which = m.registers[which]
    return lambda here: m.put(to, np.where(which, yes, no), here)


def _branch(m: Threads, each: Instruction) -> Step:
    to = m.kernel.labels[each.operands[-1]]

    def branch(here: np.ndarray) -> None:
        m.at[here] = to

    return branch
