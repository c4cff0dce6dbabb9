"""Metrics of a stage as columns: read from metrics.jsonl, checked line by line, given on as CSV."""

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import read_jsonl

NEEDED = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds")
TAUGHT = ("loss", "grad_norm")  # what a line lacks whose steps were all skipped


class Metrics:
    """Rows of metrics.jsonl, by column."""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.names = [*NEEDED, *dict.fromkeys(name for row in rows for name in row if name not in NEEDED)]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, both (rows that have this column,) float64; empty where none has it."""
        rows = [row for row in self.rows if name in row]
        steps, values = [row["step"] for row in rows], [row[name] for row in rows]
        return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)

    def last(self, name: str) -> float | None:
        """The newest value of a column, None where no row has it."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)

    def csv(self) -> str:
        """All columns with a head line; a cell is empty where its row has no such number."""
        return table(self.names, self.rows)


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average (N,) over about a twentieth of the points, centred; at the end it looks back only."""
    count = len(values)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    # the first values fall steeply: there the window is narrow
    reach = np.minimum(np.arange(count), max(2, count // 40))
    first, last = np.arange(count) - reach, np.minimum(np.arange(count) + reach + 1, count)
    return (sums[last] - sums[first]) / (last - first)


def table(names: list[str], rows: Iterable[dict]) -> str:
    """Rows as CSV text under a head line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def line_numbers(path: str | Path) -> list[int]:
    """Numbers of the lines that hold something, as `read_jsonl` counts rows."""
    with open(path, "rb") as file:
        return [number for number, line in enumerate(file, 1) if line.strip()]


def read_metrics(path: str | Path) -> Metrics:
    """Read metrics.jsonl. Raises DataError naming file and line: no JSON, no number, or steps that do not rise."""
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file; give the metrics.jsonl that a training stage wrote")
    rows: list[dict] = []
    for number, row in zip(line_numbers(path), read_jsonl(path), strict=True):
        needed = [name for name in NEEDED if not (row.get("skipped") and name in TAUGHT)]
        missing = next((name for name in needed if name not in row), None)
        if missing:
            raise DataError(f"{path}:{number}: {missing} is missing; this is no line of training metrics")
        for name, value in row.items():
            if not _number(value):
                raise DataError(f"{path}:{number}: {name} is {value!r:.40}, a finite number is needed")
        if rows and row["step"] <= rows[-1]["step"]:
            raise DataError(f"{path}:{number}: step {row['step']} comes after step {rows[-1]['step']}; steps must rise")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}:1: the file is empty; train the stage again")
    if not any("loss" in row for row in rows):
        raise DataError(f"{path}:1: every step was skipped; lower train.lr, and train the stage again")
    return Metrics(rows)
