"""Native code compiled at first use and kept; of processes that start at once one compiles, the others wait for it.

The sources in `cuda/` know nothing of torch or Python, so that they compile in seconds. What was compiled is kept in
the user's cache folder under a name that tells its sources, flags and compiler: another of these is another file.

    RWKVPIPE_KERNELS   `torch` turns native code off; anything else is the folder to keep it in
    RWKVPIPE_PRODUCTS  `torch` or `own`: whose products of fp32 compute, where that is not found out by time
    CXX                the compiler; else g++, c++ or clang++, whichever there is
    CUDACXX            the compiler for NVIDIA's cards; else nvcc, on the path or where CUDA_HOME has it
"""

import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from rwkvpipe.base.errors import ConfigError
from rwkvpipe.base.files import atomic
from rwkvpipe.base.lock import lock

log = logging.getLogger("rwkvpipe")

PATIENCE = 600.0  # seconds that a compiler may take
# what compiling and loading may raise where it is to be done without; RuntimeError is a user without a home
FAILURES = (OSError, RuntimeError, subprocess.SubprocessError)
HEADERS = (".h", ".cuh")


def turned_off() -> bool:
    """Whether the user wants no native code."""
    return os.environ.get("RWKVPIPE_KERNELS") == "torch"


def products() -> str | None:
    """Whose products of fp32 the user wants, if that is said. Raises ConfigError for what there is not."""
    asked = os.environ.get("RWKVPIPE_PRODUCTS") or None
    if asked not in (None, "torch", "own"):
        raise ConfigError(f"RWKVPIPE_PRODUCTS: {asked!r} in the environment is neither torch nor own; unset it")
    return asked


def why_threads(count: int) -> str:
    """Why so many threads compute."""
    if os.environ.get("OMP_NUM_THREADS") == str(count):
        return "as OMP_NUM_THREADS says"
    return "one a core" if count == cores() else f"as torch was told, of {cores()} cores"


def cores() -> int | None:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def folder() -> Path:
    """Where what was compiled is kept."""
    asked = os.environ.get("RWKVPIPE_KERNELS")
    if asked:
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkvpipe"


def command() -> list[str] | None:
    """The C++ compiler as the words of a command, or None."""
    asked = os.environ.get("CXX")
    if asked:
        return shlex.split(asked)
    return next(([found] for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None)


def nvcc() -> list[str] | None:
    """The compiler for NVIDIA's cards as the words of a command, or None."""
    asked = os.environ.get("CUDACXX")
    if asked:
        return shlex.split(asked)
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    return [found] if found else None


def short_digest(*parts: str | bytes) -> str:
    """Sixteen letters that tell these parts from others."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(f"{len(data)} ".encode() + data)
    return found.hexdigest()[:16]


def reason(error: Exception) -> str:
    """Why something failed, in one line."""
    return re.sub(r"\s+", " ", str(error)).strip()[:300]


def version(words: list[str]) -> str:
    """What a compiler says it is. Raises OSError if it does not start."""
    said = subprocess.run([*words, "--version"], capture_output=True, text=True, timeout=PATIENCE)
    if said.returncode:
        raise OSError(f"{shlex.join(words)} --version ends with status {said.returncode}")
    lines = said.stdout.splitlines() or [""]
    return next((line for line in lines if ", release " in line), lines[0]).strip()  # nvcc's first line tells nothing


@cache
def _knows(words: tuple[str, ...], flags: tuple[str, ...], instruction: str) -> bool:
    try:
        _run([*words, *flags, "-c", "-x", "c++", "-", "-o", os.devnull], f'asm("{instruction}");')
    except FAILURES:
        return False
    return True


def knows(flags: Sequence[str], instruction: str) -> bool:
    """Whether the C++ compiler takes these flags, and its assembler an instruction, which old ones may not."""
    words = command()
    return words is not None and _knows(tuple(words), tuple(flags), instruction)


def kept(name: str) -> list[Path]:
    """The libraries called `name` that are there, whatever compiled them."""
    return sorted(folder().glob(f"{name}-*.so"))


def compiled(
    name: str,
    flags: Sequence[str],
    sources: Sequence[Path],
    what: str,
    found: Callable[[], list[str] | None] = command,
) -> tuple[Path, str]:
    """The library called `name` (which tells its sources and flags), and the compiler's name; compiled now if need be.

    `what` it is stands in the log; `found` gives the compiler, `command` or `nvcc`. Raises one of FAILURES: no
    compiler, or it fails, or nothing can be written.
    """
    words, home = found(), folder()
    if words is None:
        ready = kept(name)
        if ready:
            return ready[0], "compiled elsewhere"
        raise OSError("there is no nvcc" if found is nvcc else "there is no C++ compiler: install g++")
    said = version(words)
    path = home / f"{name}-{short_digest(*words, said)}.so"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        begun = _files(sources)  # as they are, not as they will be after a wait
        held = _wait_for(path, what)
        try:
            if not path.exists():
                log.info("compiling %s, once: %s", what, path)
                _compile(words, flags, sources, path, begun)
        finally:
            if held is not None:
                os.close(held)
    return path, said


def _wait_for(path: Path, what: str) -> int | None:
    """Hold the lock of who compiles; None on a disk without locks, where several may do the same work."""
    try:
        return lock(path.with_suffix(".lock"), waiting=f"{what}: being compiled")
    except OSError as error:
        log.debug("%s: %s", path, error)
        return None


def _compile(words: list[str], flags: Sequence[str], sources: Sequence[Path], path: Path, begun: list) -> None:
    """Every source on its own, as many at a time as there are cores, the longest first; then all of them together.

    Raises OSError if the files beside them are not those that `begun`: the library would not be what its name says.
    """
    with atomic(path, suffix=".so") as part, TemporaryDirectory() as room:
        ordered = sorted(sources, key=lambda source: source.stat().st_size, reverse=True)
        objects = [f"{room}/{source.stem}.o" for source in ordered]
        calls = [[*words, *flags, "-c", str(source), "-o", made] for source, made in zip(ordered, objects, strict=True)]
        with ThreadPoolExecutor(cores()) as pool:
            list(pool.map(_run, calls))
        told = ("-x", "none") if "-x" in flags else ()  # in whatever language sources are, objects are in none
        _run([*words, *flags, *told, *objects, "-o", str(part)])
        if _files(sources) != begun:
            raise OSError("the sources changed while they were compiled: start again")


def _files(sources: Sequence[Path]) -> list[tuple[str, int, int]]:
    """What a compiler reads, the sources and whatever header lies beside one, as it is now."""
    headers = (file for home in {source.parent for source in sources} for file in home.iterdir())
    files = sorted({*sources, *(file for file in headers if file.suffix in HEADERS)})
    return [(str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]


def _run(call: list[str], source: str | None = None) -> None:
    try:
        done = subprocess.run(call, input=source, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise OSError(f"{call[0]} took more than {PATIENCE:.0f} seconds") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise OSError(f"{call[0]} fails: {(lines or ['it says nothing'])[0].strip()}")
