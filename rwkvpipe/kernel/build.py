"""Which form of the operators runs here: the native one, compiled at first use and kept, else the PyTorch one.

How they are compiled, and where they are kept, says base/compiler.py.
"""

import ctypes
import logging
import platform
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import torch

from rwkvpipe.base import compiler
from rwkvpipe.kernel import takes

log = logging.getLogger("rwkvpipe")

SOURCES = Path(__file__).resolve().parents[1] / "cuda"
TRACKED_FILES = ["../cuda/*.cpp", "../cuda/*.h"]
COMMON = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
# what a processor can do, as torch calls it: what the compiler may use
AVX512 = ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma")
VNNI = (*AVX512, "-mavx512vnni")
X86 = {
    "AVX512-BF16": (*VNNI, "-mavx512bf16"),
    "AVX512-VNNI": VNNI,
    "AVX512": AVX512,
    "AVX2": ("-mavx2", "-mfma"),
    "DEFAULT": (),
}
NEWEST = {"AVX512-BF16": "vdpbf16ps %zmm0, %zmm0, %zmm0", "AVX512-VNNI": "vpdpbusd %zmm0, %zmm0, %zmm0"}
_said: set[tuple] = set()


def levels() -> dict[str, tuple[str, ...]]:
    """The vector units that processors of this kind may have, with the compiler's flags for each."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return X86
    return {"NEON" if platform.machine().lower() in ("aarch64", "arm64") else "DEFAULT": ()}


def supports(what: str) -> bool:
    """Whether torch knows that this processor has some instructions, by its name for them."""
    asked = getattr(torch.cpu, f"_is_{what}_supported", None)
    return asked is not None and asked()


def _had() -> list[str]:
    """Those of `levels` that this processor has, best first; ATEN_CPU_CAPABILITY can ask torch, and so us, for less."""
    found, known = torch.backends.cpu.get_cpu_capability(), list(levels())
    if found == "AVX512" and supports("vnni"):
        found = "AVX512-BF16" if supports("avx512_bf16") else "AVX512-VNNI"
    best = next((each for each in known if found.startswith(each)), known[-1])
    return known[known.index(best) :]


def makes(which: str) -> bool:
    """Whether there can be code of a level: the compiler knows it or, where there is none, it is there."""
    if compiler.command() is None:
        return bool(compiler.kept(name(which)))
    return compiler.knows(levels()[which], NEWEST.get(which, ""))


def level() -> str:
    """The best of `levels` that this processor has and of which there can be code."""
    had = _had()
    return next(filter(makes, had), had[0])


def why_lesser() -> str:
    """In parentheses, why `level` is not the best that this processor has; nothing where it is."""
    best = _had()[0]
    return "" if best == level() else f" (no compiler here that knows {best})"


def _sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cpp"))


def name(which: str) -> str:
    """What the file of a level is called, but for the compiler: another one for other sources or flags."""
    files = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    parts = [part for file in files for part in (file.name, file.read_bytes())]
    return f"{platform.machine()}-{which.lower()}-{compiler.short_digest(*COMMON, *levels()[which], *parts)}"


def compiled(which: str) -> tuple[Path, str]:
    """The library of a level, and the compiler's name; compiled now if need be.

    Raises one of `compiler.FAILURES`: no compiler, or it fails, or nothing can be written.
    """
    return compiler.compiled(name(which), [*COMMON, *levels()[which]], _sources(), "the native kernels")


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None; and the compiler's name, or why there is none."""
    if compiler.turned_off():
        return None, "RWKVPIPE_KERNELS turns them off"
    try:
        path, said = compiled(level())
        return opened(path), said
    except compiler.FAILURES as error:
        return None, compiler.reason(error)


def opened(path: Path) -> ctypes.CDLL:
    """A library of native operators, whose functions know what they are handed. Raises OSError for none."""
    library = ctypes.CDLL(str(path))
    for function in (library.wkv7_kept, library.wkv6_kept, library.blend_tasks, library.multiply_bf16):
        function.restype = ctypes.c_int64
    for function, (_, places) in takes.functions().items():
        kinds = [ctypes.c_void_p if place.pointer or place.many else ctypes.c_float for place in places]
        getattr(library, function).argtypes = [ctypes.c_void_p, ctypes.c_int, *kinds]
    return library


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


def call(function: str, sizes: Sequence[int], *given: takes.Given) -> None:
    """Run a native operator over tensors without gaps, or lists of them, on as many threads as torch uses.

    Raises TypeError or ValueError, and reads nothing, where they are not what it `takes`.
    """
    takes.check(function, sizes, given)
    words = [x.data_ptr() if isinstance(x, torch.Tensor) else word(x) for x in given]
    getattr(extension(), function)(_array(tuple(sizes)), torch.get_num_threads(), *words)


@lru_cache(maxsize=4096)
def _array(sizes: tuple[int, ...]) -> ctypes.Array:
    """Sizes as native functions read them."""
    return (ctypes.c_int64 * len(sizes))(*sizes)


def words(tensors: Sequence[torch.Tensor | None]) -> ctypes.Array:
    """Where tensors without gaps lie, as native functions take a list of them; whoever calls keeps them alive."""
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


def word(x: takes.Given) -> ctypes.c_void_p | ctypes.Array | ctypes.c_float | None:
    """What a native function is handed: where a tensor or a list of them lies, or a number."""
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, float):
        return ctypes.c_float(x)
    return x if x is None or isinstance(x, ctypes.Array) else words(x)


def announce(operator: str, device: str, *, natively: bool = False) -> None:
    """Say once which kernel computes `operator` on `device`, and why."""
    count = torch.get_num_threads()
    if (case := (operator, device, natively and count)) in _said:
        return
    _said.add(case)
    if natively:
        threads = f"{count} thread{'s' * (count > 1)}, {compiler.why_threads(count)}"
        line = f"kernel: {operator} native on {device}, {level()}{why_lesser()}, {threads} ({_loaded()[1]})"
    else:
        reason = "they compute in fp32 on the CPU" if extension() else why_not()
        line = f"kernel: {operator} in PyTorch, by chunks, on {device} (native kernels: {reason})"
    log.info("%s", line)
