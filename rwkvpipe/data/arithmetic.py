"""Made corpora of arithmetic: additions and subtractions of numbers to 99, multiplications worked out step by step.

About one question in seven is kept for the exam. Which one is a function of the question alone, whatever its wording
and the order of its operands where order does not matter; so no seed and no corpus ever teaches what is examined, not
even as a step of something longer.
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
LEAST_EXAMINED = 10  # smaller operands occur as steps of larger questions
EXAMINED = 0.15  # share of the questions that are kept for the exam
SYMBOLIC = 0.7  # share of the texts that use signs; the others use words

TEXTS = {
    "+": ("{a}+{b}={c}", "{a} plus {b} is {c}", "the sum of {a} and {b} is {c}"),
    "-": ("{a}-{b}={c}", "{a} minus {b} is {c}", "{b} taken from {a} leaves {c}"),
    "*": ("{a}*{b}: {c}", "{a} times {b}: {c}", "the product of {a} and {b}: {c}"),
}
WORDINGS = {
    "+": ("What is {a}+{b}?", "What is {a} plus {b}?", "What is the sum of {a} and {b}?", "Add {b} to {a}."),
    "-": ("What is {a}-{b}?", "What is {a} minus {b}?", "What is left of {a} without {b}?", "Take {b} from {a}."),
    "*": ("What is {a}*{b}?", "What is {a} times {b}?", "What is the product of {a} and {b}?", "Multiply {a} by {b}."),
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
        if min(self.a, self.b) < LEAST_EXAMINED:
            return False
        digest = hashlib.sha256("{} {} {}".format(*self.key).encode()).digest()
        return int.from_bytes(digest[:4], "big") < EXAMINED * 2**32

    def steps(self) -> tuple["Sum", ...]:
        """The smaller sums that a multiplication is made of: by the ones, by the tens, and what these come to."""
        if self.op != "*":
            return ()
        tens, ones = divmod(self.b, 10)
        low, high = Sum("*", self.a, ones), Sum("*", self.a, tens)
        return low, high, Sum("+", high.result, low.result // 10)

    def teaches(self) -> bool:
        """Whether it may be trained on: neither it nor a step of it is examined."""
        return not any(part.examined for part in (self, *self.steps()))

    def worked(self) -> str:
        """The result; for a multiplication with the way to it."""
        steps = " ".join(f"{step.a}{step.op}{step.b}={step.result}" for step in self.steps())
        return f"{steps}: {self.result}" if steps else str(self.result)


def drawn(stream: random.Random) -> Sum:
    """Any sum; subtractions twice as often as others, for they are learned last."""
    op = stream.choice("+--*")
    a, b = (stream.randint(LEAST_FACTOR if op == "*" else 0, TOP) for _ in "ab")
    return Sum(op, max(a, b), min(a, b)) if op == "-" else Sum(op, a, b)


@cache
def exam() -> tuple[Sum, ...]:
    """All questions of the exam, one of each key."""
    numbers = range(LEAST_EXAMINED, TOP + 1)
    sums = [Sum(op, a, b) for op in "+*" for a in numbers for b in numbers if a <= b]
    sums += [Sum("-", a, b) for a in numbers for b in numbers if a >= b]
    return tuple(s for s in sums if s.examined and (s.op != "*" or s.a >= LEAST_FACTOR))


def _taught(seed: int, count: int, name: str) -> Iterator[tuple[Sum, random.Random, str]]:
    """Sums that may be trained on, with the stream of chance they came from and where they stand."""
    stream = random.Random(f"{name} {seed}")
    number = 0
    while number < count:
        found = drawn(stream)
        if found.teaches():
            number += 1
            yield found, stream, f"arithmetic.{name}:{number}"


def _wrong(right: Sum, stream: random.Random) -> list[str]:
    """Three answers as they come from slips: a digit beside the right one, in the result or in a step."""
    found: list[str] = []
    while len(found) < 3:
        slip = stream.choice((-20, -10, -2, -1, 1, 2, 10, 20))
        if right.op != "*":
            text = str(right.result + slip)
        else:
            # one product is wrong, and what follows from it is reckoned rightly
            low, high, _ = right.steps()
            first = stream.random() < 0.5
            lows, highs = low.result + slip * first, high.result + slip * (not first)
            last = Sum("+", highs, lows // 10)
            if min(lows, highs) < 0 or last.examined:
                continue
            shown = f"{low.a}*{low.b}={lows} {high.a}*{high.b}={highs} {last.a}+{last.b}={last.result}"
            text = f"{shown}: {10 * last.result + lows % 10}"
        if not text.startswith("-") and text != right.worked() and text not in found:
            found.append(text)
    return found


def _asked(of: Sum, stream: random.Random, origin: str) -> Document:
    """A question in one of its wordings, with options in the manner of the answers."""
    right = of.worked()
    options = sorted([right, *_wrong(of, stream)], key=lambda _: stream.random())
    question = stream.choice(WORDINGS[of.op]).format(a=of.a, b=of.b)
    return Document(
        question=question, answer=str(of.result), options=tuple(options), label=options.index(right), origin=origin
    )


def documents(seed: int, count: int) -> Iterator[Document]:
    """Sums with their results as short texts, most of them in signs."""
    for of, stream, origin in _taught(seed, count, "documents"):
        plain, *worded = TEXTS[of.op]
        form = plain if stream.random() < SYMBOLIC else stream.choice(worded)
        yield Document(text=form.format(a=of.a, b=of.b, c=of.worked()), origin=origin)


def chats(seed: int, count: int) -> Iterator[Document]:
    """Talks: a question in words, and an answer that shows the way where there is one."""
    for of, stream, origin in _taught(seed, count, "chats"):
        question = stream.choice(WORDINGS[of.op]).format(a=of.a, b=of.b)
        talk = ({"role": "user", "content": question}, {"role": "assistant", "content": of.worked()})
        yield Document(messages=talk, origin=origin)


def questions(seed: int, count: int) -> Iterator[Document]:
    """Questions with the number they come to and four options."""
    for of, stream, origin in _taught(seed, count, "questions"):
        yield _asked(of, stream, origin)


def exams(seed: int, count: int) -> Iterator[Document]:
    """Such questions that no other corpus of arithmetic holds, none of them twice.

    Raises ConfigError when more are wanted than there are.
    """
    stream, kept = random.Random(f"exam {seed}"), exam()
    if count > len(kept):
        raise ConfigError(f"limit: arithmetic.exam has {len(kept)} questions and no more, {count} are wanted")
    for number, of in enumerate(stream.sample(kept, count), 1):
        turned = of.op != "-" and stream.random() < 0.5
        yield _asked(Sum(of.op, of.b, of.a) if turned else of, stream, f"arithmetic.exam:{number}")


ARITHMETIC = {
    "arithmetic.documents": documents,
    "arithmetic.chats": chats,
    "arithmetic.questions": questions,
    "arithmetic.exam": exams,
}
