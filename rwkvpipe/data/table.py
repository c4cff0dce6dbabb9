"""Rows out of tables: JSON lines, lists and objects, packed or not, parquet, Arrow files and streams.

A table is cut into units, which are read one by one, each in bounded memory.
"""

import json
import os
from collections.abc import Iterator, Set
from contextlib import contextmanager
from itertools import chain
from typing import Any

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import parse_json
from rwkvpipe.base.pace import Pace
from rwkvpipe.data.items import list_rows, object_rows, other_members
from rwkvpipe.data.kind import opened
from rwkvpipe.data.lines import lines
from rwkvpipe.data.unit import Place, Unit

UNIT = 4 << 20  # bytes of a unit of lines, or of the needed columns of groups of a table
BATCH = 1 << 20  # bytes of a table that become rows at once
GROUP = 256 << 20  # bytes of the needed columns of a row group at most
OBJECT = 1 << 26  # bytes of one JSON object at most that is read whole
Raw = bytes | dict | DataError | Any
# what pyarrow raises for values that Python has none for: texts that are no UTF-8, a date of the year 60,000
UNTOLD = (ValueError, OverflowError, RuntimeError)


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
    """The needed columns that there are. Raises DataError when there is none, or one twice."""
    found = [name for name in names if needed is None or name in needed]
    if twice := [name for number, name in enumerate(found) if name in found[:number]]:
        raise DataError(f"{path}: has two columns called {twice[0]}; rename or remove one")
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


def raw_rows(unit: Unit, needed: Set[str] | None, fan: str | None = None) -> Iterator[tuple[Place, Raw]]:
    """(place, raw) of each row of a unit, for `row_of`: a bad row is raised there, so that the next can be read.

    Of a JSON object whose list under the name `fan` is fanned out, each item of that is a row.
    """
    if unit.kind in ("parquet", "arrow", "stream"):
        yield from _arrow_rows(unit, needed)
        return
    if unit.kind == "object" and fan is not None:
        others = {}
        if needed is None or needed - {fan}:
            with opened(unit.path, unit.packed, whole=True) as file:
                others = other_members(unit, file, fan, needed)
        with opened(unit.path, unit.packed, whole=unit.whole) as file:
            yield from object_rows(unit, file, fan, others)
        return
    with opened(unit.path, unit.packed, whole=unit.whole) as file:
        if unit.kind == "lines":
            yield from lines(unit, file)
        elif unit.kind == "list":
            yield from list_rows(unit, file)
        else:
            data = file.read(OBJECT + 1)
            if len(data) > OBJECT:
                raise DataError(
                    f"{unit.path}: one JSON object of over {OBJECT >> 20} MB; make a list or lines of it, or name in"
                    " columns the list in it that has the rows, such as data[*].question"
                )
            yield Place(unit, 1), parse_json(data, unit.path)


def _arrow_rows(unit: Unit, needed: Set[str] | None) -> Iterator[tuple[Place, Raw]]:
    number = 0
    for part in arrow_batches(unit, needed):
        try:
            rows = part.to_pylist()
        except UNTOLD:
            rows = chain.from_iterable(one_row(part.slice(i, 1)) for i in range(part.num_rows))
        for row in rows:
            number += 1
            place = Place(unit, number, "row")
            yield place, DataError(f"{place}: {row}") if isinstance(row, str) else row


def one_row(row) -> list:
    """A row of a batch, alone in it, or a text that says what is wrong with it."""
    try:
        return row.to_pylist()
    except UNTOLD as error:
        what = "not UTF-8" if "utf" in str(error).lower() else "a value that cannot be read"
        return [f"{what} ({error}); write the column again"]


def arrow_batches(unit: Unit, needed: Set[str] | None) -> Iterator[Any]:
    """Record batches of the needed columns, of some size. Raises DataError for a damaged file."""
    with _foreign(unit.path):
        for batch in _batches(unit, needed):
            step = max(1, BATCH // max(1, batch.nbytes // max(1, batch.num_rows)))
            for start in range(0, batch.num_rows, step):
                yield batch.slice(start, step)


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
        pace = Pace(f"{unit.path}: read", unit.weight)
        for batch in found:
            _sound(batch)
            yield batch
            if unit.kind == "stream":  # which is one piece of work
                pace.at(source.tell())


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
