"""The library that nvcc makes for a card, on a runtime that runs its PTX here: what Python calls is the real thing."""

import ctypes
import os
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from torch import Tensor

from benchmarks.ptx.machine import Machine
from benchmarks.ptx.memory import Memory
from benchmarks.ptx.program import Kernel, kernels
from benchmarks.ptx.turns import Turns
from rwkvpipe.base import compiler
from rwkvpipe.base.lock import lock
from rwkvpipe.kernel import gpu

RUNTIME = Path(__file__).with_name("runtime.cpp")
FLAGS = (*gpu.FLAGS, "-cudart", "none")
MOST, CAPABILITY = 227 * 1024, 9  # of an H100: bytes of shared memory that a block may have, compute capability
ILLEGAL = 700  # the status of a kernel that read or wrote what it must not


def made(target: str = "sm_90a") -> Path:
    """A folder with the library for a target and the PTX it was made of. Raises one of `compiler.FAILURES`."""
    words = compiler.nvcc()
    if words is None:
        raise OSError("there is no nvcc")
    said = compiler.version(words)
    name = compiler.short_digest(gpu.name(*FLAGS), target, RUNTIME.read_bytes(), said)
    home = compiler.folder() / f"ptx-{target}-{name}"
    home.parent.mkdir(parents=True, exist_ok=True)
    held = lock(home.with_suffix(".lock"), waiting="the kernels on paper: being compiled")
    try:
        if not home.exists():
            _make(words, target, home)
    finally:
        os.close(held)
    return home


def _make(words: list[str], target: str, home: Path) -> None:
    with tempfile.TemporaryDirectory(dir=home.parent) as beside:
        folder = Path(beside) / "made"
        folder.mkdir()
        kept = ["--keep", "--keep-dir", str(folder), "--threads", "2"]
        command = [*words, *FLAGS, *kept, f"-arch={target}", *map(str, [*gpu.sources(), RUNTIME])]
        subprocess.run([*command, "-o", str(folder / "card.so")], check=True, capture_output=True, text=True)
        for file in set(folder.iterdir()) - {folder / "card.so", *folder.glob(f"*.compute_{target[3:]}.ptx")}:
            file.unlink()
        folder.rename(home)


class Card:
    """A card on paper. For each kernel that ran `counts` has what it did, `blocks` how many blocks of it there were,
    `shared` the bytes of shared memory of each, and `followed` how often it began before its turn."""

    def __init__(self, folder: Path, capability: int = CAPABILITY):
        self.capability = capability
        self.programs: dict[str, Kernel] = {}
        for file in sorted(folder.glob("*.ptx")):
            self.programs |= kernels(file.read_text())
        self.memory = Memory()
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.blocks: Counter[str] = Counter()
        self.followed: Counter[str] = Counter()
        self.shared: dict[str, int] = {}
        self.failed: list[Exception] = []
        self.library = gpu.loaded(folder / "card.so")
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_void_p),
        )
        self._told = kind(self._launched)

    def names(self) -> dict[str, Callable]:
        """What takes the place of names of kernel/gpu.py."""
        return {"at_hand": lambda device: (self.library, "on paper"), "_started": self.start}

    @contextmanager
    def computes(self) -> Iterator[None]:
        """Inside, tensors on the CPU go where those on a card would go, to the code that nvcc made for one."""
        with mock.patch.multiple(gpu, **self.names()):
            yield

    def start(self, library: ctypes.CDLL, function: str, sizes: Sequence[int], *given) -> int:
        """What `gpu` calls to start a kernel. Raises Fault where it does what it must not."""
        self.memory.areas.clear()
        for each in given:
            for tensor in each if isinstance(each, list | tuple) else [each]:
                if isinstance(tensor, Tensor):
                    self.memory.allow(tensor.data_ptr(), tensor.nbytes)
        self.memory.turns = Turns()
        self.library.runtime_tell(self._told, ctypes.c_size_t(MOST), self.capability)  # cards may share one library
        words = [gpu.build.word(x) for x in given]
        status = getattr(library, function)(gpu._array(sizes), ctypes.c_int64(0), *words)
        if self.failed:
            raise self.failed.pop()
        return status

    def _launched(self, name: bytes, blocks: int, threads: int, shared: int, follows: int, words) -> int:
        try:
            program = self.programs[name.decode()]
            self.memory.turns.begin(bool(follows))
            given = ctypes.string_at(words[0], program.size)
            machine = Machine(program, threads, self.memory, given, bool(follows))
            for block in range(blocks):
                machine.run(block, shared)
            self.counts[program.name] += machine.counts
            self.blocks[program.name] += blocks
            self.followed[program.name] += follows
            self.shared[program.name] = shared
        except Exception as error:  # a callback must not raise
            self.failed.append(error)
            return ILLEGAL
        return 0
