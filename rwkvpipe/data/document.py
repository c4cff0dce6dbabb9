"""What corpora are made of: a text, a talk, a question with its answer, or a row of numbers."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import canonical
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.byte import utf8
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.tokenizer.load import Tokenizer

Render = Callable[[Sequence[dict], Tokenizer], tuple[list[int], list[int]]]


@dataclass(frozen=True, eq=False)
class Document:
    """One of: `text`; `messages` (role and content each); `ids` (whole numbers); `question` with `answer`;
    a `pair`; `blocks`.

    `blocks` gives a text too long to be held: UTF-8, some at a time, and again when asked again. A question of
    multiple choice has `options` and the index of the right one, `label`; `more` are the columns of its row that have
    no meaning here. `origin` is where the document came from, as text `file:line`, for errors.
    """

    text: str | None = None
    messages: Sequence[dict] | None = None
    ids: Sequence[int] | np.ndarray | None = None
    question: str | None = None
    answer: str | None = None
    options: Sequence[str] | None = None
    label: int | None = None
    pair: dict | None = None
    blocks: Callable[[], Iterator[bytes]] | None = None
    more: dict | None = None
    origin: object = ""

    def talk(self) -> list[dict]:
        """The turns of a talk; a question becomes one of the user's, its answer the assistant's."""
        if self.messages is not None:
            return list(self.messages)
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]

    def words(self) -> list[str]:
        """All texts that a model may read or write because of this document."""
        if self.text is not None:
            return [self.text]
        if self.messages is not None:
            return [chat.text(self.messages)]
        if self.question is not None:
            # as it stands and as a turn, options with the space before them
            asked = [self.question, chat.text(self.talk() if self.answer is not None else self.talk()[:1])]
            return asked + [f" {option}" for option in self.options or ()]
        return []

    def row(self) -> dict:
        """A question, or a pair of answers, as a row of JSON."""
        if self.pair is not None:
            return dict(self.pair)
        row: dict = {"question": self.question, "answer": self.answer}
        if self.options is not None:
            row |= {"options": list(self.options), "label": self.label}
        return row

    def digest(self) -> int:
        """64 bits that depend on the content alone: equal documents have equal ones."""
        if self.blocks is not None:
            found = hashlib.blake2b(digest_size=8)
            for block in self.blocks():
                found.update(block)
            return int.from_bytes(found.digest(), "little")
        if self.text is not None:
            data = self.text.encode("utf-8", "surrogatepass")
        elif self.ids is not None:
            data = np.asarray(self.ids, dtype="<i8").tobytes()
        else:
            data = canonical(self.talk() if self.messages is not None else [self.question, self.answer]).encode()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")

    @cached_property
    def fraction(self) -> float:
        """A number in [0, 1) that depends on the content alone, of a question on what is asked."""
        if self.blocks is not None:
            return _fraction(chain([b'{"text":"'], (_escaped(block) for block in self.blocks()), [b'"}']))
        if self.ids is not None:
            data = np.asarray(self.ids, dtype="<i8").tobytes()
        elif self.question is not None:
            data = canonical({"question": self.question}).encode("utf-8", "surrogatepass")
        else:
            data = canonical({"text": self.text} if self.text is not None else list(self.messages or ())).encode(
                "utf-8", "surrogatepass"
            )
        return _fraction([data])

    @property
    def width(self) -> int:
        """Bytes of all that is said, as UTF-8; of numbers none."""
        if self.blocks is not None:
            return sum(map(len, self.blocks()))
        if self.ids is not None:
            return 0
        said = [self.text] if self.text is not None else [turn["content"] for turn in self.talk()]
        return sum(len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in said)


def _fraction(parts: Iterable[bytes]) -> float:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return int.from_bytes(found.digest()[:7], "big") / 2**56


def _escaped(block: bytes) -> bytes:
    """A part of a text as canonical JSON writes it."""
    return canonical(block.decode("utf-8"))[1:-1].encode("utf-8")


def encoded(
    document: Document, tokenizer: Tokenizer, render: Render = chat.render
) -> Iterator[tuple[np.ndarray | list[int], list[int] | None]]:
    """Ids (n,) of a document, piece after piece, and for a talk, which is one piece, which of them are learned.

    Texts and rows of numbers end with the tokenizer's `eos`, if it has one; a talk ends with its last turn, laid out
    by `render`.
    Raises DataError naming the document's origin.
    """
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    if document.ids is not None:
        if not isinstance(tokenizer, IntegerTokenizer):
            raise DataError(f"{document.origin}: whole numbers, for which a tokenizer of kind integer is needed")
        numbers = np.asarray(document.ids)
        if (top := int(numbers.max(initial=0))) > tokenizer.size - 2:
            raise DataError(
                f"{document.origin}: holds {top}, the tokenizer's numbers end at {tokenizer.size - 2};"
                " give it a larger size"
            )
        yield numbers.astype(np.int64) + 1, None
        yield end, None
        return
    try:
        if document.text is None and document.blocks is None:
            yield render(document.talk(), tokenizer)
            return
        blocks = [utf8(document.text)] if document.blocks is None else document.blocks()
        for piece in tokenizer.stream(blocks):
            yield piece, None
        yield end, None
    except DataError as error:
        raise DataError(f"{document.origin}: {error}") from None
