"""Whole files or none: everything is written beside its place, flushed to disk, then renamed."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rwkvpipe.base.errors import DataError


@contextmanager
def atomic(path: str | Path, suffix: str = "") -> Iterator[Path]:
    """Give a temporary path beside `path`; what was written there becomes `path` if all went well.

    The temporary name ends in `suffix` (for libraries that look at it). On any exception the
    temporary file is removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=suffix)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


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
    with atomic(path) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read_json(path: str | Path) -> Any:
    """Read one JSON value. Raises DataError naming the line where it is broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {_unreadable(error)}") from None


def _unreadable(error: Exception) -> str:
    """What Python refuses to read though it is JSON."""
    deep = isinstance(error, RecursionError)
    return "brackets too deep to be read; flatten it" if deep else "a number with too many digits; write it as text"


def read_jsonl(path: str | Path) -> Iterator[dict]:
    """Read one JSON object a line; blank lines are skipped. Raises DataError naming file and line."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON: {error.msg} (column {error.colno})") from None
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 at byte {error.start} of the line") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: {_unreadable(error)}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a JSON object is needed, this is a {type(row).__name__}")
            yield row


def append_line(path: str | Path, row: dict) -> None:
    """Append one JSON object as one line in one write, so that a kill leaves whole lines but for the last."""
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with open(path, "ab") as file:
        file.write(line)


def digest(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
