"""What has come of a download that is not whole yet, and whose bytes they are.

They lie beside their place as .NAME.part, with a note in .NAME.part.json. Not through `atomic` of base/files.py: they
must outlive the process, and only a whole file is renamed.
"""

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rwkvpipe.base.errors import DataError, HubError
from rwkvpipe.base.files import read_json, write_json

log = logging.getLogger("rwkvpipe")


@contextmanager
def written(path: Path) -> Iterator[None]:
    """What the disk refuses becomes a HubError in one line; failures of the network are OSErrors too."""
    try:
        yield
    except OSError as error:
        raise HubError(
            f"{path}: cannot be written ({error.strerror or error}); make room or choose another place, then run the"
            " same command again"
        ) from None


class Part:
    """What has come of a download; a context that holds the file open, and locked against a second process."""

    def __init__(self, out: Path, source: str):
        self.path = out.with_name(f".{out.name}.part")
        self.notes = out.with_name(f".{out.name}.part.json")
        self.source = hashlib.sha256(source.encode()).hexdigest()  # addresses may hold secrets

    def __enter__(self) -> "Part":
        with written(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise HubError(f"{self.path}: another process is downloading into it; wait for it or end it") from None
        except OSError as error:
            log.info("%s: cannot be locked here (%s); start no second download of it", self.path, error.strerror)
        return self

    def __exit__(self, *reason) -> None:
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes so far."""
        return os.fstat(self._file.fileno()).st_size

    def note(self) -> dict:
        """Whose bytes these are: etag, modified, length; empty if that is not known."""
        try:
            note = read_json(self.notes)
        except (FileNotFoundError, DataError):
            return {}
        return note if isinstance(note, dict) and note.get("source") == self.source else {}

    def start(self) -> int:
        """The byte to go on from; 0 when nobody could tell that the rest belongs to what is there."""
        size, note = self.size, self.note()
        length = note.get("length")
        if not (note.get("etag") or note.get("modified")) or (length is not None and size > length):
            self.clear()
            return 0
        if size and size == length:
            # the last byte is asked for once more, and with it whether the file is still the same
            size -= 1
            self._file.truncate(size)
        return size

    def begin(self, note: dict) -> None:
        """Start from nothing, with a note of what the server says about its file: etag, modified, length."""
        self.clear()
        with written(self.notes):
            write_json(self.notes, {"source": self.source, **note})

    def add(self, block: bytes) -> None:
        """Append bytes, all of them."""
        view = memoryview(block)
        with written(self.path):
            while view:
                view = view[self._file.write(view) :]

    def clear(self) -> None:
        """Forget what came."""
        self._file.truncate(0)
        self.notes.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove it."""
        self.path.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)

    def finish(self, out: Path) -> None:
        """Put it, whole and on disk, into its place."""
        with written(out):
            os.fsync(self._file.fileno())
            self.path.replace(out)
            self.notes.unlink(missing_ok=True)
