"""Processes that train together: how they are started and watched.

The variables are those of torchrun (RANK, WORLD_SIZE, LOCAL_RANK), so that it may start them as well, on several
machines; the door starts those of one machine by itself, because they must inherit the locks that it holds.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rwkvpipe.base.errors import PARTED, STOPS

log = logging.getLogger("rwkvpipe")

MEET = "RWKVPIPE_MEET"  # the folder where processes of one machine find each other
DESERTED = "deserted"  # a file there: whoever started the door is gone
POLL = 0.05
PATIENCE = 20.0  # seconds that the others have to end by themselves once one has failed


def meeting() -> str | None:
    """Where the processes find each other, as torch.distributed spells it; None where torchrun's variables say it."""
    return f"file://{os.environ[MEET]}/store" if MEET in os.environ else None


def deserted() -> bool:
    """Whether the door has seen that whoever started it is gone."""
    return MEET in os.environ and Path(os.environ[MEET], DESERTED).exists()


def _start(words: list[str], index: int, count: int, folder: Path) -> subprocess.Popen:
    """One of the processes, with every lock that this one holds; what the first one says is said, the rest is kept."""
    given = {"RANK": str(index), "WORLD_SIZE": str(count), "LOCAL_RANK": str(index), MEET: str(folder)}
    said = None if index == 0 else os.open(folder / f"said-{index}", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        return subprocess.Popen(
            words, env={"GLOO_SOCKET_IFNAME": "lo", **os.environ, **given}, close_fds=False,
            stdout=None if index == 0 else subprocess.DEVNULL, stderr=said,
        )  # fmt: skip
    finally:
        if said is not None:
            os.close(said)


def _watch(crew: list[subprocess.Popen], folder: Path) -> None:
    """Wait for all; once one has failed, the others have PATIENCE to end."""
    parent, end = os.getppid(), float("inf")
    while any(process.poll() is None for process in crew):
        if os.getppid() != parent:
            Path(folder, DESERTED).touch()
        if end == float("inf") and any(process.poll() for process in crew):
            end = time.monotonic() + PATIENCE
        if time.monotonic() > end:
            for process in crew:
                process.kill()
        time.sleep(POLL)


def lead(words: list[str], count: int) -> int:
    """Start `count` processes of one program that train together, and wait: the exit status of the one that decides.

    One that fails ends all. Stop signals are passed on; all of them then stop after the same step.
    """
    with tempfile.TemporaryDirectory(prefix="rwkvpipe-") as name:
        folder, crew, came = Path(name), [], []

        def pass_on(number: int, frame) -> None:
            came.append(number)
            for process in crew:
                process.send_signal(number)

        for number in STOPS:
            signal.signal(number, pass_on)
        for index in range(count):
            crew.append(_start(words, index, count, folder))
            for number in came:  # it came while this one was about to start
                crew[-1].send_signal(number)
        _watch(crew, folder)
        statuses = [process.returncode for process in crew]
        causes = [index for index, status in enumerate(statuses) if status not in (0, PARTED)]
        if not causes:
            return max(statuses)
        index = causes[0]
        status = statuses[index]
        if index:
            sys.stderr.write(Path(folder, f"said-{index}").read_text(errors="replace"))
        if status < 0:
            what = f"process {index + 1} of {count} was killed ({signal.Signals(-status).name})"
            log.error("error: %s, so all were stopped; the same command goes on from the last resume point", what)
        return status if status > 0 else 128 - status
