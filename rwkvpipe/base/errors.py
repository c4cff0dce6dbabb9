"""What may go wrong, and how a verb says so: one line, exit status 2.

Anything that is not a `PipeError` is a bug of ours and keeps its traceback.
"""

import argparse
import contextlib
import difflib
import errno
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rwkvpipe.base.fingerprint import still
from rwkvpipe.base.lock import claim, release

log = logging.getLogger("rwkvpipe")

BAD_INPUT = 2
LINE = 600  # characters of an error at most
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a scheduler, a terminal that closes
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again, it goes on
PARTED = 69  # EX_UNAVAILABLE of sysexits.h: another of the processes that train together has failed, and says why
DEVICES = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))  # nothing in them is a file to be written anew


class PipeError(Exception):
    """Something the user can mend. The text says what is wrong, where, and what to do."""


class ConfigError(PipeError):
    """A setting is unknown, out of range, or does not fit another; the text names its key."""


class DataError(PipeError):
    """Input data cannot be used; the text names file and line."""


class WeightsError(PipeError):
    """A checkpoint is damaged, foreign, or of another size; the text names file and tensor."""


class HubError(PipeError):
    """A download failed or brought something else than promised."""


class Parted(PipeError):
    """Another of the processes that train together is gone."""


class Stopped(PipeError):
    """The process was told to stop (Ctrl-C, SIGTERM) and has kept its work."""


REMEDIES = {
    errno.ENOENT: "mend the path, or make it first",
    errno.EISDIR: "name a file",
    errno.EEXIST: "a file stands where a folder is needed; choose another place",
    errno.ENOTDIR: "a part of the path is a file; name a folder",
    errno.EACCES: "mend its rights, or choose another place",
    errno.EPERM: "mend its rights, or choose another place",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "make room, then run the same command again",
    errno.EDQUOT: "make room, then run the same command again",
    errno.EFBIG: "the limit on the size of files is too low (ulimit -f); raise it, then run the same command again",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def no_file(path: Path) -> bool:
    """Whether something else than a file or a folder is there; standard output is whatever it leads to just now."""
    return path.parent in DEVICES or (path.exists() and not path.is_file() and not path.is_dir())


def new_file(text: str) -> Path:
    """The type of an option that names a file to write: known to be none that cannot be one, before days of work."""
    path = Path(text)
    if not path.name or path.name == ".." or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text or 'nothing'} is a folder; name the file to write")
    if no_file(path):  # a file would take its place, for all who use it
        raise argparse.ArgumentTypeError(f"{text} is a device, a pipe or a socket; name a file to write")
    return path


class Parser(argparse.ArgumentParser):
    """The command line of a verb: what is wrong with it is a ConfigError, in one line, that names the nearest option.

    Options are written out: an abbreviation would change its meaning with the next option that is added.
    """

    def __init__(self, **given):
        super().__init__(allow_abbrev=False, **given)
        self.add_argument("--code", metavar="DIGEST", help="the code that was planned to run; refuse to run another")

    def parse_args(self, args=None, namespace=None):
        """As argparse; raises ConfigError, also if the code is not the one that --code names."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(rest[0].partition("=")[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{rest[0] or 'an empty word'}: no such argument; {hint}")
        if found.code not in (None, "", "off") and not still(found.code):
            verb = found.code.partition("@")[0]
            raise ConfigError(f"the code of {verb} changed after this job was planned; run snakemake again")
        for action in self._actions:
            if action.option_strings and getattr(found, action.dest, None) == "":
                raise ConfigError(f"{action.option_strings[-1]}: is empty; leave it out or give a value")
        return found

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage."""
        name, found, problem = message.removeprefix("argument ").partition(": ")
        raise ConfigError(f"{f'{name}: {problem}' if found else message}; see python -m {self.prog} --help")


def explain(error: PipeError | OSError) -> str:
    """What went wrong in one line without control characters: of the system's refusals the file, and what to do."""
    if isinstance(error, PipeError):
        text = str(error)
    else:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        remedy = REMEDIES.get(error.errno or 0)
        text = f"{where}{error.strerror or error}" + (f"; {remedy}" if remedy else "")
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    return text if len(text) <= LINE else f"{text[: LINE - 150]} ... {text[-145:]}"  # the place first, the way out last


class _Lines(logging.Formatter):
    """Events begin with the time; an error is the line `error: ...` and nothing else."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.levelno >= logging.ERROR else super().format(record)


def start_logging() -> None:
    """Plain lines on standard error, one an event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.raiseExceptions = False  # a log on a full disk is no reason to stop, nor for a traceback a line


def _ignore_stops() -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _on_stop(number: int, frame) -> None:
    _ignore_stops()  # a second one must not break into what the first one makes us keep
    raise KeyboardInterrupt(signal.Signals(number).name)


def outcome(main: Callable[[], int | None]) -> int:
    """Run a verb's `main` and return its exit status, what went wrong said in one line.

    Status 0 is done, 2 is bad input, 75 is stopped on request, 69 that another process failed; a bug raises.
    """
    try:
        return main() or 0
    except Stopped as stop:
        log.info("%s", stop)
        return STOPPED
    except KeyboardInterrupt as stop:
        log.info("stopped (%s); run the same command again to go on", stop or "SIGINT")
        return STOPPED
    except Parted as parting:
        log.info("%s", parting)
        return PARTED
    except (PipeError, OSError) as error:
        log.error("error: %s", explain(error))
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        # torch has a class of its own for GPUs only
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        log.error(
            "error: out of memory; give fewer rows at a time (--micro-batch, --rows; in a profile micro_batch, rows),"
            " a smaller batch, context or model, or a machine with more"
        )
        return BAD_INPUT


def run(main: Callable[[], int | None]) -> None:
    """Run a verb's `main`: logging on, errors in one line, then leave with the exit status (see `outcome`)."""

    def whole() -> int | None:
        held = claim(sys.argv[1:])
        try:
            status = main()
            _ignore_stops()  # what is done cannot be stopped
        finally:
            release(held)
        sys.stdout.flush()  # a reader that is gone is an error like any other
        return status

    start_logging()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that the terminal does not have becomes a question mark
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and shells ask for jobs in the background
            signal.signal(number, _on_stop)
    status = outcome(whole)
    with contextlib.suppress(OSError):  # the log may lie on a full disk; the status says it too
        sys.stderr.flush()
    # not sys.exit: a torch worker thread at interpreter teardown must not change the status
    os._exit(status)
