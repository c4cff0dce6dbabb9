"""What Snakemake's own records say that a result was made from."""

import base64
import os
from collections.abc import Iterable, Iterator
from fnmatch import filter as filter_names
from os.path import normpath
from pathlib import Path

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import digest, read_json


def name(made: str) -> str:
    """What Snakemake calls its record of how a file was made."""
    return base64.urlsafe_b64encode(made.encode()).decode()


def _read(store: Path, made: str) -> dict:
    """The record of a file; an empty one where there is none that can be read."""
    try:
        found = read_json(store / "metadata" / name(made))
    except (OSError, DataError):
        return {}
    return found if isinstance(found, dict) else {}


def means_one_of(path: str, files: list[str]) -> bool:
    """Whether a file's name, or a folder or glob that is there no longer, means one of some files."""
    path = normpath(path)
    return path in files or bool(filter_names(files, path)) or any(file.startswith(f"{path}/") for file in files)


def of_others(store: Path, made: Iterable[str], path: str) -> bool:
    """Whether a record says what a step's results were made from, and a path means none of it."""
    for each in made:
        try:
            return not means_one_of(path, [normpath(file) for file in _read(store, each)["input"]])
        except (KeyError, TypeError):
            continue
    return False


def replaced(store: Path, made: str, paths: Iterable[str]) -> str | None:
    """The first of some files that is another than the one that a result was made from, by its digest, but older.

    Of a newer one Snakemake itself takes the digest, and where that is another, too, it makes the result anew. One that
    may not be read, or whose entry in its folder has not changed since, is left alone.
    """
    record = _read(store, made)
    known, begun = record.get("input_checksums"), record.get("starttime")
    if not isinstance(known, dict) or not isinstance(begun, int | float) or not Path(made).exists():
        return None
    wanted = {normpath(file): value for file, value in known.items() if f"{value}".startswith("sha256:")}
    there = [path for path in paths if normpath(path) in wanted and os.access(path, os.R_OK)]
    ended = Path(made).stat().st_mtime
    newer = [path for path in there if Path(path).stat().st_mtime > ended]
    older = [path for path in there if Path(path).stat().st_mtime <= ended and Path(path).stat().st_ctime >= begun]

    def others(files: list[str]) -> Iterator[str]:
        return (path for path in files if f"sha256:{digest(path)}" != wanted[normpath(path)])

    found = next(others(older), None)
    return None if found is None or any(others(newer)) else found
