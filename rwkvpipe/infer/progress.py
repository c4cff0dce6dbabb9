"""How far a long piece of work is: a line now and then."""

import logging
import time

log = logging.getLogger("rwkvpipe")

EVERY = 10.0  # seconds between lines on progress


class Progress:
    """A line now and then on how far the work is."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done, self.tokens = what, total, 0, 0
        self.began = self.told = self.last = time.monotonic()

    def add(self, done: int, tokens: int = 0) -> None:
        """Count what was just done. Things that are done together come in bursts: a line tells of those before."""
        now = time.monotonic()
        if not self.done:
            self.told = now
        elif now - self.told >= EVERY:
            self.told, spent = now, max(self.last - self.began, 1e-9)
            left = max(0.0, spent / self.done * (self.total - self.done) - (now - self.last))
            rate = f"{self.tokens / spent:.0f} tokens/s" if self.tokens else f"{self.done / spent:.1f}/s"
            log.info("%s: %d of %d, %s, %.0f s left", self.what, self.done, self.total, rate, left)
        self.done, self.tokens, self.last = self.done + done, self.tokens + tokens, now
