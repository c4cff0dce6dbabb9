"""What a file holds, told by its first bytes; its name decides only what they leave open."""

import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rwkvpipe.base.errors import DataError, PipeError
from rwkvpipe.base.files import parse_json
from rwkvpipe.base.pace import Pace

BOM = b"\xef\xbb\xbf"
STARTS = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "stream",  # of Arrow: a continuation mark before the first message
    b"\x93NUMPY": "numpy",
    b"PK\x03\x04": "arrays",
    b"PK\x05\x06": "arrays",
    b"MMIDIDX": "index",
}
PACKED = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst"}
UNREAD = {b"BZh%d1AY&SY" % size: "bzip2" for size in range(1, 10)}
UNREAD |= {b"\xfd7zXZ\x00": "xz", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar"}
TAR = 257  # where it stands in the head of an archive of files that it is one
ROWS = (".jsonl", ".ndjson", ".json")
NAMED = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".npy": "numpy", ".npz": "arrays"}
LOOK = 1 << 16  # bytes that are looked at
TABLES = ("lines", "list", "object", "parquet", "arrow", "stream")


class _Told(io.FileIO):
    """A file that says, now and then, how far it is read."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.pace = Pace(f"{path}: read", os.fstat(self.fileno()).st_size)

    def readinto(self, room) -> int | None:
        found = super().readinto(room)
        self.pace.at(self.tell())
        return found


@contextmanager
def opened(path: str | Path, packed: str, *, whole: bool = False) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked; where they are read as a `whole`, it is said how far that is.

    Raises DataError when it is cut short or damaged.
    """
    try:
        with _Told(path) if whole else open(path, "rb", buffering=0) as raw, io.BufferedReader(raw, 1 << 18) as file:
            if packed == "gz":
                with gzip.open(file, "rb") as unpacked:
                    yield unpacked
            elif packed == "zst":
                import pyarrow

                # several frames may follow each other, as in files that grow
                with pyarrow.input_stream(file, compression="zstd", buffer_size=1 << 20) as stream:
                    yield io.BufferedReader(stream, 1 << 20)
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cut short or damaged ({error}); copy or pack it again") from None
    except OSError as error:
        if packed != "zst" or error.errno is not None:
            raise
        raise DataError(f"{path}: cut short or damaged ({str(error).splitlines()[0]}); copy or pack it again") from None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line, "", lines=False), dict)
    except PipeError:
        return False


def _text_or_rows(head: bytes, suffix: str) -> str:
    """lines, list, object or text, by the first characters of what is no binary file."""
    head = head.removeprefix(BOM).lstrip()
    first, _, rest = head.partition(b"\n")
    whole = bool(rest) or len(head) < LOOK // 2
    if suffix in ROWS:
        if head[:1] == b"[" and suffix == ".json":
            return "list"
        # one object over many lines
        if head[:1] == b"{" and suffix == ".json" and rest and not _is_object(first):
            return "lines" if first.rstrip().endswith(b"}") else "object"
        if head[:1] == b"{" and suffix == ".json" and not whole:
            return "line"
        return "list" if head[:1] == b"[" and head[1:].lstrip()[:1] == b"{" else "lines"
    # a text may begin with a bracket: rows are rows when the first is one
    if head[:1] == b"{" and (_is_object(first) if whole else head[:2] == b'{"'):
        return "lines"
    if re.match(rb'\{\s*\n\s*"(?:[^"\\\n]|\\.)*"\s*:', head):
        return "object"
    return "list" if re.match(rb'\[\s*\{\s*"', head) else "text"


def _one_line(path: Path, packed: str) -> bool:
    """Whether a file is one line, but for space behind it."""
    ended = False
    with opened(path, packed) as file:
        while block := file.read(1 << 20):
            _, end, rest = (b"", b"\n", block) if ended else block.partition(b"\n")
            ended = bool(end)
            if rest.strip():
                return False
    return True


def kind_of(path: str | Path) -> tuple[str, str]:
    """(kind, packed) of a file: kind lines, list, object, parquet, arrow, stream, numpy, arrays, index or text.

    Raises DataError when there is no such file, or what its name promises is not in it.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder without files" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {what}; name a corpus file")
    with open(path, "rb") as file:
        head = file.read(LOOK)
    packed = next((name for start, name in PACKED.items() if head.startswith(start)), "")
    if unread := next((name for start, name in UNREAD.items() if head.startswith(start)), ""):
        raise DataError(f"{path}: packed with {unread}, which is not read; unpack it, or pack it with gzip or zstd")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if packed:
        with opened(path, packed) as file:
            head = file.read(LOOK)
        suffixes = [suffix for suffix in suffixes if suffix not in (".gz", ".gzip", ".zst", ".zstd")]
    suffix = suffixes[-1] if suffixes else ""
    if head.startswith(b"ustar", TAR):
        raise DataError(f"{path}: a tar archive, which is not read; unpack it, and name its folder")
    kind = next((kind for start, kind in STARTS.items() if head.startswith(start)), "")
    if kind and packed:
        raise DataError(f"{path}: a {kind} file packed with {packed}; unpack it")
    if kind:
        return kind, ""
    if suffix in NAMED:
        what = "no .npy file" if suffix == ".npy" else f"no {suffix[1:]} file"
        remedy = "save whole numbers with numpy.save(path, array)" if suffix == ".npy" else "make or copy it again"
        raise DataError(f"{path}: it is {what}, or damaged; {remedy}")
    kind = _text_or_rows(head, suffix)
    if kind == "line":  # longer than what was looked at
        kind = "object" if _one_line(path, packed) else "lines"
    return kind, packed
