"""Corpora that are made, not downloaded: name to a function of seed and count.

Here stands the smallest one, counting in words; what it examines is never drawn for its training corpora. Larger ones
have modules of their own.
"""

import difflib
import random
from collections.abc import Callable, Iterator

from rwkvpipe.base.errors import ConfigError
from rwkvpipe.data.arithmetic import ARITHMETIC
from rwkvpipe.data.document import Document

Generate = Callable[[int, int], Iterator[Document]]
# fmt: off
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
# fmt: on
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """A number from 0 to 99 in English."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def _starts(seed: int, count: int, examined: bool) -> Iterator[tuple[int, int]]:
    """(first number, step) of sequences; a fifth of all pairs is kept for the exam."""
    stream = random.Random(seed)
    pairs = [(first, step) for first in range(60) for step in range(1, 6)]
    pairs = [(first, step) for first, step in pairs if ((7 * first + 3 * step) % 5 == 0) == examined]
    for _ in range(count):
        yield stream.choice(pairs)


def _sequence(first: int, step: int, count: int) -> str:
    return " ".join(in_words(first + step * place) for place in range(count))


def _question(first: int, step: int) -> str:
    return f"What comes after {_sequence(first, step, 3)}?"


def counting_documents(seed: int, count: int) -> Iterator[Document]:
    """Sequences of four numbers as texts: with a fifth they would hold what is examined."""
    for number, (first, step) in enumerate(_starts(seed, count, False), 1):
        yield Document(text=_sequence(first, step, 4), origin=f"counting.documents:{number}")


def counting_chats(seed: int, count: int) -> Iterator[Document]:
    """Talks in which the user names three numbers and the assistant the next."""
    for number, (first, step) in enumerate(_starts(seed, count, False), 1):
        talk = (
            {"role": "user", "content": _question(first, step)},
            {"role": "assistant", "content": in_words(first + 3 * step)},
        )
        yield Document(messages=talk, origin=f"counting.chats:{number}")


def _questions(seed: int, count: int, examined: bool) -> Iterator[Document]:
    stream = random.Random(seed)
    name = "exam" if examined else "questions"
    for number, (first, step) in enumerate(_starts(seed, count, examined), 1):
        right = first + 3 * step
        wrong = stream.sample([n for n in range(right - 5, right + 6) if 0 <= n < 100 and n != right], 3)
        options = sorted([right, *wrong], key=lambda _: stream.random())
        yield Document(
            question=_question(first, step),
            answer=in_words(right),
            options=tuple(map(in_words, options)),
            label=options.index(right),
            origin=f"counting.{name}:{number}",
        )


def counting_questions(seed: int, count: int) -> Iterator[Document]:
    """The questions of the talks, with the answer and four options."""
    return _questions(seed, count, False)


def counting_exam(seed: int, count: int) -> Iterator[Document]:
    """Such questions about sequences that no other counting corpus holds."""
    return _questions(seed, count, True)


SYNTHETIC: dict[str, Generate] = {
    "counting.documents": counting_documents,
    "counting.chats": counting_chats,
    "counting.questions": counting_questions,
    "counting.exam": counting_exam,
    **ARITHMETIC,
}


def generate(name: str, seed: int, count: int) -> Iterator[Document]:
    """`count` documents of a made corpus; equal seeds make equal ones. Raises ConfigError for an unknown name."""
    if name not in SYNTHETIC:
        near = difflib.get_close_matches(name, SYNTHETIC, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"synthetic: there is no made corpus {name}; {hint}known: {', '.join(sorted(SYNTHETIC))}")
    return SYNTHETIC[name](seed, count)
