"""Documents out of files: JSONL, JSON, plain text, numpy arrays."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tokenize import TokenError  # numpy reads an array's head as Python

import numpy as np

from rwkvpipe.base.config import CorpusConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import read_json, read_jsonl
from rwkvpipe.data.document import Document
from rwkvpipe.data.question import check_columns, question, talk, words

log = logging.getLogger("rwkvpipe")
ROWS = (".jsonl", ".ndjson", ".json")
BOM = b"\xef\xbb\xbf"
NPY = b"\x93NUMPY"  # first bytes of what numpy.save writes
ZIP = b"PK"  # and numpy.savez


def is_table(path: str | Path) -> bool:
    """Whether a file holds rows of JSON, by its name."""
    return Path(path).suffix.lower() in ROWS


def whole_text(path: str | Path) -> str:
    """A text file as it stands, line ends too, less a byte order mark. Raises DataError naming the line."""
    data = Path(path).read_bytes().removeprefix(BOM)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 at byte {error.start} of the file; save it as UTF-8") from None


def rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(origin, row) of JSON Lines, or of a .json file that holds one list. Raises DataError naming the line."""
    path = Path(path)
    if path.suffix.lower() == ".json":
        with open(path, "rb") as file:
            listed = file.read(64).removeprefix(BOM).lstrip()[:1] == b"["
        if listed:
            for number, row in enumerate(read_json(path), 1):
                if not isinstance(row, dict):
                    raise DataError(f"{path}: item {number}: a JSON object is needed, this is a {type(row).__name__}")
                yield f"{path}: item {number}", row
            return
    # blank lines count, so that numbers are those of an editor
    with open(path, "rb") as file:
        filled = (number for number, line in enumerate(file, 1) if line.strip())
        for number, row in zip(filled, read_jsonl(path), strict=False):
            yield f"{path}:{number}", row


def texts(path: str | Path) -> Iterator[str]:
    """Every text in a file, whatever its columns are called; numbers as their digits."""
    if not is_table(path):
        yield whole_text(path)
        return
    for where, row in rows(path):
        yield from _texts(row, where)


def _texts(value, where: str) -> Iterator[str]:
    if isinstance(value, str):
        if value:
            yield words({"text": value}, "text", where, least=0)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part, where)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part, where)
    elif value is not None:
        yield json.dumps(value)


def _array(path: Path) -> np.ndarray:
    """A .npy file, mapped. Raises DataError when it is no array of whole numbers."""
    with open(path, "rb") as file:
        start = file.read(len(NPY))
    if start.startswith(ZIP):
        raise DataError(f"{path}: an archive of arrays; save the one that counts with numpy.save(path, array)")
    # numpy takes all else for pickled objects, and says so of any damage
    if start != NPY:
        raise DataError(f"{path}: it is no .npy file, or damaged; save whole numbers with numpy.save(path, array)")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, OverflowError, TokenError) as error:
        objects = "Python object" in str(error)  # the one thing wrong with a file whose head is whole
        reason = "it holds Python objects" if objects else "it is cut short or damaged"
        raise DataError(f"{path}: {reason}; save whole numbers with numpy.save(path, array)") from None
    if found.dtype.kind not in "iu":
        raise DataError(
            f"{path}: row 1: the array is of {found.dtype}, whole numbers are needed; save array.astype(numpy.int64)"
            " if its numbers are whole"
        )
    return found


def _arrays(path: Path, cut: int | None) -> Iterator[Document]:
    """Rows of an array, or pieces of a one-dimensional one."""
    found = _array(path)
    if found.ndim not in (1, 2) or 0 in found.shape:
        raise DataError(f"{path}: an array of shape {found.shape}; sequences x length is needed, or one long row")
    if found.ndim == 2 and cut:
        raise DataError(f"{path}: cut: the array has {len(found)} rows, and each is a document already; remove cut")
    pieces: Iterable[np.ndarray] = found if found.ndim == 2 else [found]
    if found.ndim == 1 and cut:
        rest = len(found) % cut
        if rest:
            log.info(
                "%s: %d numbers cut into pieces of %d; the last, of %d, is %s",
                path, len(found), cut, rest, "kept" if rest > 1 else "left out",
            )  # fmt: skip
        end = len(found) - (rest == 1)  # one number predicts nothing
        pieces = (found[start : min(start + cut, end)] for start in range(0, end, cut))
    for number, piece in enumerate(pieces, 1):
        where = f"{path}: row {number}"
        if len(piece) and (low := int(piece.min())) < 0:
            raise DataError(f"{where}: holds {low}; numbers run from 0 up, add to all of them what makes them so")
        yield Document(ids=piece, origin=where)


def _text_documents(path: Path, field: str) -> Iterator[Document]:
    if not is_table(path):
        yield Document(text=whole_text(path), origin=f"{path}:1")
        return
    for where, row in rows(path):
        yield Document(text=words(row, field, where, least=0), origin=where)


def _each(path: Path, read: Callable, columns: Mapping[str, str]) -> Iterator[Document]:
    if not is_table(path):
        raise DataError(f"{path}: rows of JSON are needed (a .jsonl file), this is a {path.suffix or 'plain'} file")
    for where, row in rows(path):
        yield read(row, columns, where)


def questions(path: str | Path, columns: Mapping[str, str]) -> Iterator[Document]:
    """Questions with answers out of rows. Raises DataError naming the line, ConfigError for an unknown column name."""
    check_columns(columns)
    return _filled(path, _each(Path(path), question, columns))


def _filled(path: str | Path, found: Iterator[Document]) -> Iterator[Document]:
    """The same, but a DataError when there is nothing."""
    empty = True
    for document in found:
        empty = False
        yield document
    if empty:
        raise DataError(f"{path}: no documents in it")


def documents(path: str | Path, spec: CorpusConfig) -> Iterator[Document]:
    """The documents of a file in the spec's format, one by one.

    text: a column of JSONL, or a whole text file; chat: talks; question; array: rows of whole numbers.
    Raises DataError naming file and line of what cannot be used, and when there is nothing at all.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}; name a corpus file")
    if (path.suffix.lower() == ".npy") != (spec.format == "array"):
        raise ConfigError(f"{path}: a corpus of format {spec.format}; .npy files, and only they, have format array")
    check_columns(spec.columns)
    if spec.format == "array":
        return _filled(path, _arrays(path, spec.cut))
    if spec.format == "text":
        return _filled(path, _text_documents(path, spec.field))
    return _filled(path, _each(path, talk if spec.format == "chat" else question, spec.columns))
