"""One process at a time: locks on files, which the kernel frees when their holder is gone, however it went."""

import fcntl
import logging
import os
from pathlib import Path

log = logging.getLogger("rwkvpipe")

HIGHEST = 256  # descriptors that a process may have got from the one it was before


def _same(handle: int, path: Path) -> bool:
    """Whether a descriptor is open on the file that now bears this name."""
    try:
        one, other = os.fstat(handle), os.stat(path)
    except OSError:  # closed, or no such file
        return False
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def open_lock(path: Path) -> int:
    """A descriptor of the file of a lock, made if need be, which other users may open too."""
    try:  # another user's file in a folder with the sticky bit may be opened, but not with O_CREAT
        return os.open(path, os.O_RDWR)
    except FileNotFoundError:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        os.fchmod(handle, 0o666)
        return handle


def _locked(handle: int, waiting: str | None) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            return False
        holder = os.pread(handle, 20, 0).decode(errors="replace").strip() or "another process"
        log.info("%s (held by process %s); waiting", waiting, holder)
        fcntl.flock(handle, fcntl.LOCK_EX)
    return True


def lock(path: Path, waiting: str | None = None) -> int | None:
    """An inheritable descriptor that holds an exclusive lock on a file made for it.

    Taken by somebody else, it is waited for with the line `waiting` in the log, or given up (None) without one.
    """
    while True:
        handle = open_lock(path)
        if not _locked(handle, waiting):
            os.close(handle)
            return None
        if _same(handle, path):
            break
        os.close(handle)  # whoever held it has removed it: that was a lock on nothing
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    os.set_inheritable(handle, True)
    return handle


def out_of(words: list[str]) -> Path | None:
    """What --out names on a command line."""
    for number, word in enumerate(words):
        if word == "--out" and number + 1 < len(words):
            return Path(words[number + 1])
        if word.startswith("--out="):
            return Path(word.removeprefix("--out="))
    return None


def claim(words: list[str]) -> Path | None:
    """Lock the result that --out names, so that no second process works on it; returns the file to `release`.

    What this process locked before it became another program stays its own. Where the disk has no locks, says so.
    """
    out = out_of(words)
    if out is None or os.environ.get("RANK", "0") != "0":  # of those that train together the first one has it
        return None
    file = out.parent / f".{out.name}.lock"
    if any(_same(handle, file) for handle in range(3, HIGHEST)):
        return file
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock(file, waiting=f"{out} is in work")
    except PermissionError as error:
        raise PermissionError(error.errno, error.strerror, str(out)) from None
    except OSError as error:
        if error.filename is not None:  # not the lock was refused, but the file
            raise OSError(error.errno, error.strerror, str(out)) from None
        log.info("%s: cannot be locked here (%s); start nothing else on it", out, error.strerror)
    return file


def release(file: Path | None) -> None:
    """Remove what `claim` made; the lock itself ends with the process."""
    if file is not None:
        file.unlink(missing_ok=True)
