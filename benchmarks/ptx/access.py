"""Instructions that read and write memory, shared or not, and what it costs a card."""

import numpy as np

from benchmarks.ptx import operations
from benchmarks.ptx.fault import Fault
from benchmarks.ptx.memory import WARP, sectors, wavefronts
from benchmarks.ptx.program import Instruction
from benchmarks.ptx.threads import Step, Threads, listed
from benchmarks.ptx.together import whole


def _address(m: Threads, text: str) -> tuple[np.ndarray, int]:
    """What stands in brackets: a register or a name, and what is added."""
    name, _, more = text.strip("[]").partition("+")
    base = name.strip()
    if base.startswith("%"):
        register = m.registers[base]
        return register.view(f"u{register.dtype.itemsize}"), int(more or "0", 0)
    return m.source(base, np.dtype("u8")), int(more or "0", 0)


def _where(m: Threads, each: Instruction, place: tuple[np.ndarray, int], here: np.ndarray, size: int) -> np.ndarray:
    """Of each thread where it reads or writes; what that costs is counted."""
    base, more = place
    at = base[here].astype(np.int64) + more
    if each.name[1] == "global":
        m.counts["sectors"] += sectors(at, size, m.lane[here])
    elif each.name[1] == "shared":
        m.counts["wavefronts"] += wavefronts(at, size, m.lane[here])
    return at


def load(m: Threads, each: Instruction) -> Step:
    """A load of one, two or four numbers."""
    to, source = each.operands
    of, count = operations.kind(each.name), next((int(p[1]) for p in each.name if p in ("v2", "v4")), 1)
    names = listed(to) if to.startswith("{") else [to]
    targets, place, space = [m.destination(name) for name in names], _address(m, source), each.name[1]
    if space not in ("param", "global", "shared"):
        raise ValueError(f"PTX that is not known: {'.'.join(each.name)}")

    def load(here: np.ndarray) -> None:
        at = _where(m, each, place, here, of.itemsize * count)
        if space != "param" and (at % (of.itemsize * count)).any():
            raise Fault(f"{'.'.join(each.name)} at a place that is not aligned")
        for n, target in enumerate(targets):
            to = at + n * of.itemsize
            if space == "param":
                found = m.parameters[to[0] : to[0] + of.itemsize].view(of)
                m.put(target, found, here)
                continue
            bits = (
                m.memory.read(to, of.itemsize, m.turn[here])
                if space == "global"
                else m.shared.read(to, of.itemsize, m.warp_bit[here])
            )
            all_ = np.zeros(m.threads, of)
            all_[here] = bits.view(of)
            m.put(target, all_, here)

    return load


def load_matrices(m: Threads, each: Instruction) -> Step:
    """ldmatrix: rows of 16 bytes, whose places eight lanes give for each matrix; a lane gets four bytes of a row."""
    count = next((int(part[1]) for part in each.name if part in ("x1", "x2", "x4")), 0)
    if not count or each.name[-2:] != ("shared", "b16") or "trans" in each.name:
        raise ValueError(f"PTX that is not known: {'.'.join(each.name)}")
    names, (base, more) = listed(each.operands[0]), _address(m, each.operands[1])
    targets, lane = [m.destination(name) for name in names], m.lane % WARP

    def load(here: np.ndarray) -> None:
        whole(m, here, each)
        for n, target in enumerate(targets):
            rows = (base.astype(np.int64) + more)[m.lane - lane + 8 * n + lane // 4]
            if (rows[here] % 16).any():
                raise Fault(f"{'.'.join(each.name)} at a place that is not aligned")
            at = rows + lane % 4 * 4
            m.counts["wavefronts"] += wavefronts(at[here], 4, m.lane[here])
            words = np.zeros(m.threads, np.uint32)
            words[here] = m.shared.read(at[here], 4, m.warp_bit[here])
            m.put(target, words, here)

    return load


def store(m: Threads, each: Instruction) -> Step:
    """A store of one, two or four numbers."""
    target, source = each.operands
    of, count = operations.kind(each.name), next((int(p[1]) for p in each.name if p in ("v2", "v4")), 1)
    names = listed(source) if source.startswith("{") else [source]
    sources, place = [m.source(name, of) for name in names], _address(m, target)
    bits = np.dtype(f"u{of.itemsize}")

    def store(here: np.ndarray) -> None:
        at = _where(m, each, place, here, of.itemsize * count)
        if (at % (of.itemsize * count)).any():
            raise Fault(f"{'.'.join(each.name)} at a place that is not aligned")
        for n, numbers in enumerate(sources):
            to = at + n * of.itemsize
            numbers = np.ascontiguousarray(numbers[here]).view(bits)
            if each.name[1] == "global":
                m.memory.write(to, of.itemsize, numbers, m.turn[here])
            else:
                m.shared.write(to, of.itemsize, numbers, m.warp_bit[here])

    return store


def copy(m: Threads, each: Instruction) -> Step:
    """cp.async: 16 bytes of memory, or zeros if it reads none, go to shared memory; wait_all: they are there."""
    if each.name[2:] == ("wait_all",):
        return lambda here: _arrive(m, here)
    if each.name[2:] != ("cg", "shared", "global") or each.operands[2] != "16" or len(each.operands) != 4:
        raise ValueError(f"PTX that is not known: {'.'.join(each.name)}")
    (to, further), (source, beyond) = (_address(m, operand) for operand in each.operands[:2])
    size = m.source(each.operands[3], np.dtype("u4"))

    def ask(here: np.ndarray) -> None:
        at, some = to.astype(np.int64) + further, here & (size > 0)
        if not np.isin(size[here], (0, 16)).all():
            raise Fault("cp.async of a part of 16 bytes")
        m.counts["wavefronts"] += wavefronts(at[here], 16, m.lane[here])
        m.shared.ask(at[here], 16, m.warp_bit[here])
        words = np.zeros((m.threads, 4), np.uint32)
        if some.any():
            places = source[some].astype(np.int64) + beyond
            m.counts["sectors"] += sectors(places, 16, m.lane[some])
            if (places % 16).any():
                raise Fault("cp.async from a place that is not aligned")
            words[some] = np.stack([m.memory.read(places + n, 4, m.turn[some]) for n in range(0, 16, 4)], 1)
        m.coming.append((here.copy(), at.copy(), words))

    return ask


def _arrive(m: Threads, here: np.ndarray) -> None:
    """All that these threads asked for is there."""
    left = []
    for asked, at, words in m.coming:
        now = asked & here
        m.shared.arrive(at[now], words[now], m.warp_bit[now])
        if (asked & ~here).any():
            left.append((asked & ~here, at, words))
    m.coming = left
