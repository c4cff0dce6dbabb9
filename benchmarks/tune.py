"""One step of training beside rwkvtune, the public tuner, as `train` measures it beside rwkv-trainer."""

from pathlib import Path

from benchmarks import train

table = train.table


def measure(python: Path, folder: Path, rounds: int, case: train.Case) -> dict:
    """CPU seconds of a step of both, in turns; `python` is that of an environment that has rwkvtune."""
    return train.measure(python, folder, rounds, case, "rwkvtune")
