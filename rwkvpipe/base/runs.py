"""Several runs at once on one results folder: which may begin, and which waits for what another one makes.

Runs of different names share corpora, tokenizers, weights and questions. Whoever makes one of these has it alone;
whoever reads it keeps others from making it anew until its own run has ended. What a killed run held, the kernel frees.
"""

import fcntl
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from rwkvpipe.base.errors import ConfigError
from rwkvpipe.base.lock import open_lock

log = logging.getLogger("rwkvpipe")
ALONE, BESIDE = fcntl.LOCK_EX, fcntl.LOCK_SH
TELL = 10.0  # seconds between looks at the logs of what is running
POLL = 0.5  # seconds between looks at what has been made
START = time.time()  # nothing was planned before


class Claims:
    """What one run has of a results folder, until its process ends.

    Each shared thing has two locks: `make` is its maker's, and `use` everybody's, of which a maker first has all. A
    maker that is done keeps a reader's part of `use` before it gives up `make`, so nobody comes between.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.held: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, name: str, kind: int) -> bool:
        """Have a lock, alone or beside others; False if somebody else stands against it."""
        handle = self.held.get(name) or open_lock(self.folder / name)
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            self.held.pop(name, None)
            return False
        except OSError as error:
            log.info("%s: no locks here (%s); start no other run on these results", self.folder, error.strerror)
        self.held[name] = handle
        os.pwrite(handle, f"{os.getpid():<20}\n".encode(), 0)
        return True

    def drop(self, name: str) -> None:
        """Give up a lock."""
        os.close(self.held.pop(name))

    def holder(self, name: str) -> str:
        """The process that took a lock last."""
        return (self.folder / name).read_text(errors="replace").strip() or "unknown"

    def wait(self, name: str, kind: int) -> None:
        """Wait until a lock could be had, without having it."""
        handle = open_lock(self.folder / name)
        try:
            fcntl.flock(handle, kind)
        finally:
            os.close(handle)

    def begin(self, used: Iterable[str], made: Iterable[str]) -> str | None:
        """Have all things that the run reads, and those that it makes alone; or the first that cannot be had."""
        alone = set(made)
        for name in sorted({*used, *alone}):
            if name in alone:
                free = self.take(f"{name}.make", ALONE) and self.take(f"{name}.use", ALONE)
            else:
                free = self.take(f"{name}.use", BESIDE)
            if not free:
                for other in [other for other in self.held if not other.endswith(".run")]:
                    self.drop(other)
                return name
        return None

    def finished(self, name: str) -> None:
        """Let others read what this run has made."""
        while not self.take(f"{name}.use", BESIDE):
            time.sleep(POLL / 10)  # somebody who waited for it got it first, and gives it up: `make` is taken
        self.drop(f"{name}.make")

    def stand_back(self, name: str, *, maker: bool, say: Callable[[str], None]) -> None:
        """Wait until what stood against this run's use of a shared thing may be gone."""
        if not self.take(f"{name}.make", BESIDE):
            say(f"{name} of the shared results is made by another run ({self._who(name, 'make')}); waiting for it")
            self.wait(f"{name}.make", BESIDE)
            return
        self.drop(f"{name}.make")
        if maker and not self.take(f"{name}.use", ALONE):
            say(
                f"{name} of the shared results would be made anew, and another run uses it as it is"
                f" ({self._who(name, 'use')}); waiting for its end. Under a name of its own it need not wait"
            )
            self.wait(f"{name}.use", ALONE)
        elif maker:
            self.drop(f"{name}.use")

    def _who(self, name: str, part: str) -> str:
        return f"process {self.holder(f'{name}.{part}')}"


def _came_since(files: Iterable[str]) -> bool:
    """Whether one of the files was written after this run began to plan, by the clock here."""
    return any(START <= path.stat().st_mtime <= time.time() for path in map(Path, files) if path.exists())


def begin(
    claims: Claims, run: str, used: Mapping[str, Iterable[str]], made: Mapping[str, list], say: Callable[[str], None]
) -> bool:
    """Take a run and the shared things it needs; False after waiting for others, whose work changes what is to do.

    `used` has the files of each thing: of one that was made by another run while this one planned, nothing is to be
    made anew, so there is nothing to wait for but a new plan.

    Raises ConfigError if the run is in work already.
    """
    if not claims.take(f"{run}.run", ALONE):
        raise ConfigError(
            f"run {run}: another snakemake works on it (process {claims.holder(f'{run}.run')}); wait for its end,"
            f" stop it (kill {claims.holder(f'{run}.run')}), or give this one another name (run: ...)"
        )
    name = claims.begin(used, made)
    if name is not None:
        for number in (signal.SIGINT, signal.SIGTERM):  # Snakemake's handlers stop jobs; who waits has none
            signal.signal(number, signal.SIG_DFL)
        if name not in made or not _came_since(used[name]):
            claims.stand_back(name, maker=name in made, say=say)
    return name is None


def hand_over(claims: Claims, made: Mapping[str, list], done: Callable[[object], bool]) -> None:
    """Let other runs read each shared thing as soon as all its jobs are `done`; looks on from a thread of its own."""

    def look() -> None:
        left = dict(made)
        while left:
            for name in [name for name, jobs in left.items() if all(map(done, jobs))]:
                claims.finished(name)
                del left[name]
            time.sleep(POLL)

    if made:
        threading.Thread(target=look, daemon=True).start()


def last_words(log_file: str | Path) -> str:
    """The last line of a log; nothing of one that is not there."""
    try:
        with open(log_file, "rb") as file:
            file.seek(-min(4000, file.seek(0, os.SEEK_END)), os.SEEK_END)
            return file.read().decode(errors="replace").strip().rpartition("\n")[2]
    except OSError:
        return ""


def tell(running: Callable[[], Mapping[str, str]], say: Callable[[str], None]) -> None:
    """Repeat now and then what jobs that take long say in their logs; `running` gives steps with their log files."""

    def look() -> None:
        before: dict[str, str] = {}
        while True:
            time.sleep(TELL)
            now = {step: last_words(log_file) for step, log_file in running().items()}
            for step, said in now.items():
                if said and before.get(step, said) != said:  # not at first sight: it may be done in no time
                    say(f"{step}: {said}")
            before = now

    threading.Thread(target=look, daemon=True).start()


def failure(step: str, log_file: str | None) -> str:
    """Why a step did not end well, in one line that names its log: the last line that it said there."""
    said = last_words(log_file) if log_file else ""
    stopped = "error: " not in said and "stopped" in said
    why = said.removeprefix("error: ")
    if not stopped and re.match(r"(\d\d:\d\d:\d\d |$)", said):  # nothing but what it was at
        why = "it ended without a word of why, as what is killed does, by the system if memory is short, and what finds"
        why += " its disk full"
        why += f"; the last was: {said}" if said else ""
    told = f"{'stopped' if stopped else 'error'}: {step}: {why}"
    return told + (f"; its log is {log_file}" if log_file else "")
