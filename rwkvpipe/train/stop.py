"""Stop signals: put off until weights are whole, and noted by processes that have to stop after the same step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rwkvpipe.base.errors import STOPS
from rwkvpipe.train.dist import Rank


@contextmanager
def held(*, stopping: bool = False) -> Iterator[None]:
    """Stop signals wait until the end of the block: weights are never caught between two steps.

    To a process that is `stopping` anyway they say nothing new.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in STOPS}
    for number in before:
        signal.signal(number, lambda got, frame: came.append(got))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if came and not stopping:
            signal.raise_signal(came[0])


@dataclass
class Stops:
    """Whether a stop signal came. Processes that train together note it, and all stop after the same step."""

    came: bool = False
    agreed: bool = False

    def _note(self, number: int, frame) -> None:
        self.came = True

    @contextmanager
    def noted(self, rank: Rank) -> Iterator[None]:
        """Signals are noted inside the block; a process that trains alone is stopped by them at once."""
        numbers = () if rank.count == 1 else STOPS
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
