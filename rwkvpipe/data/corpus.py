"""Documents out of files of any kind: tables, texts, arrays; one, many, folders and globs of them."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from rwkvpipe.base.column import Columns
from rwkvpipe.base.config import CorpusConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.sources import files_of
from rwkvpipe.data.array import array_documents, array_units
from rwkvpipe.data.block import Block, blocks, can_be_read
from rwkvpipe.data.document import Document
from rwkvpipe.data.kind import BOM, TABLES, kind_of, opened
from rwkvpipe.data.pair import PARTS, pair
from rwkvpipe.data.pairing import PAIR_KEYS, two_sides
from rwkvpipe.data.question import filled, question, words
from rwkvpipe.data.table import raw_rows, row_of, table_units
from rwkvpipe.data.talk import KEYS, talk
from rwkvpipe.data.unit import Place, Unit

ARRAYS = ("numpy", "arrays")
# what rows of questions may be called without `columns`
ASKED = {"question", "prompt", "answer", "options", "label"}
PAIRED = set(PARTS)
BLOCK = 1 << 20  # bytes of a text that are read at once
LONG = 4 << 20  # bytes of a text that may be held as a whole, by who can do with less
Bad = Callable[[DataError], None]


class Named(Protocol):
    """Settings that say where rows keep questions."""

    columns: dict[str, str]
    templates: dict[str, str]


def stop(error: DataError) -> None:
    """The answer to a bad row where nothing else is asked for: the end."""
    raise error


def strict(error: DataError) -> None:
    """The same for a corpus, which may leave such rows out instead."""
    text = str(error)
    raise DataError(text if "on_error" in text else f"{text}; on_error: skip leaves such rows out") from None


def is_table(path: str | Path) -> bool:
    """Whether a file holds rows."""
    return kind_of(path)[0] in TABLES


def text_blocks(path: str | Path, packed: str = "") -> Iterator[bytes]:
    """A text file as it stands, line ends too, less a byte order mark, some at a time: UTF-8 that splits no character.

    Raises DataError naming the line.
    """
    tail, place, lines = b"", 0, 0
    with opened(path, packed, whole=True) as file:
        while piece := file.read(BLOCK):
            data = tail + piece
            if not place and len(data) >= len(BOM):
                place = len(data) - len(data := data.removeprefix(BOM))
            try:
                data.decode("utf-8")
                cut = len(data)
            except UnicodeDecodeError as error:
                cut = error.start
                if error.end < len(data) or len(data) - cut > 3:
                    raise _no_text(path, place + cut, lines + data.count(b"\n", 0, cut)) from None
            place, tail = place + cut, data[cut:]
            lines += data.count(b"\n", 0, cut)
            if cut:
                yield data[:cut]
    if tail:
        raise _no_text(path, place, lines)


def _no_text(path: str | Path, place: int, lines: int) -> DataError:
    return DataError(f"{path}:{lines + 1}: not UTF-8 at byte {place} of the file; save it as UTF-8")


def rows(path: str | Path) -> Iterator[tuple[Place, dict]]:
    """(place, row) of a table, all columns. Raises DataError naming the line."""
    kind, packed = kind_of(path)
    for unit in table_units(str(path), kind, packed, None):
        for place, raw in raw_rows(unit, None):
            yield place, row_of(raw, place)


def texts(path: str | Path) -> Iterator[str]:
    """Every text in a file, whatever its columns are called; numbers as their digits."""
    kind, packed = kind_of(path)
    if kind in TABLES:
        for where, row in rows(path):
            yield from _texts(row, where)
    elif kind == "text":
        for block in text_blocks(path, packed):
            yield block.decode("utf-8")
    else:
        raise DataError(f"{path}: holds numbers, no text")


def _texts(value, where: object) -> Iterator[str]:
    if isinstance(value, str | bytes):
        if value:
            yield words({"text": value}, "text", where, least=0)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part, where)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part, where)
    elif value is not None:
        yield json.dumps(value, default=str)


def largest(path: str | Path) -> int:
    """The largest whole number in a file's arrays, or in the lists of its rows, whatever its columns are called.

    Raises DataError when there is none.
    """
    kind, _ = kind_of(path)
    found = -1
    if kind in ARRAYS:
        for document in (one for unit in array_units(str(path), kind, None) for one in array_documents(unit, None)):
            if isinstance(document, DataError):
                raise document
            found = max(found, int(np.max(document.ids, initial=-1)))
    elif kind in TABLES:
        found = max((_largest(row, False) for _, row in rows(path)), default=-1)
    if found < 0:
        raise DataError(f"{path}: no row of whole numbers in it; give size, or a file that has some")
    return found


def _largest(value, listed: bool) -> int:
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return max((_largest(part, isinstance(value, list)) for part in parts), default=-1)
    return value if listed and isinstance(value, int) and not isinstance(value, bool) else -1


class Reader:
    """Documents of one corpus: the units that its files are cut into, and what stands in each.

    With `streams`, long text files come as documents of `blocks`. Raises ConfigError for columns and paths that cannot
    be.
    """

    def __init__(self, spec: CorpusConfig | Named, format: str, *, streams: bool = False):
        self.spec, self.format, self.streams = spec, format, streams
        named = format in ("chat", "seq2seq", "question", "pairs") or "text" in {**spec.templates, **spec.columns}
        field = {} if named else {"text": getattr(spec, "field", "text")}
        self.columns = Columns(spec.columns | field, spec.templates)
        names = {"question": ASKED, "chat": KEYS, "seq2seq": PAIR_KEYS, "pairs": PAIRED}.get(format, set())
        self.needed = frozenset(self.columns.tops | names)
        self.cut = getattr(spec, "cut", None)
        fan = self.columns.fans[0] if self.columns.fans else ()
        self.fan = str(fan[0]) if len(fan) == 2 else None  # the list at the top of a row of which each item is a record
        plain = format == "text" and not self.columns.inside and not spec.templates
        self.plain = self.columns.names["text"] if plain else None  # the one column, if that is all

    def units(self, path: str | Path) -> list[Unit]:
        """The units of all files that a path means. Raises DataError when they are of kinds that do not go together."""
        files, found, first = files_of(path), [], None
        if not files:
            raise DataError(f"{path}: a folder without files; name a corpus file")
        for file in files:
            kind, packed = kind_of(file)
            group = "arrays of numbers" if kind in ARRAYS else "tables" if kind in TABLES else kind
            if first and group != first[0]:
                raise DataError(
                    f"{path}: {first[1]} and {file} are not of one kind ({first[0]}, {group}); name those that count"
                    " by a glob, such as folder/*.jsonl"
                )
            first = first or (group, file)
            found += self._units(file, kind, packed)
        return found

    def _units(self, file: str, kind: str, packed: str) -> list[Unit]:
        if kind == "index":
            raise DataError(f"{file}: the index of a binidx pair, whose documents are tokens already; format binidx")
        if kind in ARRAYS:
            if self.format not in ("array", "text"):
                raise DataError(f"{file}: rows of JSON or parquet are needed for format {self.format}, not numbers")
            return array_units(file, kind, self.cut)
        if self.cut and self.format != "seq2seq":
            raise ConfigError(f"{file}: cut belongs to one long array of numbers, this is a {kind} file")
        if kind in TABLES:
            return table_units(file, kind, packed, self.needed)
        if self.format != "text":
            arrays = ", or numpy's arrays" if self.format == "array" else ""
            raise DataError(f"{file}: rows of JSON are needed (a .jsonl file), or parquet{arrays}; this is a text file")
        return [Unit(file, kind, packed, weight=Path(file).stat().st_size)]

    def read(self, unit: Unit, bad: Bad = stop) -> Iterator[Document]:
        """The documents of a unit. What is wrong with a row is told to `bad`, and if that returns the next one is read.

        Raises DataError for what is wrong with the file itself.
        """
        if unit.kind in ARRAYS:
            for found in array_documents(unit, self.cut):
                if isinstance(found, DataError):
                    bad(found)
                else:
                    yield found
        elif unit.kind == "text":
            try:
                document = self._text(unit)
            except DataError as error:
                bad(error)
            else:
                yield document
        else:
            for place, raw in raw_rows(unit, self.needed, self.fan):
                yield from self.row(raw, place, bad)

    def blocks(self, unit: Unit) -> Iterator[Block] | None:
        """The rows of a unit by the thousand, where that can be: of texts under one name."""
        return blocks(unit, self.plain) if self.plain is not None and can_be_read(unit) else None

    def _text(self, unit: Unit) -> Document:
        """A text file: one document."""
        parts, held = [], 0
        for block in text_blocks(unit.path, unit.packed):
            parts.append(block)
            held += len(block)
            if self.streams and held > LONG:
                return Document(blocks=partial(text_blocks, unit.path, unit.packed), origin=Place(unit, 1))
        return Document(text=b"".join(parts).decode("utf-8"), origin=Place(unit, 1))

    def row(self, raw, place: Place, bad: Bad) -> Iterator[Document]:
        """The documents of what a unit gave as a row; what is wrong with it is told to `bad`."""
        try:
            records = [*self.columns.records(row_of(raw, place), place)]
        except DataError as error:
            bad(error)
            return
        for where, record in records:
            try:
                document = self._document(filled(record, self.columns, where), where)
            except DataError as error:
                bad(error)
            else:
                yield document

    def _document(self, record: dict, where: object) -> Document:
        if self.format == "question":
            return question(record, self.columns.names, where, open_=isinstance(self.spec, CorpusConfig))
        if self.format == "pairs":
            return Document(pair=pair(record, self.columns.names, where), origin=where)
        if self.format == "seq2seq":
            return two_sides(record, self.columns.names, where, self.spec)
        if self.format == "chat":
            return talk(record, self.columns.names, where, self.spec)
        column = self.columns.names["text"]
        value = record.get(column)
        if isinstance(value, list):
            return Document(ids=_numbers(value, column, where), origin=where)
        needed = "a list of whole numbers, or text," if self.format == "array" else "text"
        return Document(text=words(record, column, where, least=0, needed=needed), origin=where)

    def documents(self, path: str | Path, bad: Bad = stop) -> Iterator[Document]:
        """All documents of a path, one by one. Raises DataError also when there is none."""
        empty = True
        for unit in self.units(path):
            for document in self.read(unit, bad):
                empty = False
                yield document
        if empty:
            raise DataError(f"{path}: no documents in it")


def _numbers(value: list, column: str, where: object) -> np.ndarray:
    """A row of whole numbers. Raises DataError naming the first item that is none."""
    for place, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < 2**31:
            shown = "null" if item is None else repr(item)[:30]
            raise DataError(
                f"{where}: `{column}[{place}]` is {shown}; a list is taken for whole numbers from 0 up; for"
                " anything else give a text"
            )
    return np.asarray(value, dtype=np.int64)


def questions(path: str | Path, spec: Named, bad: Bad = stop) -> Iterator[Document]:
    """Questions with answers out of rows. Raises DataError naming the line, ConfigError for an unknown column name."""
    return Reader(spec, "question").documents(path, bad)


def documents(path: str | Path, spec: CorpusConfig, bad: Bad = stop) -> Iterator[Document]:
    """The documents of a corpus in the spec's format, one by one, at most `limit` of them.

    text: a column of a table, or whole text files; chat: talks; question; array: rows of whole numbers.
    Raises DataError naming file and line of what cannot be used, and when there is nothing at all.
    """
    return islice(Reader(spec, spec.format).documents(path, bad), spec.limit)
