"""Which task is which. A task is a class with the parts of `Task`, and a line in `TASKS`."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

from rwkvpipe.base.config import BenchmarkConfig
from rwkvpipe.base.errors import ConfigError
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
        """`score`, `low` and `high` (95 % interval), and what else is worth a look."""


TASKS: dict[str, type[Task]] = {"answer": Answer, "choice": Choice, "bits": Bits}


def reward(name: str) -> Callable[[dict, str], float | None]:
    """Grade (row of the question, text written) of a task as a reward. Raises ConfigError if the name has none."""
    grades = {"answer": Answer}
    if name not in grades:
        raise ConfigError(f"rollout.reward: {name} grades no written text; known: {', '.join(grades)}")
    return grades[name]().grade
