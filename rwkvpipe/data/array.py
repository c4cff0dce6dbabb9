"""Rows of whole numbers out of numpy's files: two-dimensional, one long row, or rows of several lengths."""

import logging
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError  # numpy reads an array's head as Python

import numpy as np

from rwkvpipe.base.errors import DataError
from rwkvpipe.data.document import Document
from rwkvpipe.data.unit import Place, Unit

log = logging.getLogger("rwkvpipe")

UNIT = 4 << 20  # numbers of a unit
DAMAGE = (ValueError, EOFError, SyntaxError, OverflowError, TokenError, KeyError, zipfile.BadZipFile)
ZIP = (RuntimeError, MemoryError, struct.error, zlib.error)  # a damaged archive may be anything
RAGGED = "numpy.savez(path, values=numpy.concatenate(rows), lengths=[len(row) for row in rows])"


def _whole(path: str, found: np.ndarray | bytes) -> np.ndarray:
    if isinstance(found, bytes):  # what numpy gives of a file in an archive that is no array
        raise DataError(f"{path}: an archive of files that are no arrays; unpack it, or save arrays with {RAGGED}")
    if found.dtype.kind not in "iu":
        raise DataError(
            f"{path}: row 1: the array is of {found.dtype}, whole numbers are needed; save array.astype(numpy.int64)"
            " if its numbers are whole"
        )
    return found


def _array(path: str) -> np.ndarray:
    """A .npy file, mapped. Raises DataError when it is no array of whole numbers."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGE as error:
        # the one thing wrong with a file whose head is whole
        if "Python object" in str(error):
            raise DataError(f"{path}: it holds Python objects; save rows of several lengths with {RAGGED}") from None
        raise DataError(
            f"{path}: it is cut short or damaged; save whole numbers with numpy.save(path, array)"
        ) from None
    return _whole(path, found)


def _archive(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The array of a .npz file, or values with the ends of their rows. Raises DataError for other archives."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = set(archive.files)
            if len(names) == 1:
                return _whole(path, archive[archive.files[0]]), None
            if names not in ({"values", "lengths"}, {"values", "offsets"}):
                raise DataError(
                    f"{path}: an archive of arrays called {', '.join(sorted(names)) or 'nothing'}; save the one that"
                    f" counts with numpy.save(path, array), or rows of several lengths with {RAGGED}"
                )
            values = _whole(path, archive["values"])
            borders = _whole(path, archive["lengths" if "lengths" in names else "offsets"])
    except (*DAMAGE, *ZIP, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise  # it may not be read
        what = "it holds Python objects" if "Python object" in str(error) else "an archive that is cut short or damaged"
        raise DataError(f"{path}: {what}; save whole numbers with numpy.save(path, array), or {RAGGED}") from None
    borders = borders.astype(np.int64)
    ends = np.cumsum(borders) if "lengths" in names else borders[1:]
    starts = np.concatenate(([0], ends[:-1]))
    fits = values.ndim == borders.ndim == 1 and len(ends) and (ends >= starts).all() and ends[-1] == len(values)
    if not fits or ("offsets" in names and borders[0] != 0):
        raise DataError(f"{path}: its rows do not fit its {values.size} values; save both with {RAGGED}")
    return values, ends


def load(path: str, kind: str, cut: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(values, ends) of the rows of a file: row i is values[ends[i - 1] : ends[i]]. Raises DataError naming the file.

    One long row is cut into rows of `cut` numbers, the last of which may be shorter.
    """
    found, ends = _archive(path) if kind == "arrays" else (_array(path), None)
    if ends is not None:
        if cut:
            raise DataError(f"{path}: cut: the file has {len(ends)} rows, and each is a document already; remove cut")
        return found, ends
    if found.ndim not in (1, 2) or 0 in found.shape:
        raise DataError(f"{path}: an array of shape {found.shape}; sequences x length is needed, or one long row")
    if found.ndim == 2:
        if cut:
            raise DataError(f"{path}: cut: the array has {len(found)} rows, and each is a document already; remove cut")
        # a view where the rows lie one after another, as numpy.save writes them
        return found.reshape(-1), np.arange(1, len(found) + 1) * found.shape[1]
    if not cut:
        return found, np.array([len(found)])
    ends = np.arange(cut, len(found) + 1, cut)
    return found, np.append(ends, len(found)) if len(found) % cut > 1 else ends  # one number predicts nothing


def array_units(path: str, kind: str, cut: int | None) -> list[Unit]:
    """A file of numbers cut into units of rows."""
    values, ends = load(path, kind, cut)
    size, units, start, before = Path(path).stat().st_size, [], 0, 0
    if cut and (rest := len(values) % cut):
        log.info(
            "%s: %d numbers cut into pieces of %d; the last, of %d, is %s",
            path, len(values), cut, rest, "kept" if rest > 1 else "left out",
        )  # fmt: skip
    if kind == "arrays":  # an archive is read whole
        return [Unit(path, kind, stop=len(ends), weight=size)]
    while start < len(ends):
        stop = max(start + 1, int(np.searchsorted(ends, before + UNIT, "right")))
        units.append(Unit(path, kind, start=start, stop=stop, first=start, weight=size * (stop - start) // len(ends)))
        start, before = stop, int(ends[stop - 1])
    return units


def array_documents(unit: Unit, cut: int | None) -> Iterator[Document | DataError]:
    """Rows of a unit, or the error, which names the row, of one that holds a number below zero."""
    values, ends = load(unit.path, unit.kind, cut)
    for number, row in enumerate(range(unit.start, unit.stop), 1):
        piece, where = values[ends[row - 1] if row else 0 : ends[row]], Place(unit, number, "row")
        if len(piece) and (low := int(piece.min())) < 0:
            yield DataError(f"{where}: holds {low}; numbers run from 0 up, add to all of them what makes them so")
        else:
            yield Document(ids=piece, origin=where)
