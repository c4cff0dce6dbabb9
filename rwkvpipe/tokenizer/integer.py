"""Whole numbers as tokens."""

from collections.abc import Iterable, Iterator

from rwkvpipe.base.errors import DataError
from rwkvpipe.tokenizer.byte import SPACES

MOST = 2**31 - 1  # different numbers: ids are kept in int32


class IntegerTokenizer:
    """Numbers from 0 to size - 1: id = number + 1, and id 0 ends a document.

    As text they stand in decimal digits with white space between them.
    """

    def __init__(self, size: int):
        self.numbers = size
        self.size = size + 1
        self.eos = 0

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of numbers written as text. Raises DataError naming the first word that is not a number in range."""
        words = text.split() if isinstance(text, str) else bytes(text).decode("utf-8", "replace").split()
        found = []
        for place, word in enumerate(words, 1):
            if not (word.isascii() and word.isdigit()):
                raise DataError(
                    f"word {place} is {word[:40]!r}, and this vocabulary (kind integer) knows whole numbers only;"
                    " give numbers with spaces between them, or a tokenizer of kind bytes or trie"
                )
            # more digits than size has are out of range whatever they say
            value = int(word) if len(word.lstrip("0")) <= 18 else self.numbers
            if value >= self.numbers:
                raise DataError(
                    f"word {place} is {word[:40]}, the numbers of this vocabulary run from 0 to {self.numbers - 1};"
                    " give the tokenizer a larger size"
                )
            found.append(value + 1)
        return found

    def stream(self, blocks: Iterable[bytes]) -> Iterator[list[int]]:
        """The same ids, list after list, of a text that comes block after block."""
        held = b""
        for block in blocks:
            held += block
            cut = 1 + max(map(held.rfind, SPACES))  # the last word may go on
            yield self.encode(held[:cut])
            held = held[cut:]
        yield self.encode(held)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of ids as bytes."""
        return self.decode(ids).encode("ascii")

    def decode(self, ids: Iterable[int]) -> str:
        """Numbers with a space between them; ends of documents give nothing. Raises DataError for a foreign id."""
        words = []
        for number in ids:
            number = int(number)
            if self.owns(number):
                words.append(str(number - 1))
            elif number != self.eos:
                raise DataError(f"id {number} is no number of this vocabulary; ids run from 1 to {self.numbers}")
        return " ".join(words)

    def owns(self, number: int) -> bool:
        """Whether an id stands for a number."""
        return 1 <= number < self.size
