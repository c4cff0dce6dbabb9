"""Multiple choice: the option that the model finds likeliest after the prompt."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from rwkvpipe.base.config import BenchmarkConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.tasks.metrics import finite, mean_with_interval

PROMPT = BenchmarkConfig.model_fields["prompt"].default
BLOCK = 128  # questions weighed before their answers are handed out


def best(values: Sequence[float]) -> int:
    """Place of the largest value, the first of equals."""
    return max(range(len(values)), key=lambda n: (values[n], -n))


class Choice:
    """Ask by `prompt`, which holds {question}; the row of a question has `question`, `options` and the right one.

    Which is right says `label` (its place from 0, or a letter from A), or else `answer` (its text). The options come
    after the prompt, a space before each. The largest sum of log-probabilities decides; what a mean over tokens,
    characters (`acc_norm` of lm-evaluation-harness) or bytes would decide is reported beside it.
    """

    better = "higher"

    def __init__(self, prompt: str = PROMPT):
        self.template = prompt

    def prompt(self, question: dict) -> str:
        """What the model reads."""
        return self.template.replace("{question}", question["question"])

    def options(self, question: dict) -> list[str]:
        """What may follow. Raises DataError unless there are two texts at least."""
        options = question.get("options")
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
            raise DataError("`options` must be a list of two texts or more")
        return [f" {option}" for option in options]

    def gold(self, question: dict) -> int:
        """Place of the right option. Raises DataError where none is named, or one that is not there."""
        options, label = question["options"], question.get("label")
        if isinstance(label, str) and len(label) == 1 and label.isascii() and label.isupper():
            label = ord(label) - ord("A")
        if label is None:
            answer = str(question.get("answer"))
            if options.count(answer) != 1:
                raise DataError(f"`answer` {answer!r} is not one of the options; name the right one by `label`")
            return options.index(answer)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(options):
            raise DataError(f"`label` {label!r} names no option; places run from 0 to {len(options) - 1}")
        return label

    def check(self, question: dict) -> None:
        """Raise DataError, naming the column, for a row that cannot be asked and graded."""
        if not isinstance(question.get("question"), str):
            raise DataError("no text under `question`")
        self.options(question)
        self.gold(question)

    def grade(self, question: dict, logprobs: Sequence[float]) -> float:
        """1 if the right option has the largest of `logprobs` (one an option), else 0; equal texts are one option."""
        return float(question["options"][best(logprobs)] == question["options"][self.gold(question)])

    def ask(
        self, engine: Any, questions: Sequence[dict], spec: BenchmarkConfig, done: Collection[int] = ()
    ) -> Iterator[tuple[int, dict]]:
        """Let the engine weigh the options of all questions but those done: (number, what is to be kept).

        Blocks of questions are cut without regard to `done`: what is computed beside a question moves its
        last digits, and going on must give what going through gives.
        """
        order = sorted(range(len(questions)), key=lambda n: len(self.prompt(questions[n])))
        for block in (order[first : first + BLOCK] for first in range(0, len(order), BLOCK)):
            if all(n in done for n in block):
                continue
            pairs = [(self.prompt(questions[n]), option) for n in block for option in self.options(questions[n])]
            found = iter(zip(pairs, engine.loglikelihood(pairs), strict=True))
            for n in block:
                rows = [next(found) for _ in questions[n]["options"]]
                if not all(math.isfinite(value) for _, value in rows):
                    raise DataError(f"question {n + 1}: the model's probabilities are no numbers; damaged weights?")
                tokens = [len(engine.tokenizer.encode(option)) for (_, option), _ in rows]
                if n not in done:
                    yield n, {"logprobs": [round(value, 4) for _, value in rows], "tokens": tokens}

    def mark(self, question: dict, answer: dict) -> dict:
        """An answer beside its question, graded. Raises DataError for what is no answer, or one to other options."""
        options, sums, tokens = question["options"], answer.get("logprobs"), answer.get("tokens")
        if not (isinstance(sums, list) and isinstance(tokens, list) and finite([*sums, *tokens])):
            raise DataError("no `logprobs` and `tokens`; no answer to a question of task choice: run bench again")
        if not len(options) == len(sums) == len(tokens):
            raise DataError(f"{len(sums)} options were weighed, the question has {len(options)}; run bench again")
        gold, chosen = self.gold(question), best(sums)
        by_token = [value / max(n, 1) for value, n in zip(sums, tokens, strict=True)]
        by_character = [value / len(option) for value, option in zip(sums, options, strict=True)]
        by_byte = [value / len(option.encode()) for value, option in zip(sums, options, strict=True)]
        return {
            "question": question["question"],
            "options": options,
            "gold": options[gold],
            "answer": options[chosen],
            "logprobs": sums,
            "correct": self.grade(question, sums),
            "correct_by_token": self.grade(question, by_token),
            "correct_by_character": self.grade(question, by_character),
            "correct_by_byte": self.grade(question, by_byte),
        }

    def summary(self, marked: Sequence[dict]) -> dict:
        """Share of right choices with its interval; what choosing at random and other ways to choose would give."""
        score, low, high = mean_with_interval([row["correct"] for row in marked])
        ways = ("by_token", "by_character", "by_byte")
        mean = {name: sum(row[f"correct_{name}"] for row in marked) / len(marked) for name in ways}
        chance = sum(1 / len(row["options"]) for row in marked) / len(marked)
        return {"score": score, "low": low, "high": high, "chance": chance, **mean}
