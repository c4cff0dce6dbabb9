"""Programs that show a training as it goes: each is told the lines of metrics, and none decides a result.

TensorBoard's files lie in the stage's folder. Weights & Biases and SwanLab go where their own settings say (`wandb
login`, WANDB_MODE=offline; `swanlab login`, SWANLAB_MODE=offline or local), and keep what they need to know there.
"""

import argparse
import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from rwkvpipe.base.config import Tracker
from rwkvpipe.base.errors import ConfigError

log = logging.getLogger("rwkvpipe")

PROJECT = "rwkvpipe"


def add_trackers(parser: argparse.ArgumentParser) -> None:
    """The option that names trackers; it may be given several times."""
    parser.add_argument(
        "--track", action="append", default=[], choices=get_args(Tracker), help="a program that is told the metrics"
    )


def _module(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"track: {package} is not installed here; pip install {package}") from None


class _TensorBoard:
    """Event files beside the results; what a later resume point undid is not shown."""

    def __init__(self, folder: Path, name: str, mark: str, config: dict):
        self.writer: Any = None
        make = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.make: Callable[[int], Any] = lambda step: make(str(folder / "tensorboard"), purge_step=step)

    def add(self, row: dict) -> None:
        if self.writer is None:
            self.writer = self.make(row["step"])
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class _Service:
    """A service with the calls init, log and finish; a resumed stage goes on in the same run."""

    def __init__(self, package: str, place: str, errors: Callable[[ModuleType], tuple], given: tuple):
        folder, name, mark, config = given
        self.module = _module(package, package)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.module.init(
                project=PROJECT,
                name=name,
                id=mark[:16],
                resume="allow",
                config=config,
                **{place: str(folder / package)},
            )
        except errors(self.module) as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"track: {package}: {why[0]}; log in, or set {package.upper()}_MODE=offline") from None

    def add(self, row: dict) -> None:
        values = {name: value for name, value in row.items() if name != "step"}
        self.module.log(values, step=row["step"])

    def close(self) -> None:
        self.module.finish()


def _wandb(*given) -> _Service:
    return _Service("wandb", "dir", lambda module: (module.errors.Error,), given)


def _swanlab(*given) -> _Service:
    return _Service("swanlab", "log_dir", lambda module: (RuntimeError, ValueError, OSError), given)


KINDS = {"tensorboard": _TensorBoard, "wandb": _wandb, "swanlab": _swanlab}


class Trackers:
    """Those that are told the metrics of one stage. Raises ConfigError where one is not installed or not logged in."""

    def __init__(self, names: Sequence[str] = (), *, folder: Path = Path(), mark: str = "", config: dict | None = None):
        name = "/".join(folder.absolute().parts[-2:])  # run/stage
        self.open = [KINDS[kind](folder, name, mark, config or {}) for kind in dict.fromkeys(names)]
        if self.open:
            log.info("metrics go to %s, too", " and ".join(dict.fromkeys(names)))

    def add(self, row: dict) -> None:
        """Tell a line of metrics."""
        for tracker in self.open:
            tracker.add(row)

    def close(self) -> None:
        """What was told is kept."""
        for tracker in self.open:
            tracker.close()
