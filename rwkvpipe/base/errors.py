"""What may go wrong, and how a verb says so: one line, exit status 2.

Anything that is not a `PipeError` is a bug of ours and keeps its traceback.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable

log = logging.getLogger("rwkvpipe")

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again, it goes on


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


class Stopped(PipeError):
    """The process was told to stop (Ctrl-C, SIGTERM) and has kept its work."""


def start_logging() -> None:
    """Plain lines on standard error, one an event."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


def _on_stop(number: int, frame) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def run(main: Callable[[], int | None]) -> None:
    """Run a verb's `main`: logging on, errors in one line, then leave with the exit status.

    Status 0 is done, 2 is bad input, 75 is stopped on request; a bug keeps its traceback (1).
    """
    start_logging()
    signal.signal(signal.SIGTERM, _on_stop)
    try:
        status = main() or 0
    except Stopped as stop:
        log.info("%s", stop)
        status = STOPPED
    except PipeError as error:
        log.error("error: %s", error)
        status = 2
    except KeyboardInterrupt as stop:
        log.info("stopped (%s); run the same command again to go on", stop or "SIGINT")
        status = STOPPED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        log.error("error: %s%s", where, error.strerror or error)
        status = 2
    sys.stderr.flush()
    sys.stdout.flush()
    # not sys.exit: a torch worker thread at interpreter teardown must not change the status
    os._exit(status)
