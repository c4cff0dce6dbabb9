"""A block of threads of a card, in step: the threads that are furthest behind go on, until all have ended or wait.

What a card asks of its threads is asked here, too: all lanes of a warp at what they do together, all threads of a block
at a barrier.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np

from benchmarks.ptx import operations
from benchmarks.ptx.memory import WARP, Fault, Memory, Shared, sectors, wavefronts
from benchmarks.ptx.program import ENDS, Instruction, Kernel

NOWHERE = np.iinfo(np.int32).max  # of a thread that has ended
Step = Callable[[np.ndarray], None]


class Machine:
    """Runs a kernel's blocks; `counts` adds up what a card would have done, warp by warp."""

    def __init__(self, kernel: Kernel, threads: int, memory: Memory, parameters: bytes):
        self.kernel, self.asked, self.memory = kernel, threads, memory
        self.threads = threads = threads + -threads % WARP  # what fills the last warp ends before it begins
        self.parameters = np.frombuffer(parameters + bytes(-len(parameters) % 8), np.uint8)
        self.lane = np.arange(threads)
        self.warp_bit = (np.uint32(1) << (self.lane // WARP).astype(np.uint32)).astype(np.uint32)
        self.counts: Counter[str] = Counter()
        self.registers = self._registers()
        self.special = {
            "%tid.x": self.lane.astype(np.uint32),
            "%tid.y": np.zeros(threads, np.uint32),
            "%ntid.x": np.full(threads, self.asked, np.uint32),
            "%ctaid.x": np.zeros(threads, np.uint32),
            "%laneid": (self.lane % WARP).astype(np.uint32),
        }
        self.shared = Shared(0)
        self.steps = [[self._step(each) for each in block.instructions] for block in kernel.blocks]
        self.ahead = [Counter(self._class(each) for each in block.instructions) for block in kernel.blocks]

    def run(self, block: int, shared: int) -> None:
        """One block, with so many bytes of shared memory. Raises Fault."""
        self.special["%ctaid.x"][:] = block
        self.shared = Shared(shared)
        self.at = np.where(self.lane < self.asked, 0, NOWHERE).astype(np.int32)
        self.waits = np.zeros(self.threads, bool)
        while True:
            ready = np.where(self.waits, NOWHERE, self.at)
            now = int(ready.min())
            if now == NOWHERE:
                if not self.waits.any():
                    return
                self._meet()
                continue
            self._block(now, ready == now)

    def _block(self, now: int, here: np.ndarray) -> None:
        warps = int(here.reshape(-1, WARP).any(1).sum())
        for name, count in self.ahead[now].items():
            self.counts[name] += count * warps
        self.at[here] = now + 1
        with np.errstate(all="ignore"):
            for step in self.steps[now]:
                step(here)

    def _meet(self) -> None:
        """All that have not ended wait at a barrier."""
        if (self.at[: self.asked] == NOWHERE).any():
            raise Fault("some threads of the block have ended and left others at a barrier")
        if len(np.unique(self.at[self.waits])) > 1:
            raise Fault("threads of a block wait at different barriers")
        self.waits[:] = False
        self.shared.meet()

    @staticmethod
    def _class(each: Instruction) -> str:
        what = each.name[0]
        if what in ("ld", "st", "mma", "bar", "shfl", "prefetch"):
            return what + (f".{each.name[1]}" if what in ("ld", "st") else "")
        if each.name[0] in ("fma", "add", "sub", "mul", "max", "min", "ex2", "rcp") and "f32" in each.name:
            return "float" if what not in ("ex2", "rcp") else "special"
        return "branch" if what in ENDS else "other"

    def _registers(self) -> dict[str, np.ndarray]:
        found = {}
        for kind, prefix, count in self.kernel.registers:
            of = operations.TYPES[kind]
            for n in range(count):
                found[f"{prefix}{n}"] = np.zeros(self.threads, of)
        return found

    # operands

    def _source(self, text: str, of: np.dtype) -> np.ndarray:
        """A register, or a number that stands there, seen as a type."""
        if text in self.special:
            return self.special[text].astype(of) if of.itemsize != 4 else self.special[text].view(of)
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

    def _destination(self, text: str) -> np.ndarray | None:
        return None if text == "_" else self.registers[text]

    @staticmethod
    def _put(to: np.ndarray | None, found: np.ndarray, here: np.ndarray) -> None:
        if to is None:
            return
        if found.shape != to.shape:
            found = np.broadcast_to(found, to.shape)
        if not found.flags.c_contiguous:
            found = np.ascontiguousarray(found)
        if found.dtype != to.dtype:
            found = found.view(to.dtype) if found.dtype.itemsize == to.dtype.itemsize else found.astype(to.dtype)
        np.copyto(to, found, where=here)

    # instructions

    def _step(self, each: Instruction) -> Step:
        special = {
            "ld": self._load,
            "st": self._store,
            "mov": self._move,
            "cvt": self._convert,
            "setp": self._compare,
            "selp": self._select,
            "bra": self._branch,
            "shfl": self._shuffle,
            "mma": self._matrices,
            "bar": self._barrier,
        }
        what = each.name[0]
        if what in special:
            return self._guarded(each, special[what](each))
        if what in ("ret", "exit"):
            return self._guarded(each, lambda here: self.at.__setitem__(here, NOWHERE))
        if what == "trap":
            return self._guarded(each, self._trap)
        if what in ("prefetch", "fence", "membar"):
            return lambda here: None
        if what == "cvta":
            return self._guarded(each, self._copy(*each.operands, np.dtype("u8")))
        return self._guarded(each, self._plain(each))

    def _guarded(self, each: Instruction, step: Step) -> Step:
        if each.guard is None:
            return step
        guard = self.registers[each.guard]

        def guarded(here: np.ndarray) -> None:
            some = here & (~guard if each.unless else guard)
            if some.any():
                step(some)

        return guarded

    def _trap(self, here: np.ndarray) -> None:
        raise Fault(f"a trap, of thread {int(self.lane[here][0])}")

    def _plain(self, each: Instruction) -> Step:
        function, takes, _ = operations.plain(each.name)
        to, *words = each.operands
        to = self._destination(to)
        shift = each.name[0] in ("shl", "shr")
        sources = [self._source(w, np.dtype("u4") if shift and n else takes) for n, w in enumerate(words)]
        if each.name[0] == "mad" and "wide" in each.name:
            sources[2] = self._source(words[2], to.dtype)
        return lambda here: self._put(to, function(*sources), here)

    def _copy(self, to: str, source: str, of: np.dtype) -> Step:
        to, source = self._destination(to), self._source(source, of)
        return lambda here: np.copyto(to.view(of), source, where=here)

    def _move(self, each: Instruction) -> Step:
        of, (to, source) = operations.kind(each.name), each.operands
        half = np.dtype(f"u{of.itemsize // 2}") if of.itemsize > 1 else None
        if source.startswith("{"):
            parts = [self._source(part, half) for part in _list(source)]
            whole = self._destination(to)
            return lambda here: self._put(whole, np.stack(parts, 1).ravel().view(whole.dtype), here)
        if to.startswith("{"):
            parts, whole = [self._destination(part) for part in _list(to)], self._source(source, of)

            def apart(here: np.ndarray) -> None:
                halves = np.ascontiguousarray(whole).view(half).reshape(-1, 2).T.copy()
                for part, found in zip(parts, halves, strict=True):
                    self._put(part, found, here)

            return apart
        return self._copy(to, source, of)

    def _convert(self, each: Instruction) -> Step:
        named = [part for part in each.name if part in operations.TYPES]
        to, *sources = each.operands
        to, sources = self._destination(to), [self._source(word, operations.TYPES[named[-1]]) for word in sources]
        return lambda here: self._put(to, operations.converted(each.name, *sources), here)

    def _compare(self, each: Instruction) -> Step:
        of, (to, *words) = operations.kind(each.name), each.operands
        to = self._destination(to)
        a, b = (self._source(word, of) for word in words[:2])
        if len(words) == 3:
            more, join = self.registers[words[2].lstrip("!")], operations.LOGIC[each.name[2]]
            turned = words[2].startswith("!")

            def both(here: np.ndarray) -> None:
                self._put(to, join(operations.compare(each.name, a, b), ~more if turned else more), here)

            return both
        return lambda here: self._put(to, operations.compare(each.name, a, b), here)

    def _select(self, each: Instruction) -> Step:
        of, (to, yes, no, which) = operations.kind(each.name), each.operands
        to, yes, no = self._destination(to), self._source(yes, of), self._source(no, of)
        which = self.registers[which]
        return lambda here: self._put(to, np.where(which, yes, no), here)

    def _branch(self, each: Instruction) -> Step:
        to = self.kernel.labels[each.operands[-1]]

        def branch(here: np.ndarray) -> None:
            self.at[here] = to

        return branch

    def _barrier(self, each: Instruction) -> Step:
        if each.name[1] == "warp":
            return lambda here: self._whole(here, each)
        if each.name[1] != "sync":
            raise ValueError(f"PTX that is not known: {'.'.join(each.name)}")

        def wait(here: np.ndarray) -> None:
            self._whole(here, each)
            self.waits[here] = True

        return wait

    def _whole(self, here: np.ndarray, each: Instruction) -> None:
        """All lanes of a warp do this together; those that ended may be missing, but for matrices."""
        gone = (self.at == NOWHERE) & (each.name[0] != "mma")
        together = (here | gone).reshape(-1, WARP).all(1)
        if (here.reshape(-1, WARP).any(1) & ~together).any():
            raise Fault(f"some lanes of a warp alone come to {'.'.join(each.name)}")

    def _shuffle(self, each: Instruction) -> Step:
        to, source, by, rest, _ = each.operands
        to, _, too = to.partition("|")
        to, source = self._destination(to), self._source(source, np.dtype("u4"))
        by, rest = self._source(by, np.dtype("u4")), self._source(rest, np.dtype("u4"))
        how = each.name[2]
        if how not in ("bfly", "down", "up", "idx"):
            raise ValueError(f"PTX that is not known: {'.'.join(each.name)}")
        lane = (self.lane % WARP).astype(np.int64)

        def shuffle(here: np.ndarray) -> None:
            self._whole(here, each)
            last, first = rest.astype(np.int64) & 31, rest.astype(np.int64) >> 8 & 31
            by_, lowest = by.astype(np.int64) & 31, lane & first
            if how == "idx":
                asked = lowest | (by_ & ~first)
            else:
                asked = {"bfly": lane ^ by_, "down": lane + by_, "up": lane - by_}[how]
            there = asked >= last if how == "up" else asked <= (lowest | (last & ~first))
            asked = np.where(there, asked, lane)
            self._put(to, source[self.lane - lane + asked], here)
            if too:
                self._put(self.registers[too], there, here)

        return shuffle

    def _matrices(self, each: Instruction) -> Step:
        if each.name[3:] != ("m16n8k8", "row", "col", "f32", "tf32", "tf32", "f32"):
            raise ValueError(f"PTX that is not known: {'.'.join(each.name)}")
        to, a, b, c = (_list(part) for part in each.operands)
        to = [self._destination(part) for part in to]
        a, b, c = ([self._source(part, np.dtype("f4")) for part in parts] for parts in (a, b, c))

        def multiply(here: np.ndarray) -> None:
            self._whole(here, each)
            for register, found in zip(to, operations.matrices(a, b, c), strict=True):
                self._put(register, found, here)

        return multiply

    # memory

    def _address(self, text: str) -> tuple[np.ndarray, int]:
        """What stands in brackets: a register or a name, and what is added."""
        name, _, more = text.strip("[]").partition("+")
        base = name.strip()
        if base.startswith("%"):
            register = self.registers[base]
            return register.view(f"u{register.dtype.itemsize}"), int(more or "0", 0)
        return self._source(base, np.dtype("u8")), int(more or "0", 0)

    def _where(self, each: Instruction, text: str, here: np.ndarray, size: int) -> np.ndarray:
        base, more = text
        at = base[here].astype(np.int64) + more
        space = each.name[1]
        if space in ("global", "shared"):
            lanes = self.lane[here]
            if space == "global":
                self.counts["sectors"] += sectors(at, size, lanes)
            else:
                self.counts["wavefronts"] += wavefronts(at, size, lanes)
        return at.astype(np.uint64) if space == "global" else at

    def _load(self, each: Instruction) -> Step:
        to, source = each.operands
        of, count = operations.kind(each.name), next((int(p[1]) for p in each.name if p in ("v2", "v4")), 1)
        names = _list(to) if to.startswith("{") else [to]
        targets, place, space = [self._destination(name) for name in names], self._address(source), each.name[1]
        if space not in ("param", "global", "shared"):
            raise ValueError(f"PTX that is not known: {'.'.join(each.name)}")

        def load(here: np.ndarray) -> None:
            at = self._where(each, place, here, of.itemsize * count)
            if space != "param" and (at % (of.itemsize * count)).any():
                raise Fault(f"{'.'.join(each.name)} at a place that is not aligned")
            for n, target in enumerate(targets):
                to = at + type(at[0])(n * of.itemsize)
                if space == "param":
                    found = self.parameters[to[0] : to[0] + of.itemsize].view(of)
                    self._put(target, found, here)
                    continue
                bits = (
                    self.memory.read(to, of.itemsize)
                    if space == "global"
                    else self.shared.read(to, of.itemsize, self.warp_bit[here])
                )
                all_ = np.zeros(self.threads, of)
                all_[here] = bits.view(of)
                self._put(target, all_, here)

        return load

    def _store(self, each: Instruction) -> Step:
        target, source = each.operands
        of, count = operations.kind(each.name), next((int(p[1]) for p in each.name if p in ("v2", "v4")), 1)
        names = _list(source) if source.startswith("{") else [source]
        sources, place = [self._source(name, of) for name in names], self._address(target)
        bits = np.dtype(f"u{of.itemsize}")

        def store(here: np.ndarray) -> None:
            at = self._where(each, place, here, of.itemsize * count)
            if (at % (of.itemsize * count)).any():
                raise Fault(f"{'.'.join(each.name)} at a place that is not aligned")
            for n, numbers in enumerate(sources):
                to = at + type(at[0])(n * of.itemsize)
                numbers = np.ascontiguousarray(numbers[here]).view(bits)
                if each.name[1] == "global":
                    self.memory.write(to, of.itemsize, numbers)
                else:
                    self.shared.write(to, of.itemsize, numbers, self.warp_bit[here])

        return store


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{}").split(",")]
