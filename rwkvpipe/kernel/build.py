"""Which form of the operators runs here: the native one, compiled at first use and kept, else the PyTorch one.

The sources in `cuda/` know nothing of torch or Python, so that they compile in seconds. What was compiled is kept in
the user's cache folder under a name that tells its sources, flags and compiler: another of these is another file. Of
processes that start at once one compiles, and the others wait for it.

    RWKVPIPE_KERNELS   `torch` turns the native kernels off; anything else is the folder to keep them in
    CXX                the compiler; else g++, c++ or clang++, whichever there is
"""

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from rwkvpipe.base.files import atomic
from rwkvpipe.base.lock import lock

log = logging.getLogger("rwkvpipe")

SOURCES = Path(__file__).resolve().parents[1] / "cuda"
TRACKED_FILES = ["../cuda/*.cpp", "../cuda/*.h"]
COMMON = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
# what a processor can do, as torch calls it: what the compiler may use
X86 = {
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
    "DEFAULT": (),
}
PATIENCE = 600.0  # seconds that a compiler may take
_said: set[str] = set()


def levels() -> dict[str, tuple[str, ...]]:
    """The vector units that processors of this kind may have, with the compiler's flags for each."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return X86
    return {"NEON" if platform.machine().lower() in ("aarch64", "arm64") else "DEFAULT": ()}


def level() -> str:
    """The best of `levels` that this processor has (ATEN_CPU_CAPABILITY can ask torch, and so us, for less)."""
    found = torch.backends.cpu.get_cpu_capability()
    return next((name for name in levels() if found.startswith(name)), list(levels())[-1])


def folder() -> Path:
    """Where compiled kernels are kept."""
    asked = os.environ.get("RWKVPIPE_KERNELS")
    if asked:
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkvpipe"


def compiler() -> list[str] | None:
    """The C++ compiler as the words of a command, or None."""
    asked = os.environ.get("CXX")
    if asked:
        return shlex.split(asked)
    return next(([found] for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None)


def _digest(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(f"{len(data)} ".encode() + data)
    return found.hexdigest()[:16]


def _sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cpp"))


def _name(which: str) -> str:
    """What the file of a level is called, but for the compiler."""
    files = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    parts = [part for file in files for part in (file.name, file.read_bytes())]
    return f"{platform.machine()}-{which.lower()}-{_digest(*COMMON, *levels()[which], *parts)}"


def _version(words: list[str]) -> str:
    """What a compiler says it is. Raises OSError if it does not start."""
    said = subprocess.run([*words, "--version"], capture_output=True, text=True, timeout=PATIENCE)
    if said.returncode:
        raise OSError(f"{shlex.join(words)} --version ends with status {said.returncode}")
    return said.stdout.partition("\n")[0].strip()


def compiled(which: str) -> tuple[Path, str]:
    """The library of a level, and the compiler's name; compiled now if need be.

    Raises OSError where there is no compiler, or it fails, or nothing can be written.
    """
    words, home = compiler(), folder()
    if words is None:
        ready = sorted(home.glob(f"{_name(which)}-*.so"))
        if ready:
            return ready[0], "compiled elsewhere"
        raise OSError("there is no C++ compiler: install g++")
    said = _version(words)
    path = home / f"{_name(which)}-{_digest(*words, said)}.so"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        held = _wait_for(path)
        try:
            if not path.exists():
                _compile([*words, *COMMON, *levels()[which]], path)
        finally:
            if held is not None:
                os.close(held)
    return path, said


def _wait_for(path: Path) -> int | None:
    """Hold the lock of who compiles; None on a disk without locks, where several may do the same work."""
    try:
        return lock(path.with_suffix(".lock"), waiting="the native kernels are being compiled")
    except OSError as error:
        log.debug("%s: %s", path, error)
        return None


def _compile(words: list[str], path: Path) -> None:
    log.info("compiling the native kernels, once: %s", path)
    with atomic(path, suffix=".so") as part:
        command = [*words, *map(str, _sources()), "-o", str(part)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise OSError(f"{words[0]} took more than {PATIENCE:.0f} seconds") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise OSError(f"{words[0]} fails: {(lines or ['it says nothing'])[0].strip()}")


def reason(error: Exception) -> str:
    """Why something failed, in one line."""
    return re.sub(r"\s+", " ", str(error)).strip()[:300]


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None; and the compiler's name, or why there is none."""
    if os.environ.get("RWKVPIPE_KERNELS") == "torch":
        return None, "RWKVPIPE_KERNELS turns them off"
    try:
        path, said = compiled(level())
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: a user without a home
        return None, reason(error)
    library.wkv7_kept.restype = library.blend_tasks.restype = ctypes.c_int64
    return library, said


def extension() -> ctypes.CDLL | None:
    """The native operators, or None where there are none (then `why_not` says why)."""
    return _loaded()[0]


def why_not() -> str:
    """Why `extension` gives None."""
    return _loaded()[1]


def native(*inputs: torch.Tensor) -> ctypes.CDLL | None:
    """The native operators, if they can compute with these: in fp32, on the CPU."""
    fit = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in inputs)
    return extension() if fit else None


def whole(number: int) -> ctypes.c_int64:
    """A count as native functions take it."""
    return ctypes.c_int64(number)


def call(function: str, sizes: tuple[int, ...], *given: torch.Tensor | Sequence[torch.Tensor] | float | None) -> None:
    """Run a native operator over tensors without gaps, or lists of them, on as many threads as torch uses."""
    words = [_word(function, x) for x in given]
    getattr(extension(), function)((ctypes.c_int64 * len(sizes))(*sizes), torch.get_num_threads(), *words)


def _word(function: str, x: torch.Tensor | Sequence[torch.Tensor] | float | None):
    if isinstance(x, torch.Tensor):
        assert x.is_contiguous() and x.dtype == torch.float32, (function, x.dtype, x.stride())
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, float):
        return ctypes.c_float(x)
    return None if x is None else (ctypes.c_void_p * len(x))(*(_word(function, each) for each in x))


def announce(operator: str, device: str, *, natively: bool = False) -> None:
    """Say once which kernel computes `operator` on `device`, and why."""
    if natively:
        threads = torch.get_num_threads()
        line = f"kernel: {operator} native on {device}, {level()}, {threads} threads ({_loaded()[1]})"
    else:
        reason = "they compute in fp32 on the CPU" if extension() else why_not()
        line = f"kernel: {operator} in PyTorch, by chunks, on {device} (native kernels: {reason})"
    if line not in _said:
        _said.add(line)
        log.info("%s", line)
