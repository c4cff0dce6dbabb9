"""The head of a GGUF file: what it says of the model, and where its tensors lie. Their data is not read.

The library's reader makes an array of every word of a vocabulary, which takes seconds; here they are passed over.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rwkvpipe.base.errors import WeightsError

MAGIC, VERSIONS = b"GGUF", (2, 3)
TEXT, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
ALIGNED = 32  # what tensors begin at a multiple of, if the file says nothing else
DEEPEST = 4  # arrays in arrays, and dimensions of a tensor


@dataclass(frozen=True)
class Place:
    """A tensor: its shape (rows first), the number of its type, the byte it begins at (from where tensors begin)."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Head:
    """Facts by key (arrays left out), tensors by name, the byte where tensors begin."""

    facts: dict[str, Any]
    places: dict[str, Place]
    start: int


class _Reader:
    """Numbers and texts of a file one after the other. Raises EOFError at its end."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.left = file, size

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise EOFError(f"{count} bytes more are promised than there are")
        self.left -= count
        return self.file.read(count)

    def skip(self, count: int) -> None:
        if count > self.left:
            raise EOFError(f"{count} bytes more are promised than there are")
        self.left -= count
        self.file.seek(count, 1)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of a type; of an array nothing."""
        if kind == TEXT:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY or depth == DEEPEST:
            raise ValueError(f"a value of type {kind}, which there is not")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[inner]))
            return None
        for _ in range(count):
            if inner == TEXT:
                self.skip(self.number("Q"))
            else:
                self.value(inner, depth + 1)
        return None


def read_head(path: Path) -> Head:
    """Read the head of a GGUF file. Raises WeightsError when it is damaged or of another version."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            return _head(_Reader(file, size), size)
    except (EOFError, ValueError, struct.error, OverflowError) as error:
        raise WeightsError(f"{path}: damaged or cut short ({error}); fetch it again") from None


def _head(reader: _Reader, size: int) -> Head:
    if reader.take(4) != MAGIC:
        raise ValueError("it does not begin as GGUF")
    if (version := reader.number("I")) not in VERSIONS:
        raise ValueError(f"version {version}, known are 2 and 3 with the lowest byte first")
    tensors, facts = reader.number("Q"), {}
    for _ in range(reader.number("Q")):
        key = reader.text()
        facts[key] = reader.value(reader.number("I"))
    places: dict[str, Place] = {}
    for _ in range(tensors):
        name, count = reader.text(), reader.number("I")
        if count > DEEPEST or name in places:
            raise ValueError(f"tensor {name[:60]} stands twice, or has {count} dimensions")
        shape = tuple(reversed([reader.number("Q") for _ in range(count)]))
        places[name] = Place(shape, reader.number("I"), reader.number("Q"))
        if math.prod(shape) > 8 * size:
            raise ValueError(f"{name[:60]} is larger than the file")
    aligned = facts.get("general.alignment", ALIGNED)
    if not isinstance(aligned, int) or aligned < 1:
        raise ValueError("general.alignment is no number")
    return Head(facts, places, -(-(size - reader.left) // aligned) * aligned)
