"""A piece of work: a file or a range of it, which can be read by itself; and the places in it, for errors."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property

from rwkvpipe.base.pace import Pace

BLOCK = 1 << 20


@dataclass(frozen=True)
class Unit:
    """A part of a file: bytes `start` to `stop` of lines, groups of a table, rows of an array; or all of it.

    `kind` is one of data.kind's; `packed` how the file is compressed; `first` counts the rows before the unit, and
    `lines` the lines, where they were counted.
    """

    path: str
    kind: str
    packed: str = ""
    start: int = 0
    stop: int | None = None
    first: int = 0
    weight: int = 0  # bytes of the file, for progress
    lines: int | None = None

    @property
    def whole(self) -> bool:
        """Whether it is all of a file."""
        return self.stop is None

    @cached_property
    def lines_before(self) -> int:
        """Lines of the file before the unit: where nobody counted them, they are when an error asks."""
        if self.lines is not None:
            return self.lines
        left, lines = self.start, 0
        with open(self.path, "rb") as file:
            while left and (block := file.read(min(BLOCK, left))):
                left -= len(block)
                lines += block.count(b"\n")
        return lines


class Place:
    """A line or row of a unit, counted from 1; as text it names the file and counts from the file's beginning."""

    __slots__ = ("number", "unit", "word")

    def __init__(self, unit: Unit, number: int, word: str = ""):
        self.unit, self.number, self.word = unit, number, word

    def __str__(self) -> str:
        if self.word:
            return f"{self.unit.path}: {self.word} {self.unit.first + self.number}"
        return f"{self.unit.path}:{self.unit.lines_before + self.number}"


def survey(path: str, borders: list[int]) -> tuple[str, list[int]]:
    """sha256 of a file in hex, and how many lines end before each of some places in it, which ascend."""
    found, lines, place, hashed = [], 0, 0, hashlib.sha256()
    with open(path, "rb") as file:
        pace = Pace(f"{path}: its digest", os.fstat(file.fileno()).st_size)
        for border in [*borders, None]:
            while border is None or place < border:
                block = file.read(BLOCK if border is None else min(BLOCK, border - place))
                if not block:
                    break
                place += len(block)
                lines += block.count(b"\n")
                hashed.update(block)
                pace.at(place)
            if border is not None:
                found.append(lines)
    return hashed.hexdigest(), found
