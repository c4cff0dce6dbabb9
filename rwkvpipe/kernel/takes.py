"""What native functions take, as their sources say beside them: checked before any of them reads memory.

Above each function of `cuda/*_cpu.cpp` that `build.call` runs, and of `cuda/*.cu` that `gpu.call` does, stand its sizes
by name and how many numbers lie at each of its pointers, in their order:

    // takes B T D n /x/last: x B*T*D, last B*D, shares n of D, states? room any

Several names may share a count, a sum of products of sizes. `n of` is a list, `?` may be null, `any` is what another
function of the library tells. What the numbers are is the type of the parameter; `void` is fp32 or bf16, and a size
like `/x/last` has a bit for each of these that is bf16.
"""

import ctypes
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).resolve().parents[1] / "cuda"
TRACKED_FILES = ["../cuda/*.cpp", "../cuda/*.cu"]
CPU, CARD = "*_cpu.cpp", "*.cu"
HOST = torch.device("cpu")
EITHER = (torch.float32, torch.bfloat16)
TYPES = {"float": torch.float32, "double": torch.float64, "int32_t": torch.int32, "int64_t": torch.int64}
TYPES |= {"uint8_t": torch.bool, "int8_t": torch.int8}
FUNCTION = re.compile(
    r"^// takes ([\w /]+): (.+(?:\n// .+)*)\n(?:extern \"C\" )?(?:void|int) (\w+)\(([^)]*)\)", re.MULTILINE
)
PARAMETER = re.compile(r"(?:const )?(\w+) (?:(\*)const )?(\*?)(\w+)")

Given = Tensor | Sequence[Tensor] | ctypes.Array | float | None


@dataclass(frozen=True)
class Place:
    """What a parameter reads: numbers of a type (None is one of EITHER), or one number by value."""

    name: str
    dtype: torch.dtype | None
    pointer: bool
    null: bool
    many: str | None
    """How many tensors a list has; None is no list."""
    count: str | None
    """How many numbers a tensor has; None is not told."""

    @property
    def kinds(self) -> tuple[torch.dtype, ...]:
        """The types that it may have."""
        return EITHER if self.dtype is None else (self.dtype,)


def _count(text: str, sizes: Mapping[str, int]) -> int:
    """What a sum of products of sizes comes to; a product may be divided, and a flag may choose one of two."""
    text, _, other = text.partition(" else ")
    if other:
        text, _, flag = text.partition(" if ")
        return _count(text if sizes[flag] else other, sizes)
    total = 0
    for term in text.split("+"):
        above, *below = ([int(n) if n.isdigit() else sizes[n] for n in part.split("*")] for part in term.split("//"))
        total += math.prod(above) // math.prod(map(math.prod, below))
    return total


def _places(said: str, parameters: str) -> list[Place]:
    known = [PARAMETER.fullmatch(" ".join(each.split())).groups() for each in parameters.split(",")[2:]]
    found: list[Place] = []
    for item in " ".join(said.replace("\n//", " ").split()).split(", "):
        words, here = item.split(), []
        while words and len(found) + len(here) < len(known) and words[0].rstrip("?") == known[len(found + here)][-1]:
            here.append(words.pop(0))
        many, _, count = " ".join(words).rpartition(" of ")
        for word in here:
            kind, listed, pointer, name = known[len(found)]
            assert bool(listed) == bool(many) and bool(pointer) == bool(count), (name, item)
            told = None if count == "any" else count or None
            found.append(Place(name, TYPES.get(kind), bool(pointer), word.endswith("?"), many or None, told))
    assert len(found) == len(known), parameters
    return found


@cache
def functions(where: str = CPU) -> dict[str, tuple[list[str], list[Place]]]:
    """Names of the sizes and what parameters read, of each function that says so in the files for CPU or CARD."""
    texts = [file.read_text() for file in sorted(SOURCES.glob(where))]
    found = [match.groups() for text in texts for match in FUNCTION.finditer(text)]
    return {name: (sizes.split(), _places(said, parameters)) for sizes, said, name, parameters in found}


@cache
def _kinds(function: str, where: str) -> list[tuple[int, str]]:
    """The sizes that tell kinds of numbers, and which they are."""
    return [(number, name) for number, name in enumerate(functions(where)[function][0]) if name.startswith("/")]


@lru_cache(maxsize=4096)
def _wanted(
    function: str, sizes: tuple[int, ...], where: str = CPU
) -> list[tuple[Place, tuple[torch.dtype, ...], int | None, int | None]]:
    """What each parameter reads, the types of one tensor (none where it is a list or a number), how many tensors, and
    how many numbers of each."""
    names, places = functions(where)[function]
    if len(sizes) != len(names) or min(sizes) < 0:
        raise ValueError(f"{function}: sizes are {' '.join(names)}, got {sizes}")
    known = dict(zip(names, sizes, strict=True))
    counts = [[None if text is None else _count(text, known) for text in (each.many, each.count)] for each in places]
    kinds = [place.kinds if place.pointer and place.many is None else () for place in places]
    return [(place, kind, *count) for place, kind, count in zip(places, kinds, counts, strict=True)]


def check(
    function: str,
    sizes: Sequence[int],
    given: Sequence[Given],
    where: str = CPU,
    device: torch.device = HOST,
) -> None:
    """Raise TypeError for another type or device than a function reads, ValueError for another number of what it
    reads."""
    wanted = _wanted(function, tuple(sizes), where)
    if len(given) != len(wanted):
        raise TypeError(f"{function} takes {len(wanted)} inputs, got {len(given)}")
    here = device.type == "cpu"
    for (place, kinds, many, count), x in zip(wanted, given, strict=True):
        # most are right, and a step asks some thousands of times: no function is called for these
        if kinds and isinstance(x, Tensor) and x.dtype in kinds and (count is None or x.numel() == count):
            there = x.is_cpu if here else x.device == device
            if there and x.is_contiguous():
                continue
        if x is None and place.null:
            continue
        if not place.pointer:
            if not isinstance(x, float):
                raise TypeError(f"{function}: {place.name} is a number, got {type(x).__name__}")
            continue
        if many is None:
            _check(function, place, x, count, device)
            continue
        if not isinstance(x, Sequence | ctypes.Array) or len(x) != many:
            raise ValueError(f"{function}: {place.name} is a list of {many}")
        if not isinstance(x, ctypes.Array):
            for each in x:
                _check(function, place, each, count, device)
    for number, name in _kinds(function, where):
        by_name = {place.name: x for (place, *_), x in zip(wanted, given, strict=True)}
        _check_bits(function, name, sizes[number], by_name)


def _check(function: str, place: Place, x: Tensor, count: int | None, device: torch.device) -> None:
    if not isinstance(x, Tensor) or x.dtype not in place.kinds or x.device != device:
        kind = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        said = " or ".join(map(str, place.kinds)) + " on " + ("the CPU" if device.type == "cpu" else str(device))
        raise TypeError(f"{function}: {place.name} is {kind}; it reads {said}")
    if count is not None and x.numel() != count:
        raise ValueError(f"{function}: {place.name} is {tuple(x.shape)}; it reads {count} numbers")
    if not x.is_contiguous():
        raise ValueError(f"{function}: {place.name} has gaps, strides {x.stride()}")


def _check_bits(function: str, names: str, bits: int, given: Mapping[str, Given]) -> None:
    for n, name in enumerate(names.removeprefix("/").split("/")):
        for x in [given[name]] if isinstance(given[name], Tensor) else given[name] or ():
            if not isinstance(x, Tensor):
                raise TypeError(f"{function}: {name} are to be tensors, whose kind its sizes say")
            if bool(bits >> n & 1) != (x.dtype == torch.bfloat16):
                raise TypeError(f"{function}: {name} is {x.dtype}, which its sizes deny")
