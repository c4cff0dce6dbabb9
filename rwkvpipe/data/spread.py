"""Tokens that lie in several files, read as if they lay in one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import read_json, write_json


class Spread:
    """Arrays (n,) one after another: `len` is that of all, slices may cross their borders."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, wanted: slice) -> np.ndarray:
        """What stands from `wanted.start` to `wanted.stop`: a view where one part holds it all."""
        start, stop = wanted.start, min(wanted.stop, len(self))
        first = int(np.searchsorted(self.ends, start, "right"))
        found = []
        while start < stop:
            part, before = self.parts[first], int(self.ends[first]) - len(self.parts[first])
            piece = part[start - before : stop - before]
            found.append(piece)
            start, first = start + len(piece), first + 1
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.zeros(0, self.parts[0].dtype if self.parts else np.uint16)


def write_parts(path: Path, prefixes: Sequence[str]) -> None:
    """Say which pairs a corpus's tokens lie in, in their order."""
    write_json(path, {"parts": [str(Path(f"{prefix}.bin").resolve())[: -len(".bin")] for prefix in prefixes]})


def read_parts(path: Path) -> list[str]:
    """The prefixes of the pairs that a corpus's tokens lie in. Raises DataError for a list that is none."""
    found = read_json(path)
    parts = found.get("parts") if isinstance(found, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise DataError(f"{path}: no list of pairs; make the corpus again with rwkvpipe.pack")
    return parts
