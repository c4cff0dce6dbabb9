"""Rows out of tables: JSON lines, lists and objects, packed or not, parquet, Arrow files and streams.

A table is cut into units, which are read one by one, each in bounded memory.
"""

import codecs
import json
import math
import os
from collections.abc import Iterator, Set
from contextlib import contextmanager
from itertools import chain
from typing import Any, BinaryIO

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import parse_json, unreadable
from rwkvpipe.data.kind import BOM, opened
from rwkvpipe.data.unit import Place, Unit

UNIT = 4 << 20  # bytes of a unit of lines, or of the needed columns of groups of a table
BATCH = 1 << 20  # bytes of a table that become rows at once
GROUP = 256 << 20  # bytes of the needed columns of a row group at most
OBJECT = 1 << 29  # bytes of a file that is one JSON object at most
ITEM = 1 << 28  # characters of one item of a JSON list at most
READ = 1 << 18
SPACE = " \t\r\n"
Raw = bytes | dict | DataError | Any


def row_of(raw: Raw, place: Place) -> dict:
    """What a unit gave as a row. Raises DataError naming the place of what is none."""
    if isinstance(raw, DataError):
        raise raw
    if isinstance(raw, bytes):
        try:
            row = json.loads(str(raw, "utf-8"))  # at once what is sound; the slower way says what is wrong
        except (ValueError, RecursionError):
            row = parse_json(raw.strip(), str(place), lines=False)
    else:
        row = raw
    if not isinstance(row, dict):
        raise DataError(f"{place}: a JSON object is needed, this is a {type(row).__name__}")
    return row


def table_units(path: str, kind: str, packed: str, needed: Set[str] | None) -> list[Unit]:
    """A table cut into units. Raises DataError for one that is damaged, or too large to be read in parts."""
    size = os.path.getsize(path)
    if kind == "lines" and not packed:
        starts = range(0, size, UNIT)
        return [Unit(path, kind, start=s, stop=min(s + UNIT, size), weight=min(UNIT, size - s)) for s in starts] or [
            Unit(path, kind, stop=0)
        ]
    if kind in ("parquet", "arrow"):
        with _foreign(path):
            groups = (_row_groups if kind == "parquet" else _record_batches)(path, needed)
        return _grouped(path, kind, groups, size)
    return [Unit(path, kind, packed, weight=size)]


def _grouped(path: str, kind: str, groups: list[tuple[int, int]], size: int) -> list[Unit]:
    """Units of consecutive groups; each group is (rows, bytes)."""
    found, start, first, held, rows = [], 0, 0, 0, 0
    for number, (count, width) in enumerate(groups):
        held, rows = held + width, rows + count
        if held >= UNIT or number + 1 == len(groups):
            found.append(Unit(path, kind, start=start, stop=number + 1, first=first, weight=size // len(groups)
                              * (number + 1 - start)))  # fmt: skip
            start, first, held, rows = number + 1, first + rows, 0, 0
    return found or [Unit(path, kind, stop=0)]


@contextmanager
def _foreign(path: str) -> Iterator[None]:
    """What pyarrow says of damage, in one line that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, pyarrow.ArrowException):
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cut short or damaged ({said[:120]}); copy or make it again") from None


def _chosen(path: str, names: list[str], needed: Set[str] | None) -> list[str]:
    """The needed columns that there are. Raises DataError when there is none."""
    found = [name for name in names if needed is None or name in needed]
    if not found and needed:
        raise DataError(
            f"{path}: none of the columns {', '.join(sorted(needed))}; it has {', '.join(names) or 'none'}"
            " (field or columns says which to read)"
        )
    return found


def _parquet(path: str):
    import pyarrow.parquet

    # read page by page: memory follows the page, not the row group
    return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)


def _row_groups(path: str, needed: Set[str] | None) -> list[tuple[int, int]]:
    """Rows and bytes (of the needed columns) of each row group."""
    with _parquet(path) as file:
        names = set(_chosen(path, file.schema_arrow.names, needed))
        found = []
        for number in range(file.metadata.num_row_groups):
            group, width = file.metadata.row_group(number), 0
            for place in range(group.num_columns):
                column = group.column(place)
                # a flat column's dictionary is read whole, and so may be a page of each
                if column.path_in_schema.partition(".")[0] in names:
                    width += column.total_uncompressed_size
            if width > GROUP:
                raise DataError(
                    f"{path}: row group {number + 1} of {file.metadata.num_row_groups} has {width >> 20} MB in the"
                    f" columns to read, {GROUP >> 20} are the most; write it with smaller ones (row_group_size)"
                )
            found.append((group.num_rows, width))
    return found


def _arrow(source, kind: str, path: str, needed: Set[str] | None):
    """A reader of the needed columns of an Arrow file or stream."""
    from pyarrow import ipc

    opened = ipc.open_stream if kind == "stream" else ipc.open_file
    with opened(source) as file:
        names = file.schema.names
    wanted = set(_chosen(path, names, needed))
    source.seek(0)
    return opened(
        source, options=ipc.IpcReadOptions(included_fields=[i for i, name in enumerate(names) if name in wanted])
    )


def _record_batches(path: str, needed: Set[str] | None) -> list[tuple[int, int]]:
    """Rows and, about, bytes of each batch."""
    import pyarrow

    with pyarrow.memory_map(path) as source, _arrow(source, "arrow", path, needed) as file:
        count = file.num_record_batches
        return [(file.get_batch(number).num_rows, os.path.getsize(path) // count) for number in range(count)]


def raw_rows(unit: Unit, needed: Set[str] | None) -> Iterator[tuple[Place, Raw]]:
    """(place, raw) of each row of a unit, for `row_of`: a bad row is raised there, so that the next can be read."""
    if unit.kind in ("parquet", "arrow", "stream"):
        with _foreign(unit.path):
            yield from _arrow_rows(unit, needed)
        return
    with opened(unit.path, unit.packed) as file:
        if unit.kind == "lines":
            yield from _lines(unit, file)
        elif unit.kind == "list":
            yield from _Items(unit, file)
        else:
            if unit.weight > OBJECT:
                raise DataError(f"{unit.path}: one JSON object of {unit.weight >> 20} MB; make a list or lines of it")
            yield Place(unit, 1), parse_json(file.read(), unit.path)


def _lines(unit: Unit, file: BinaryIO) -> Iterator[tuple[Place, bytes]]:
    """Lines that begin in the unit, but for blank ones."""
    place, number = 0, 0
    stop = unit.stop if unit.stop is not None else math.inf
    if unit.start:
        place = unit.start - 1
        file.seek(place)
        # the rest of a line that begins before, which may be longer than the unit
        while place < stop and (rest := file.readline(READ)):
            place += len(rest)
            if rest.endswith(b"\n"):
                break
        number = int(place > unit.start)
    while place < stop and (line := file.readline()):
        number += 1
        if not place:
            place += len(line)
            line = line.removeprefix(BOM)
        else:
            place += len(line)
        if line and not line.isspace():
            yield Place(unit, number), line


class _Items:
    """The items of a JSON list, read piece by piece. Raises DataError naming the line where it is broken."""

    def __init__(self, unit: Unit, file: BinaryIO):
        self.unit, self.file = unit, file
        self.text, self.place, self.lines, self.end = "", 0, 1, False
        self.size, self.number = READ, 0
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.scan = json.JSONDecoder().raw_decode

    def fault(self, problem: str, place: int) -> DataError:
        """The error at a place of the text that is held."""
        line = self.lines + self.text.count("\n", 0, place)
        return DataError(f"{self.unit.path}:{line}: not JSON: {problem}; mend it")

    def more(self) -> None:
        """Hold one more piece, and drop what was read. Raises DataError when there is none."""
        if self.end:
            raise self.fault("the list has no end", len(self.text))
        self.lines += self.text.count("\n", 0, self.place)
        self.text, self.place = self.text[self.place :], 0
        piece = self.file.read(self.size)
        self.end = not piece
        try:
            self.text += self.decode(piece, self.end)
        except UnicodeDecodeError as error:
            line = self.lines + self.text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise DataError(f"{self.unit.path}:{line}: not UTF-8; save it as UTF-8") from None
        self.size = min(2 * self.size, 1 << 26)  # so that a long item is tried few times

    def mark(self) -> str:
        """The next character that is no space."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in SPACE:
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            self.more()

    def item(self) -> Any:
        """The value that stands here."""
        while True:
            try:
                value, place = self.scan(self.text, self.place)
            except json.JSONDecodeError as error:
                # a piece may end in the middle of an item, at most so many characters after where it is noticed
                broken = error.pos < len(self.text) - 12 and not error.msg.startswith("Unterminated")
                if self.end or broken:
                    raise self.fault(error.msg, error.pos) from None
                if len(self.text) - self.place > ITEM:
                    raise self.fault(f"an item of over {ITEM >> 20} million characters", self.place) from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.unit.path}: {unreadable(error)}") from None
            else:
                # a number may go on in the next piece
                if place < len(self.text) or self.end or isinstance(value, dict | list | str):
                    self.place, self.size = place, READ
                    return value
            self.more()

    def __iter__(self) -> Iterator[tuple[Place, Any]]:
        if self.mark() != "[":
            raise self.fault("a list is needed", self.place)
        self.place += 1
        while self.mark() != "]":
            if self.number and self.text[self.place] != ",":
                raise self.fault("a comma, or the end of the list, is needed", self.place)
            self.place += bool(self.number)
            self.mark()
            value = self.item()
            self.number += 1
            yield Place(self.unit, self.number, "item"), value
        if self.text[self.place + 1 :].strip() or self.file.read(READ).strip():
            raise self.fault("more after the end of the list", self.place)


def _arrow_rows(unit: Unit, needed: Set[str] | None) -> Iterator[tuple[Place, Raw]]:
    import pyarrow

    number = 0
    for batch in _batches(unit, needed):
        width = max(1, batch.nbytes // max(1, batch.num_rows))
        step = max(1, BATCH // width)
        for start in range(0, batch.num_rows, step):
            part = batch.slice(start, step)
            try:
                rows = part.to_pylist()
            except (UnicodeDecodeError, pyarrow.ArrowInvalid):
                rows = chain.from_iterable(_one(part.slice(i, 1)) for i in range(part.num_rows))
            for row in rows:
                number += 1
                place = Place(unit, number, "row")
                yield place, DataError(f"{place}: {row}") if isinstance(row, str) else row


def _one(row) -> list:
    """A row of a batch, or what is wrong with it."""
    import pyarrow

    try:
        return row.to_pylist()
    except (UnicodeDecodeError, pyarrow.ArrowInvalid) as error:
        return [f"not UTF-8 ({error}); write the column again"]


def _batches(unit: Unit, needed: Set[str] | None) -> Iterator[Any]:
    """Record batches of the needed columns."""
    import pyarrow

    if unit.kind == "parquet":
        with _parquet(unit.path) as file:
            names = _chosen(unit.path, file.schema_arrow.names, needed)
            groups = range(unit.start, unit.stop)
            rows = sum(file.metadata.row_group(group).num_rows for group in groups)
            width = unit.weight // max(1, rows) + 1
            count = max(1, min(4096, BATCH // width))
            yield from file.iter_batches(batch_size=count, row_groups=groups, columns=names, use_threads=False)
        return
    with pyarrow.memory_map(unit.path) as source, _arrow(source, unit.kind, unit.path, needed) as file:
        found = iter(file) if unit.kind == "stream" else map(file.get_batch, range(unit.start, unit.stop))
        for batch in found:
            _sound(batch)
            yield batch


def _sound(batch) -> None:
    """Raise ArrowInvalid where a batch points outside itself, which nothing checks when it is mapped."""
    import pyarrow

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            flat = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
            if not flat or "UTF8" not in str(error):  # such a row is told of when its turn comes
                raise
