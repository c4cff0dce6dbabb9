"""What a training tells of itself: lines of metrics, and the sums that they are made of."""

import json
import math
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import append_line, settle, write_jsonl
from rwkvpipe.base.tuning import WatchConfig
from rwkvpipe.train.checkpoint import Stem
from rwkvpipe.train.dist import ALONE, Rank

MEASURED = ("seconds", "tokens_per_second", "memory_mb")  # what no two runs have alike
MEMORY = 0.05  # weight of a step in the mean that spikes are told by


class Log:
    """Rows with a `step`, one JSON line each, that survive a kill: what lies past a resume point is cut off.

    Of processes that train together the first one writes; to the others it is a file to read.
    """

    def __init__(self, path: Path, rank: Rank = ALONE):
        self.path, self.writes = path, rank.index == 0
        self.best_step = 0
        """The step of the lowest held-out loss, when training has come to its end."""
        self.stem: Stem | None = None
        """What a longer run would have in common with this one."""

    def add(self, row: dict) -> None:
        """Append a row; `cut` has begun the file. Raises DataError if it vanished since."""
        if self.writes:
            append_line(self.path, row)

    def settle(self) -> None:
        """Have it on disk, so that no resume point outlives the rows before it. Raises DataError if it vanished."""
        settle(self.path)

    def rows(self) -> list[dict]:
        """All rows; a last line that a kill has torn is none. Raises DataError for a line that is broken otherwise."""
        if not self.path.exists():
            return []
        whole, rows = self.path.read_bytes().rpartition(b"\n")[0], []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                rows.append(row | {"step": int(row["step"])})
            except (ValueError, TypeError, KeyError):
                raise DataError(f"{self.path}:{number}: damaged, no row of metrics; remove the line") from None
        return rows

    def cut(self, step: int) -> None:
        """Begin, or go on with the rows up to and with `step`."""
        if self.writes:
            write_jsonl(self.path, [row for row in self.rows() if row["step"] <= step])


def memory() -> float:
    """Most megabytes that this process has held: of the GPU it computes on, or of the machine."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def _none() -> dict[str, float]:
    return {"steps": 0, "tokens": 0, "targets": 0, "seconds": 0.0, "skipped": 0}


def _some(means: dict[str, float], name: str) -> dict[str, float]:
    """What is told under a name, taken out of the means; nothing where there is none."""
    return {name: means.pop(name)} if name in means else {}


@dataclass
class Progress:
    """What has been done: the step, the held-out losses, and sums since the last line of metrics."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    lined: int = 0
    """The step of the last line."""
    norm: float | None = None
    """Running mean of the gradient's norm, which tells a spike."""
    best: float | None = None
    """The lowest held-out loss."""
    best_step: int = 0
    worse: int = 0
    """Measurements since then."""
    sums: dict[str, float] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    """How many steps told each of them: not every step has every number."""
    since: dict[str, float] = field(default_factory=_none)

    def wrong(self, loss: float, norm: float, watch: WatchConfig) -> str:
        """What is wrong with a step before it is made; nothing, mostly.

        A spike moves the mean as far as a norm that just is none: what stays so large is soon a spike no longer.
        """
        for name, value in (("loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        if watch.spike is not None and (mean := self.norm) and norm > watch.spike * mean:
            self.norm = mean + MEMORY * (watch.spike * mean - mean)
            return f"the norm of the gradient is {norm:.4g}, over {watch.spike:g} times its mean of {mean:.4g}"
        return ""

    def add(self, values: dict[str, float], counted: dict[str, float], seconds: float) -> None:
        """Count one more step: what it measured (nothing, if it was skipped), its `tokens` and `targets`."""
        self.step += 1
        self.tokens += int(counted["tokens"])
        self.seconds += seconds
        if values and (norm := values["grad_norm"]):  # a step that teaches nothing says nothing of what is usual
            self.norm = norm if self.norm is None else self.norm + MEMORY * (norm - self.norm)
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.times[name] = self.times.get(name, 0) + 1
        more = counted | {"steps": int(bool(values)), "skipped": int(not values), "seconds": seconds}
        self.since = {name: self.since[name] + more[name] for name in self.since}

    def row(self, rate: float) -> dict:
        """A line of metrics: means since the last one, which are then forgotten.

        Where every step since then was skipped, there is no loss and no norm of the gradient.
        """
        since = self.since
        means = {name: value / self.times[name] for name, value in self.sums.items()}
        speed = since["tokens"] / max(since["seconds"], 1e-9)
        head = (
            {"step": self.step, "tokens": self.tokens} | _some(means, "loss") | {"lr": rate} | _some(means, "grad_norm")
        )
        head |= {"tokens_per_second": round(speed, 1)}
        head |= {"seconds": round(self.seconds, 3), "target_fraction": since["targets"] / max(since["tokens"], 1)}
        head |= {"memory_mb": round(memory(), 1)} | ({"skipped": since["skipped"]} if since["skipped"] else {})
        self.sums, self.times, self.since, self.lined = {}, {}, _none(), self.step
        return head | means

    def judge(self, loss: float) -> bool:
        """Note a held-out loss; returns whether it is the lowest so far."""
        if self.best is not None and not loss < self.best:
            self.worse += 1
            return False
        self.best, self.best_step, self.worse = loss, self.step, 0
        return True
