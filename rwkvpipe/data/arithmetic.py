"""Made corpora of arithmetic: sums of numbers to 99, worked out step by step as one does in the head.

Each step adds, subtracts or multiplies by the tens or by the ones, so that a step carries once at most. That way is
learned in a third of the training that bare results take, and with every seed.

One question in five is kept for the exam. Which one is a function of the question alone, whatever its wording and the
order of its operands where order does not matter; so no seed and no corpus ever teaches what is examined. No step is
a question of the exam either: in every step one number is below ten or full tens, in the exam none is.

The texts are right, and in signs. The talks tell what the words for signs mean, but are those of people in a hurry,
who forget every other carry: who only imitates them, errs as they do, and who practises with somebody to tell right
from wrong can do better.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from rwkvpipe.base.errors import ConfigError
from rwkvpipe.data.document import Document

TOP = 99
LEAST_FACTOR = 11
EXAMINED = 0.2  # share of the questions that are kept for the exam
CLOSEST = 12  # how far apart close pairs may be
CLOSE = 0.4  # share of the subtractions whose numbers are drawn close together: few digits are learned late
SLIPS = 0.5  # share of the talks about sums with a carry in which it is forgotten

WORDINGS = {
    "+": ("What is {a} plus {b}?", "What is the sum of {a} and {b}?", "What do {a} and {b} make?"),
    "-": ("What is {a} minus {b}?", "What is left of {a} without {b}?", "How much more is {a} than {b}?"),
    "*": ("What is {a} times {b}?", "What is the product of {a} and {b}?", "How much is {a} by {b}?"),
}


@dataclass(frozen=True)
class Sum:
    """a op b; a - b is never below 0."""

    op: str
    a: int
    b: int

    @property
    def result(self) -> int:
        """What it comes to."""
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.op]

    @property
    def key(self) -> tuple[str, int, int]:
        """Equal for all sums that are one question: a+b and b+a, a*b and b*a."""
        return (self.op, self.a, self.b) if self.op == "-" else (self.op, *sorted((self.a, self.b)))

    @property
    def examined(self) -> bool:
        """Whether it is kept for the exam."""
        if any(x < 10 or x % 10 == 0 for x in (self.a, self.b)):
            return False
        digest = hashlib.sha256("{} {} {}".format(*self.key).encode()).digest()
        return int.from_bytes(digest[:4], "big") < EXAMINED * 2**32

    def last(self) -> "Sum":
        """The step that ends the work: the ones of what was added or taken away."""
        if self.op != "*":
            near = Sum(self.op, self.a, self.b // 10 * 10).result
            return Sum(self.op, near, self.b % 10)
        low, high = self.a * (self.b % 10), self.a * (self.b // 10)
        return Sum("+", high + low // 100 * 10, low // 10 % 10)

    def worked(self, slip: int = 0) -> str:
        """The way to the result and the result; the last step comes out wrong by `slip`."""
        end = self.last()
        found = end.result + slip
        if self.op != "*":
            return f"{self.a}{self.op}{self.b // 10 * 10}={end.a} {end.a}{self.op}{end.b}={found}"
        ones, tens = self.b % 10, self.b // 10
        low, high = self.a * ones, self.a * tens
        return (
            f"{_by_digit(self.a, ones)} {_by_digit(self.a, tens)} {high}+{low // 100 * 10}={end.a}"
            f" {end.a}+{end.b}={found}: {10 * found + low % 10}"
        )

    def forgotten(self) -> int:
        """What the last step is wrong by if its carry is forgotten; 0 where there is none."""
        end = self.last()
        if end.op == "+":
            return -10 if end.a % 10 + end.b > 9 else 0
        return 10 if end.a % 10 < end.b else 0


def _by_digit(a: int, digit: int) -> str:
    """The product of a number to 99 and a digit, by its tens and its ones."""
    return f"{a}*{digit}={a // 10 * 10 * digit}+{a % 10 * digit}={a * digit}"


def drawn(stream: random.Random, close: float = 0.0) -> Sum:
    """Any sum, each operation as often as the others; `close` is the share of close pairs among subtractions."""
    op = stream.choice("+-*")
    a, b = (stream.randint(LEAST_FACTOR if op == "*" else 0, TOP) for _ in "ab")
    if op != "-":
        return Sum(op, a, b)
    if close and stream.random() < close:
        b = max(0, a - stream.randint(0, CLOSEST))
    return Sum(op, max(a, b), min(a, b))


def drawn_for_lessons(stream: random.Random) -> Sum:
    """A sum to read: what is learned last comes most often, and what has long texts least."""
    op = stream.choice("+++----**")
    while (found := drawn(stream)).op != op:
        pass
    if op == "-" and stream.random() < CLOSE:
        return Sum(op, found.a, max(0, found.a - stream.randint(0, CLOSEST)))
    return found


@cache
def exam() -> tuple[Sum, ...]:
    """All questions of the exam, one of each key."""
    numbers = range(TOP + 1)
    sums = [Sum(op, a, b) for op in "+*" for a in numbers for b in numbers if a <= b]
    sums += [Sum("-", a, b) for a in numbers for b in numbers if a >= b]
    return tuple(s for s in sums if s.examined)


def _taught(seed: int, count: int, name: str) -> Iterator[tuple[Sum, random.Random, str]]:
    """Sums that may be trained on, with the stream of chance they came from and where they stand."""
    stream = random.Random(f"{name} {seed}")
    number = 0
    while number < count:
        found = drawn_for_lessons(stream) if name == "documents" else drawn(stream, CLOSE)
        if not found.examined:
            number += 1
            yield found, stream, f"arithmetic.{name}:{number}"


def _question(of: Sum, stream: random.Random) -> str:
    """It in one of its wordings."""
    return stream.choice(WORDINGS[of.op]).format(a=of.a, b=of.b)


def _wrong(right: Sum) -> list[str]:
    """Three ways that do not answer it: its own with the last step a carry off, and the other signs' right ones."""
    a, b = max(right.a, right.b), min(right.a, right.b)
    slip = right.forgotten() or (10 if right.op == "-" else -10)
    return [right.worked(slip), *(Sum(op, a, b).worked() for op in "+-*" if op != right.op)]


def documents(seed: int, count: int) -> Iterator[Document]:
    """Sums in signs, worked out."""
    for of, _, origin in _taught(seed, count, "documents"):
        yield Document(text=f"{of.a}{of.op}{of.b}: {of.worked()}", origin=origin)


def chats(seed: int, count: int) -> Iterator[Document]:
    """Talks: a question in words, and an answer that shows the way and may have forgotten the last carry."""
    for of, stream, origin in _taught(seed, count, "chats"):
        question = _question(of, stream)
        answer = of.worked(of.forgotten() if stream.random() < SLIPS else 0)
        talk = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        yield Document(messages=talk, origin=origin)


def questions(seed: int, count: int) -> Iterator[Document]:
    """Questions and the numbers they come to."""
    for of, stream, origin in _taught(seed, count, "questions"):
        yield Document(question=_question(of, stream), answer=str(of.result), origin=origin)


def exams(seed: int, count: int) -> Iterator[Document]:
    """Such questions that no other corpus of arithmetic holds, none of them twice, each with four ways to choose from.

    Raises ConfigError when more are wanted than there are.
    """
    stream, kept = random.Random(f"exam {seed}"), exam()
    if count > len(kept):
        raise ConfigError(f"limit: arithmetic.exam has {len(kept)} questions and no more, {count} are wanted")
    for number, of in enumerate(stream.sample(kept, count), 1):
        turned = of.op != "-" and stream.random() < 0.5
        asked = Sum(of.op, of.b, of.a) if turned else of
        right = asked.worked()
        options = sorted([right, *_wrong(asked)], key=lambda _: stream.random())
        yield Document(
            question=_question(asked, stream),
            answer=str(asked.result),
            options=tuple(options),
            label=options.index(right),
            origin=f"arithmetic.exam:{number}",
        )


ARITHMETIC = {
    "arithmetic.documents": documents,
    "arithmetic.chats": chats,
    "arithmetic.questions": questions,
    "arithmetic.exam": exams,
}
