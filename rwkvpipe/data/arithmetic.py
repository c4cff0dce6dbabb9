"""Made corpora of arithmetic: additions and subtractions of numbers to 99, multiplications worked out step by step.

About one question in seven is kept for the exam. Which one is a function of the question alone, whatever its wording
and the order of its operands where order does not matter; so no seed and no corpus ever teaches what is examined, not
even as a step of something longer.

The texts are right. The talks are those of people in a hurry, who forget to carry about one time in four: who only
imitates them, errs as they do, and who practises with somebody to tell right from wrong can do better.
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
SYMBOLIC = 0.5  # share of the texts that use signs; the others are exercises with their answers
CLOSEST = 12  # how far apart close pairs may be
CLOSE = 0.4  # share of the subtractions whose numbers are drawn close together: few digits are learned late
SLIPS = 0.25  # share of the talks about sums with a carry in which it is forgotten

SIGNS = {"+": "{a}+{b}={c}", "-": "{a}-{b}={c}", "*": "{a}*{b}: {c}"}
WORDINGS = {
    "+": ("What is {a}+{b}?", "What is {a} plus {b}?", "What is the sum of {a} and {b}?"),
    "-": ("What is {a}-{b}?", "What is {a} minus {b}?", "What is left of {a} without {b}?"),
    "*": ("What is {a}*{b}?", "What is {a} times {b}?", "What is the product of {a} and {b}?"),
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

    def worked(self, slip: int = 0) -> str:
        """The result; for a multiplication with the way to it. The last sum comes out wrong by `slip`."""
        if self.op != "*":
            return str(self.result + slip)
        low, high, last = self.steps()
        tens = last.result + slip
        return f"{low.shown()} {high.shown()} {last.a}+{last.b}={tens}: {10 * tens + low.result % 10}"

    def shown(self) -> str:
        """The sum in signs, with its result."""
        return f"{self.a}{self.op}{self.b}={self.result}"

    def forgotten(self) -> int:
        """What the last sum is wrong by if its first carry is forgotten; 0 where there is none."""
        last = self.steps()[-1] if self.op == "*" else self
        if last.op == "+":
            return -10 if last.a % 10 + last.b % 10 > 9 else 0
        return 10 if last.a % 10 < last.b % 10 else 0


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
    numbers = range(LEAST_EXAMINED, TOP + 1)
    sums = [Sum(op, a, b) for op in "+*" for a in numbers for b in numbers if a <= b]
    sums += [Sum("-", a, b) for a in numbers for b in numbers if a >= b]
    return tuple(s for s in sums if s.examined and (s.op != "*" or s.a >= LEAST_FACTOR))


def _taught(seed: int, count: int, name: str) -> Iterator[tuple[Sum, random.Random, str]]:
    """Sums that may be trained on, with the stream of chance they came from and where they stand."""
    stream = random.Random(f"{name} {seed}")
    number = 0
    while number < count:
        found = drawn_for_lessons(stream) if name == "documents" else drawn(stream, CLOSE)
        if found.teaches():
            number += 1
            yield found, stream, f"arithmetic.{name}:{number}"


def _wrong(right: Sum, stream: random.Random) -> list[str]:
    """Three answers as they come from slips in the last sum, a forgotten carry before all others."""
    slips = [slip for slip in (-20, -10, -2, -1, 1, 2, 10, 20) if right.result + slip * 10 ** (right.op == "*") >= 0]
    stream.shuffle(slips)
    slips.sort(key=lambda slip: slip != right.forgotten())
    return [right.worked(slip) for slip in slips[:3]]


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
        form = SIGNS[of.op] if stream.random() < SYMBOLIC else f"{stream.choice(WORDINGS[of.op])} {{c}}"
        yield Document(text=form.format(a=of.a, b=of.b, c=of.worked()), origin=origin)


def chats(seed: int, count: int) -> Iterator[Document]:
    """Talks: a question, and an answer that shows the way where there is one, and may have forgotten a carry."""
    for of, stream, origin in _taught(seed, count, "chats"):
        question = stream.choice(WORDINGS[of.op]).format(a=of.a, b=of.b)
        answer = of.worked(of.forgotten() if stream.random() < SLIPS else 0)
        talk = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
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
