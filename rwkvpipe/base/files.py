"""Whole files or none: everything is written beside its place, flushed to disk, then renamed."""

import fcntl
import glob
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rwkvpipe.base.errors import DataError, no_file
from rwkvpipe.base.pace import Pace

log = logging.getLogger("rwkvpipe")

HALF = "backslashreplace"  # half a surrogate pair, which UTF-8 cannot say, is written as JSON escapes it


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError that names no file, or the temporary one beside `path`, names `path`; DataError if that vanished."""
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else ""
        ours = Path(name).name.startswith(f".{Path(path).name}.new-")
        if isinstance(error, FileNotFoundError) and ours:
            raise DataError(f"{path}: vanished while it was written; run the same command again") from None
        if name and not ours:
            raise
        if error.errno is None:  # what a library, or a program it ran, says in its own words
            raise OSError(f"{path}: {error}") from None
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _sweep(path: Path) -> None:
    """Remove what killed processes were writing to become `path`; those that live hold a lock on theirs."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.new-*"):
        try:
            with open(left, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink(missing_ok=True)
        except OSError as error:  # in use, gone meanwhile, or on a disk without locks
            log.debug("%s: left as it is (%s)", left, error)


def absent(*folders: Path) -> list[Path]:
    """Those of some folders, the innermost first, that are not there yet."""
    return [each for each in folders if not each.exists()]


def unmake(folders: Iterable[Path]) -> None:
    """Remove folders that were made for what did not come, unless somebody has put something there."""
    with suppress(OSError):
        for each in folders:
            each.rmdir()


@contextmanager
def _home(folder: Path) -> Iterator[None]:
    """A folder to write in, made if need be; what was made for a file that did not come goes again."""
    made = absent(folder, *folder.parents)
    folder.mkdir(parents=True, exist_ok=True)
    came = False
    try:
        yield
        came = True
    finally:
        if not came:
            unmake(made)


@contextmanager
def atomic(path: str | Path, suffix: str = "") -> Iterator[Path]:
    """Give a temporary path beside `path`; what was written there becomes `path` if all went well.

    The temporary name ends in `suffix` (for libraries that look at it). On any exception the
    temporary file is removed and `path` stays as it was; what a killed process left goes when the next one comes.
    Raises DataError where there is no file, but a device: all that write to it would write to ours.
    """
    path = Path(path)
    if no_file(path):
        raise DataError(f"{path}: a device, a pipe or a socket; name a file to write")
    with _home(path.parent), naming(path):
        _sweep(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.new-", suffix=suffix)
        part = Path(name)
        try:
            _hold(handle)
            yield part
            with open(part, "rb+") as file:  # not the handle: a library may have put another file here
                os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            part.chmod(0o666 & ~mask)
            part.replace(path)
        finally:
            os.close(handle)
            part.unlink(missing_ok=True)


def _hold(handle: int) -> None:
    """Lock a temporary file, where the disk can, so that nobody takes it for a killed process's."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        log.debug("no locks here: %s", error)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8", errors=HALF, newline="\n")


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes, whole or not at all."""
    with atomic(path) as part:
        part.write_bytes(data)


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON; NaN and infinity are refused, they are not JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> int:
    """Write one JSON object a line and return how many."""
    count = 0
    with atomic(path) as part, open(part, "w", encoding="utf-8", errors=HALF, newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read_json(path: str | Path) -> Any:
    """Read one JSON value. Raises DataError naming the line where it is broken."""
    return parse_json(Path(path).read_bytes(), path)


def parse_json(text: str | bytes, where: str | Path, *, lines: bool = True) -> Any:
    """The value of JSON text. Raises DataError naming `where` and, with `lines`, the line of the text."""
    try:
        # a byte order mark says nothing; other encodings, which json.loads would guess, are not UTF-8
        return json.loads(str(text, "utf-8-sig") if isinstance(text, bytes) else text)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if lines else ""
        raise DataError(f"{where}{line}: not JSON: {error.msg} (column {error.colno}); mend it") from None
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        line = f":{number}" if lines else ""
        at = error.start - error.object.rfind(b"\n", 0, error.start)
        raise DataError(f"{where}{line}: not UTF-8 at byte {at} of the line; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {unreadable(error)}") from None


def unreadable(error: Exception) -> str:
    """What Python refuses to read though it is JSON."""
    deep = isinstance(error, RecursionError)
    return "brackets too deep to be read; flatten it" if deep else "a number with too many digits; write it as text"


def read_jsonl(path: str | Path) -> Iterator[dict]:
    """Read one JSON object a line; blank lines are skipped. Raises DataError naming file and line."""
    with open(path, "rb") as file:
        pace, done = Pace(path, os.fstat(file.fileno()).st_size), 0
        for number, raw in enumerate(file, 1):
            done += len(raw)
            pace.at(done)
            if not raw.strip():
                continue
            row = parse_json(raw.rstrip(), f"{path}:{number}", lines=False)
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a JSON object is needed, this is a {type(row).__name__}")
            yield row


def append_line(path: str | Path, row: dict) -> None:
    """Append one JSON object to a file that is there, in one write: a kill leaves whole lines but for the last.

    Raises DataError for a file that is not there: made anew, it would lack its first lines.
    """
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", HALF)
    with naming(path), open(path, "ab", buffering=0, opener=_no_new) as file:
        end, left = os.fstat(file.fileno()).st_size, memoryview(line)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:  # a full disk takes half a line
            file.truncate(end)
            raise


def settle(path: str | Path) -> None:
    """Flush to disk what was appended. Raises DataError for a file that is not there."""
    with naming(path), open(path, "ab", opener=_no_new) as file:
        os.fsync(file.fileno())


def _no_new(path: str, flags: int) -> int:
    try:
        return os.open(path, flags & ~os.O_CREAT)
    except FileNotFoundError:
        raise DataError(f"{path}: vanished while it was written to; run the same command again") from None


def digest(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    found, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        pace, done = Pace(f"{path}: its digest", os.fstat(file.fileno()).st_size), 0
        while size := file.readinto(block):
            found.update(block[:size])
            done += size
            pace.at(done)
    return found.hexdigest()
