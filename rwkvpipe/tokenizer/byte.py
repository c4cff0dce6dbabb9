"""Single bytes as tokens."""

from collections.abc import Iterable, Iterator

from rwkvpipe.base.errors import DataError

PIECE = 1 << 20  # bytes of a text whose ids are held at once


def utf8(text: str | bytes) -> bytes:
    """Text as UTF-8, bytes as they are. Raises DataError for half a surrogate pair, which no encoding can write."""
    if not isinstance(text, str):
        return bytes(text)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start + 1} of the text is {text[error.start]!r}, half a surrogate pair; remove it"
        ) from None


def unknown(number: int, size: int) -> DataError:
    """The error of an id that no text belongs to."""
    return DataError(f"id {number} stands for nothing in a vocabulary of {size}; ban it, or give the right tokenizer")


class ByteTokenizer:
    """Bytes: with offset 1 the id is byte + 1 and id 0 ends a document; with offset 0 the id is the byte itself."""

    def __init__(self, offset: int = 1):
        self.offset = offset
        self.size = 256 + offset
        self.eos = 0 if offset else None

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of the bytes of a text (as UTF-8)."""
        data = utf8(text)
        return [byte + self.offset for byte in data] if self.offset else list(data)

    def pieces(self, text: str | bytes) -> Iterator[list[int]]:
        """The same ids in lists of some length, for texts whose ids would fill the memory."""
        data = utf8(text)
        for start in range(0, len(data), PIECE):
            yield self.encode(data[start : start + PIECE])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; the end of a document gives none. Raises DataError for an id outside the vocabulary."""
        found = bytearray()
        for number in ids:
            number = int(number)
            if self.owns(number):
                found.append(number - self.offset)
            elif number != self.eos:
                raise unknown(number, self.size)
        return bytes(found)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def owns(self, number: int) -> bool:
        """Whether an id stands for a byte."""
        return self.offset <= number < self.size
