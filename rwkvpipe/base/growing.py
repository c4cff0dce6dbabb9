"""Files that grow together and survive a kill: a journal says how long each was when all were whole."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rwkvpipe.base.files import absent, naming, unmake

COPIED = 1 << 20  # bytes that are copied at once
EVERY = 2.0  # seconds between records: what is lost at most, give or take one piece


class Growing:
    """A folder of growing files, which `place` moves to where they belong when they are done.

    `mark` says what they are made of: what was left by another mark is thrown away. `state` is what the last record
    says, None at the beginning; the files are as long as they were then. Whole files come by base.files.atomic.
    """

    def __init__(self, folder: Path, mark: str, names: tuple[str, ...]):
        self.folder, self.names = folder, names
        self.journal = folder / "journal"
        self.made: list[Path] = []
        self.state = self._go_on(mark)
        if self.state is None:
            shutil.rmtree(folder, ignore_errors=True)
            self.made = absent(*folder.parents)
            folder.mkdir(parents=True)
            with naming(self.journal):
                self.journal.write_text(json.dumps({"mark": mark}) + "\n", encoding="utf-8")
        self.files = {name: open(folder / name, "ab") for name in names}  # noqa: SIM115
        self.recorded = time.monotonic()

    def _go_on(self, mark: str) -> Any:
        """The last record whose files are long enough, the files cut to it; None if there is none."""
        try:
            lines = self.journal.read_bytes().splitlines(keepends=True)
            if not lines or json.loads(lines[0]) != {"mark": mark}:
                return None
            lengths = {name: os.path.getsize(self.folder / name) for name in self.names}
        except (FileNotFoundError, ValueError):
            return None
        while len(lines) > 1:
            if lines[-1].endswith(b"\n"):
                record = json.loads(lines[-1])
                if all(record["lengths"][name] <= lengths[name] for name in self.names):
                    for left in set(os.listdir(self.folder)) - {*self.names, self.journal.name}:
                        (self.folder / left).unlink(missing_ok=True)  # what was handed over and not taken
                    for name in self.names:
                        os.truncate(self.folder / name, record["lengths"][name])
                    with open(self.journal, "rb+") as file:
                        file.truncate(sum(map(len, lines)))
                    return record["state"]
            lines.pop()
        return None

    def append(self, name: str, data: bytes | memoryview) -> None:
        """Let a file grow."""
        with naming(self.folder / name):
            self.files[name].write(data)

    def take(self, name: str, path: Path, parts: Iterable[tuple[int, int]]) -> None:
        """Let a file grow by parts (start, stop) of another one, which then is no more."""
        with open(path, "rb") as file, naming(self.folder / name):
            for start, stop in parts:
                file.seek(start)
                while start < stop and (block := file.read(min(COPIED, stop - start))):
                    self.files[name].write(block)
                    start += len(block)
        path.unlink()

    def record(self, state: Any, *, now: bool = False) -> None:
        """Keep what is there, with `state` (JSON), if some time has gone by or it must be `now`."""
        if not now and time.monotonic() - self.recorded < EVERY:
            return
        lengths = {}
        for name, file in self.files.items():
            with naming(self.folder / name):
                file.flush()
                os.fsync(file.fileno())
            lengths[name] = file.tell()
        with naming(self.journal), open(self.journal, "ab") as file:
            file.write(json.dumps({"lengths": lengths, "state": state}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.recorded = time.monotonic()

    def close(self) -> None:
        """Flush the files and let them go."""
        for name, file in self.files.items():
            with naming(self.folder / name):
                file.flush()
                os.fsync(file.fileno())
                file.close()

    def place(self, name: str, path: Path) -> None:
        """Move a closed file to where it belongs."""
        os.replace(self.folder / name, path)

    def forget(self) -> None:
        """Leave nothing, nor the folders that were made for this."""
        self.remove()
        unmake(self.made)

    def remove(self) -> None:
        """Remove the files that were not moved."""
        for file in self.files.values():
            with suppress(OSError):  # what a full disk does not take is thrown away anyway
                file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Spool:
    """Bytes in memory, which go into a file of `folder` when they are over `most`; without a folder they never do."""

    def __init__(self, folder: Path | None, most: int):
        self.folder, self.most = folder, most
        self.held = bytearray()
        self.path: Path | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Let them grow."""
        self.held += data
        if self.folder is not None and len(self.held) > self.most:
            self._flush()

    def _flush(self) -> None:
        if self.path is None:
            with naming(self.folder / "spool"):
                handle, name = tempfile.mkstemp(dir=self.folder, prefix="spool-")
                os.close(handle)
                self.path = Path(name)
        with naming(self.path), open(self.path, "ab") as file:
            file.write(self.held)
        self.held = bytearray()

    def __len__(self) -> int:
        return len(self.held) + (self.path.stat().st_size if self.path else 0)

    def cut(self, size: int) -> None:
        """Forget all behind the first `size` bytes."""
        before = len(self) - len(self.held)
        if size < before:
            os.truncate(self.path, size)
        del self.held[max(0, size - before) :]

    def taken(self) -> bytearray | Path:
        """All of them, or the file that they are in."""
        if self.path is not None:
            self._flush()
            return self.path
        return self.held
