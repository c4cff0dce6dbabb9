"""Rows by the thousand: texts that lie in one piece of memory, where nobody makes an object of each."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rwkvpipe.base.errors import DataError
from rwkvpipe.data import lines, scan
from rwkvpipe.data.kind import opened
from rwkvpipe.data.table import Raw, arrow_batches, one_row
from rwkvpipe.data.unit import Place, Unit

FOREIGN = ("parquet", "arrow", "stream")


@dataclass
class Block:
    """Rows of a unit: number (n,) from 1 of each, and where in `data` its text starts and ends.

    A text that starts at -1 is for `odd`, which gives the row as it stands.
    """

    unit: Unit
    data: np.ndarray
    numbers: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    word: str = ""

    def place(self, row: int) -> Place:
        """Where a row came from."""
        return Place(self.unit, int(self.numbers[row]), self.word)

    def odd(self, row: int) -> Raw:
        """A row that must be looked at by itself."""
        raise IndexError(row)


class _Lines(Block):
    """Lines of JSON; `borders` (n, 2) are where each starts and ends."""

    borders: np.ndarray

    def odd(self, row: int) -> Raw:
        start, end = self.borders[row].tolist()
        return self.data[start:end].tobytes()


class _Error(Block):
    """One row that cannot be read."""

    error: DataError

    def odd(self, row: int) -> Raw:
        return self.error


class _Batch(Block):
    """Rows of a batch of one column."""

    batch: object

    def odd(self, row: int) -> Raw:
        found = one_row(self.batch.slice(row, 1))[0]
        return DataError(f"{self.place(row)}: {found}") if isinstance(found, str) else found


def can_be_read(unit: Unit) -> bool:
    """Whether the rows of a unit come in blocks: of lines only where they are read in C++."""
    return unit.kind in FOREIGN or (unit.kind == "lines" and scan.available())


def blocks(unit: Unit, name: str) -> Iterator[Block]:
    """The rows of a unit, whose texts are called `name`. Raises DataError for what is wrong with the file."""
    return _of_lines(unit, name) if unit.kind == "lines" else _of_batches(unit, name)


def _of_lines(unit: Unit, name: str) -> Iterator[Block]:
    none = np.zeros(0, dtype=np.uint8)
    with opened(unit.path, unit.packed, whole=unit.whole) as file:
        for before, found in lines.blocks(unit, file):
            if isinstance(found, DataError):
                block = _Error(unit, none, np.array([before + 1]), np.array([-1]), np.array([-1]))
                block.error = found
            else:
                data = np.frombuffer(found, dtype=np.uint8)
                rows = scan.scan(data, name.encode("utf-8", "replace"))
                block = _Lines(unit, data, rows[:, 0] + before, rows[:, 1], rows[:, 2])
                block.borders = rows[:, 3:]
            yield block


def _of_batches(unit: Unit, name: str) -> Iterator[Block]:
    number = 0
    for batch in arrow_batches(unit, frozenset([name])):
        found = _texts(batch)
        numbers = np.arange(number + 1, number + 1 + batch.num_rows)
        number += batch.num_rows
        if found is None:
            nowhere = np.full(batch.num_rows, -1)
            block = _Batch(unit, np.zeros(0, np.uint8), numbers, nowhere, nowhere, "row")
        else:
            data, borders, empty = found
            starts, ends = np.where(empty, -1, borders[:-1]), np.where(empty, -1, borders[1:])
            block = _Batch(unit, data, numbers, starts, ends, "row")
        block.batch = batch
        yield block


def _texts(batch) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(bytes, borders (n + 1,), which are null (n,)) of a batch's one column; None if that is no column of texts."""
    import pyarrow

    column = batch.column(0)
    if pyarrow.types.is_string(column.type):
        width = np.int32
    elif pyarrow.types.is_large_string(column.type):
        width = np.int64
    else:
        return None
    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid:  # some text is no UTF-8: they are looked at one by one
        return None
    _, borders, data = column.buffers()
    if borders is None:
        return None
    borders = np.frombuffer(borders, dtype=width)[column.offset : column.offset + len(column) + 1].astype(np.int64)
    bytes_of = np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, dtype=np.uint8)
    empty = np.asarray(column.is_null()) if column.null_count else np.zeros(len(column), dtype=bool)
    return bytes_of, borders, empty
