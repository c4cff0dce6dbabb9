"""Work by several processes whose results come in the order of the jobs: the number of processes decides nothing."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Lock
from typing import Any

from rwkvpipe.base.errors import DataError, PipeError

AHEAD = 3  # results a process may be ahead of the one that is waited for: they are held in memory


class Turn:
    """What one of the processes that share work has at a time: the leave to hold much memory.

    Nobody need wait for it in a process that works alone.
    """

    def __init__(self):
        self.lock: Lock | None = None
        self.had = False

    def take(self) -> None:
        """Wait until no other process has it."""
        if self.lock and not self.had:
            self.had = self.lock.acquire()

    def leave(self) -> None:
        """Let others have it, if this process does."""
        if self.had:
            self.had = False
            self.lock.release()


turn = Turn()  # of this process


def _serve(task: Callable[[Any], Any], pipe: Connection, lock: Lock) -> None:
    """Answer jobs until nobody asks any more, be it because the asking process was killed."""
    turn.lock = lock
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the asking process says when it is over
    try:
        while True:
            number, job = pipe.recv()
            try:
                answer = (number, task(job), None)
            except (PipeError, OSError) as error:
                answer = (number, None, error)
            turn.leave()  # an error may have kept whoever took it from doing so
            pipe.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def in_order(task: Callable[[Any], Any], jobs: Sequence[Any], count: int) -> Iterator[Any]:
    """`task(job)` of each job, in order, made by `count` processes; of one process or job, by this one.

    `task` and all that goes to and fro must be picklable. Raises what the first failing job, in order, raised.
    """
    count = min(count, len(jobs))
    if count < 2:
        yield from map(task, jobs)
        return
    context, workers = multiprocessing.get_context("spawn"), []
    lock = context.Lock()
    try:
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(task, there, lock), daemon=True)
            process.start()
            there.close()
            workers.append((process, here))
        yield from _exchange([pipe for _, pipe in workers], jobs)
    finally:
        for process, pipe in workers:
            pipe.close()
            process.terminate()
        for process, _ in workers:
            process.join()


def _exchange(pipes: list[Connection], jobs: Sequence[Any]) -> Iterator[Any]:
    idle, busy, done = list(pipes), {}, {}
    asked = 0
    for wanted in range(len(jobs)):
        while True:
            while idle and asked < min(len(jobs), wanted + AHEAD * len(pipes)):
                pipe = idle.pop()
                pipe.send((asked, jobs[asked]))
                busy[pipe], asked = asked, asked + 1
            if wanted in done:
                break
            for pipe in wait(list(busy)):
                try:
                    number, result, error = pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise DataError(
                        f"{jobs[busy[pipe]]}: the process that worked on it was ended, perhaps for want of memory;"
                        " run the same command again, with fewer --workers"
                    ) from None
                done[number] = (result, error)
                del busy[pipe]
                idle.append(pipe)
        result, error = done.pop(wanted)
        if error is not None:
            raise error
        yield result
