"""The door to all tokenizers: a folder, a vocabulary file or a name becomes one."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import read_json, write_json
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer, read_vocab, write_vocab

KINDS = ("bytes", "integer", "trie")


class Tokenizer(Protocol):
    """What every tokenizer can do. Ids run from 0 to size - 1; `eos` ends a document, None if nothing does."""

    size: int
    eos: int | None

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text. Raises DataError for what the vocabulary does not know."""

    def pieces(self, text: str | bytes) -> Iterator[list[int]]:
        """The same ids, list after list."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; `eos` gives nothing, invalid UTF-8 becomes U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The same as bytes."""

    def owns(self, number: int) -> bool:
        """Whether an id stands for something; `eos` does not."""


def _whole(value: Any, least: int, most: float, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise DataError(f"{where}: a whole number from {least} is needed (got {value!r}); make it with rwkvpipe.vocab")
    return value


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer out of its folder (tokenizer.json), out of a vocabulary file, or by name.

    The one name is `bytes`: id = byte, nothing ends a document. Raises DataError when there is none, or a damaged one.
    """
    folder = Path(path)
    if str(path) == "bytes":
        return ByteTokenizer(0)
    if folder.is_file() and folder.suffix != ".json":
        return TrieTokenizer(read_vocab(folder))
    file = folder if folder.is_file() else folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(
            f"{path}: no tokenizer there; give a folder with tokenizer.json (rwkvpipe.vocab makes one),"
            " a vocabulary file, or the name bytes"
        )
    described = read_json(file)
    kind = described.get("kind") if isinstance(described, dict) else None
    if kind not in KINDS:
        raise DataError(f"{file}: kind is {kind!r}; known: {', '.join(KINDS)}")
    if kind == "bytes":
        return ByteTokenizer(_whole(described.get("offset"), 0, 1, f"{file}: offset"))
    if kind == "integer":
        return IntegerTokenizer(_whole(described.get("size"), 1, float("inf"), f"{file}: size"))
    return TrieTokenizer(read_vocab(file.parent / "vocab.txt"))


def save_tokenizer(folder: str | Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json (and for a trie vocab.txt), from which `load_tokenizer` makes an equal tokenizer."""
    folder = Path(folder)
    if isinstance(tokenizer, ByteTokenizer):
        described: dict[str, Any] = {"kind": "bytes", "offset": tokenizer.offset}
    elif isinstance(tokenizer, IntegerTokenizer):
        described = {"kind": "integer", "size": tokenizer.numbers}
    else:
        described = {"kind": "trie"}
        write_vocab(folder / "vocab.txt", tokenizer.entries)
    write_json(folder / "tokenizer.json", described | {"ids": tokenizer.size, "eos": tokenizer.eos})
