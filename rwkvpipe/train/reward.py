"""What completions are worth: grades of tasks, and functions in a Python file of the user's, weighted and added.

A function is called as TRL calls one, by names: `prompts` and `completions` (texts), `completion_ids`, and a list for
each column of the questions; it returns a number for each completion, or None where it has nothing to say.
"""

import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rwkvpipe.base.config import RolloutConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.infer.engine import Completion

Grade = Callable[[dict, str], float | None]


@contextmanager
def _theirs(name: str) -> Iterator[None]:
    """Code of the user's runs: whatever it raises becomes a DataError that names its place."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a stranger's code may raise anything
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        frames = [frame for frame in frames if not frame.filename.startswith("<frozen ")]
        where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        if isinstance(error, SyntaxError) and error.filename:
            where = f" at {error.filename}:{error.lineno}"
        said = " ".join(str(error).split()) or "without a word"
        raise DataError(f"rollout.reward: {name} raises {type(error).__name__}{where}: {said}; mend it") from None


def _function(name: str) -> Callable:
    """The function of a reward `file.py:function`. Raises ConfigError or DataError where there is none."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"rollout.reward: there is no file {path}; paths count from the folder of the call")
    found = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(found)
    with _theirs(name):
        found.loader.exec_module(module)
    own = getattr(module, function, None)
    if not callable(own):
        raise ConfigError(f"rollout.reward: {path} has no function {function}; name one that it has")
    return own


def _checked(name: str, given: object, count: int) -> list[float]:
    """What a function of the user's returned, as numbers, NaN for None. Raises DataError for anything else."""
    given = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != count:
        shown = f"{len(given)}" if isinstance(given, Sequence) else type(given).__name__
        raise DataError(f"rollout.reward: {name} returns {shown} for {count} completions; a list of as many is needed")
    found = []
    for number, value in enumerate(given):
        try:
            found.append(math.nan if value is None else float(value))
        except (TypeError, ValueError):
            raise DataError(
                f"rollout.reward: {name} returns {value!r:.40} at {number}, no number and no None"
            ) from None
        if math.isinf(found[-1]):
            raise DataError(f"rollout.reward: {name} returns {value} at {number}; an advantage of it is no number")
    return found


class Rewards:
    """All rewards of a stage: their names, weights and grades."""

    def __init__(self, config: RolloutConfig, grade: Callable[[str], Grade]):
        self.weights = config.rewards
        self.own = {name: _function(name) for name in self.weights if ":" in name}
        self.tasks = {name: grade(name) for name in self.weights if ":" not in name}

    def __call__(self, rows: list[dict], prompts: list[str], found: list[Completion]) -> list[list[float]]:
        """Grades (completions, rewards); `rows` and `prompts` are those of the completions, one by one."""
        columns = []
        for name in self.weights:
            if name in self.tasks:
                grades = [self.tasks[name](row, c.text) for row, c in zip(rows, found, strict=True)]
                columns.append([math.nan if grade is None else grade for grade in grades])
                continue
            with _theirs(name):
                given = self.own[name](**self._given(name, rows, prompts, found))
            columns.append(_checked(name, given, len(found)))
        return [list(row) for row in zip(*columns, strict=True)]

    def _given(self, name: str, rows: list[dict], prompts: list[str], found: list[Completion]) -> dict:
        """The arguments that a function takes, of those there are."""
        every = {
            column: [row.get(column) for row in rows] for column in dict.fromkeys(key for row in rows for key in row)
        }
        every |= {"prompts": list(prompts), "completions": [c.text for c in found]}
        every |= {"completion_ids": [list(c.ids) for c in found]}
        taken = inspect.signature(self.own[name]).parameters.values()
        if any(each.kind is each.VAR_KEYWORD for each in taken):
            return every
        return {each.name: every[each.name] for each in taken if each.name in every}

    def total(self, grades: Tensor) -> Tensor:
        """The weighted sum (N,) of the rewards (N, F) that apply; a completion to which none does stays NaN."""
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        return (grades * weights).nansum(1).masked_fill(grades.isnan().all(1), torch.nan)

    def facts(self, grades: Tensor) -> dict[str, float]:
        """Mean and deviation of each reward over the completions it applies to; 0 for one that applies to none."""
        found = {}
        for name, column in zip(self.weights, grades.T, strict=True):
            known = column[~column.isnan()]
            found[f"rewards/{name}/mean"] = float(known.mean()) if len(known) else 0.0
            found[f"rewards/{name}/std"] = float(known.std()) if len(known) > 1 else 0.0
        return found
