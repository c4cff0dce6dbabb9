"""A line now and then on how far a piece of work is, how fast it goes and how long it will take."""

import logging
import time

log = logging.getLogger("rwkvpipe")

EVERY = 5.0  # seconds between two lines; what takes less says nothing


class Pace:
    """Progress of one piece of work, counted in `unit` (bytes, documents) up to `total`, where that is known."""

    def __init__(self, what: object, total: float = 0, unit: str = "MB"):
        self.what, self.total, self.unit = what, total, unit
        self.began = self.told = time.monotonic()

    def at(self, done: float) -> None:
        """Say how far it is, if it is time to."""
        now = time.monotonic()
        if now - self.told < EVERY or not done:
            return
        self.told, rate, scale = now, done / (now - self.began), 1e-6 if self.unit == "MB" else 1
        text = f"{done * scale:,.0f}" + (f" of {self.total * scale:,.0f}" if self.total else "")
        left = max(0, round((self.total - done) / rate))
        rest = f", {left // 60}:{left % 60:02} left" if self.total else ""
        log.info("%s: %s %s, %s/s%s", self.what, text, self.unit, f"{rate * scale:,.1f}", rest)
