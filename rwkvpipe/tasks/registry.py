"""Which task is which. A task is a class with the parts of `Task`, and a line in `TASKS`."""

import difflib
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from rwkvpipe.base.config import BenchmarkConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import canonical, read_jsonl
from rwkvpipe.tasks.answer import Answer
from rwkvpipe.tasks.bits import Bits
from rwkvpipe.tasks.choice import Choice


class Task(Protocol):
    """A way to measure a model: `ask` needs an engine, all else only what it left behind."""

    better: str
    """Whether a `higher` or a `lower` score is better."""

    def __init__(self, prompt: str): ...

    def prompt(self, question: dict) -> str:
        """What the model reads."""

    def check(self, question: dict) -> None:
        """Raise DataError, naming the column, for a row that cannot be asked and graded."""

    def ask(
        self, engine: Any, questions: Sequence[dict], spec: BenchmarkConfig, done: Collection[int] = ()
    ) -> Iterator[tuple[int, dict]]:
        """(number of the question, what is to be kept of the answer) for all but those done, in any order."""

    def mark(self, question: dict, answer: dict) -> dict:
        """A row for people: question, answer, grade."""

    def summary(self, marked: Sequence[dict]) -> dict:
        """`score`, `low` and `high` (95 % interval), and what else is worth a look.

        `n` is in it where the interval does not come from single questions.
        """


TASKS: dict[str, type[Task]] = {"answer": Answer, "choice": Choice, "bits": Bits}
REWARDS = {"answer": Answer}  # those that grade written text


def read_questions(path: str | Path, spec: BenchmarkConfig) -> tuple[Task, list[dict]]:
    """The task of a benchmark and its questions, each checked. Raises DataError naming file and line."""
    task = TASKS[spec.task](spec.prompt)
    found = list(islice(read_jsonl(path), spec.limit))
    for number, question in enumerate(found, 1):
        try:
            task.check(question)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
    if not found:
        raise DataError(f"{path}: no questions in it")
    return task, found


def asked(task: Task, question: dict) -> str:
    """A short mark of what the model reads: answers keep it, so that they are not graded by another question."""
    read = [task.prompt(question), question.get("options")]
    return hashlib.sha256(canonical(read).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def grader(name: str) -> type[Answer]:
    """The task whose grade is the reward of this name. Raises ConfigError if the name has none."""
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(REWARDS)}"
        raise ConfigError(f"rollout.reward: {name} grades no written text; {hint}")
    return REWARDS[name]


def reward(name: str) -> Callable[[dict, str], float | None]:
    """Grade (row of the question, text written) of a task as a reward. Raises ConfigError if the name has none."""
    return grader(name)().grade
