"""What completions are worth: grades of tasks, and functions in a Python file of the user's, weighted and added.

A function is called as TRL calls one, by names: `prompts` and `completions` (texts), `completion_ids`, and a list for
each column of the questions; it returns a number for each completion, or None where it has nothing to say. It may be
`async`, and ask for many grades at once; several such functions wait at the same time.
"""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Sequence

import torch
from torch import Tensor

from rwkvpipe.base.config import RolloutConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.infer.engine import Completion
from rwkvpipe.train.own import columns, function, taken, theirs

Grade = Callable[[dict, str], float | None]
KEY = "rollout.reward"
MOST = 1e30  # squares of sums of such are numbers still


async def _awaited(given: dict[str, Awaitable]) -> dict[str, object]:
    """What functions return that are waited for, all at the same time."""

    async def one(name: str) -> object:
        with theirs(KEY, name):
            return await given[name]

    return dict(zip(given, await asyncio.gather(*map(one, given)), strict=True))


def _checked(name: str, given: object, count: int) -> list[float]:
    """What a function of the user's returned, as numbers, NaN for None. Raises DataError for anything else."""
    given = given.tolist() if hasattr(given, "tolist") else given  # a tensor, an array
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != count:
        shown = f"{len(given)}" if isinstance(given, Sequence) else type(given).__name__
        raise DataError(f"rollout.reward: {name} returns {shown} for {count} completions; a list of as many is needed")
    found = []
    for number, value in enumerate(given):
        try:
            if isinstance(value, str):
                raise TypeError
            found.append(math.nan if value is None else float(value))
        except (TypeError, ValueError):
            raise DataError(
                f"rollout.reward: {name} returns {value!r:.40} at {number}, no number and no None"
            ) from None
        except OverflowError:
            found.append(math.inf)
        if value is not None and math.isnan(found[-1]):
            raise DataError(f"rollout.reward: {name} returns nan at {number}; None is for what it has no reward for")
        if abs(found[-1]) > MOST:
            raise DataError(f"rollout.reward: {name} returns {value!s:.40} at {number}; a reward is at most {MOST:g}")
    return found


def spreads(name: str, grades: Tensor) -> dict[str, float]:
    """Mean, deviation, least and largest of the grades (N,) that are not NaN; nothing where all are."""
    known = grades[~grades.isnan()].double()
    if not len(known):
        return {}
    found = {"mean": known.mean(), "std": known.std(correction=int(len(known) > 1))}
    found |= {"min": known.min(), "max": known.max()}
    return {f"{name}/{kind}": float(value) for kind, value in found.items()}


class Rewards:
    """All rewards of a stage: their names, weights and grades."""

    def __init__(self, config: RolloutConfig, grade: Callable[[str], Grade]):
        self.weights = config.rewards
        self.own = {name: function(KEY, name) for name in self.weights if ":" in name}
        self.tasks = {name: grade(name) for name in self.weights if ":" not in name}

    def __call__(self, rows: list[dict], prompts: list[str], found: list[Completion]) -> list[list[float]]:
        """Grades (completions, rewards); `rows` and `prompts` are those of the completions, one by one."""
        given: dict[str, object] = {}
        for name, own in self.own.items():
            every = columns(rows) | {"prompts": list(prompts), "completions": [c.text for c in found]}
            every |= {"completion_ids": [list(c.ids) for c in found]}
            asked = taken(KEY, name, own, every)
            with theirs(KEY, name):
                given[name] = own(**asked)
        waiting = {name: value for name, value in given.items() if inspect.isawaitable(value)}
        given |= asyncio.run(_awaited(waiting)) if waiting else {}
        for name, grade in self.tasks.items():
            grades = [grade(row, c.text) for row, c in zip(rows, found, strict=True)]
            given[name] = [math.nan if each is None else each for each in grades]
        grades_of = [_checked(name, given[name], len(found)) for name in self.weights]
        return [list(row) for row in zip(*grades_of, strict=True)]

    def total(self, grades: Tensor) -> Tensor:
        """The weighted sum (N,) of the rewards (N, F) that apply; a completion to which none does stays NaN.

        Raises DataError for one that is too large to be compared.
        """
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        found = (grades * weights).nansum(1).masked_fill(grades.isnan().all(1), torch.nan)
        if (found.abs() > MOST).any():
            raise DataError(f"{KEY}: a weighted sum is over {MOST:g}; lower the weights")
        return found

    def facts(self, grades: Tensor) -> dict[str, float]:
        """What there is to say of each reward over the completions it applies to; nothing of one that has none."""
        found = zip(self.weights, grades.T, strict=True)
        return {key: value for name, some in found for key, value in spreads(f"rewards/{name}", some).items()}
