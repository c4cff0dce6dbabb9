"""Single bytes as tokens."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from rwkvpipe.base.errors import DataError

PIECE = 1 << 20  # bytes of a text whose ids are held at once
SPACES = b" \t\r\n\v\f"


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


def each_text(
    encode: Callable[[bytes], np.ndarray], data: np.ndarray, starts: np.ndarray, ends: np.ndarray, last: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of many texts in `data`, one by one, each ended by `last`, and how many of each; -1 of what has an error."""
    found, sizes, end = [], np.empty(len(starts), dtype=np.int64), np.array([] if last is None else [last])
    for number, (start, stop) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        try:
            ids = encode(data[start:stop].tobytes())
        except DataError:
            sizes[number] = -1  # whoever asks says what is wrong
            continue
        found += [ids, end.astype(ids.dtype)]
        sizes[number] = len(ids) + len(end)
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int32), sizes


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

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """The same ids as an array."""
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.uint16) + np.uint16(self.offset)

    def stream(self, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The same ids, array after array, of a text that comes block after block."""
        yield from map(self.encode_array, blocks)

    def encode_all(self, data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts, bytes from starts[k] to ends[k] of `data`, each ended by `eos`; and how many of each."""
        return each_text(self.encode_array, data, starts, ends, self.eos)

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
