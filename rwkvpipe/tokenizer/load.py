"""The door to all tokenizers: a folder, a vocabulary file or a name becomes one."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import read_json, write_json
from rwkvpipe.tokenizer.bpe import BpeTokenizer
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.tokenizer.own import OwnTokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer, read_vocab, write_vocab
from rwkvpipe.tokenizer.world import WorldTokenizer, load_vocabulary, load_world

KINDS = ("bytes", "integer", "world", "trie", "bpe", "own")
BPE_ENGINES = ("tokenizers", "gigatoken")
WORDS, MERGES = "vocab.txt", "bpe.json"  # what lies beside tokenizer.json
HUB = (WORDS, "rwkv_vocab_v20230424.txt")  # where folders of hubs keep a vocabulary in RWKV-LM's format


class Tokenizer(Protocol):
    """What every tokenizer can do. Ids run from 0 to size - 1; `eos` ends a document, None if nothing does."""

    size: int
    eos: int | None

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text. Raises DataError for what the vocabulary does not know."""

    def stream(self, blocks: Iterable[bytes]) -> Iterator[list[int] | np.ndarray]:
        """The same ids, some at a time, of a text that comes as blocks of UTF-8, none of which splits a character."""

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


def _read(described: dict, folder: Path, file: Path) -> Tokenizer:
    """The tokenizer that our own tokenizer.json describes."""
    kind = described.get("kind")
    if kind not in KINDS:
        raise DataError(f"{file}: kind is {kind!r}; known: {', '.join(KINDS)}")
    if kind == "bytes":
        return ByteTokenizer(_whole(described.get("offset"), 0, 1, f"{file}: offset"))
    if kind == "integer":
        return IntegerTokenizer(_whole(described.get("size"), 1, float("inf"), f"{file}: size"))
    if kind == "bpe":
        return BpeTokenizer(folder / MERGES, described.get("end"))
    if kind == "own":
        return _own(described, file)
    return load_world(folder / WORDS) if kind == "world" else TrieTokenizer(read_vocab(folder / WORDS))


def _own(described: dict, file: Path) -> OwnTokenizer:
    """A user's class; the one that tokenizer.json was made with, as the digest of its file says."""
    import_path, options = described.get("import_path"), described.get("options", {})
    if not isinstance(import_path, str) or not isinstance(options, dict):
        raise DataError(f"{file}: import_path is a text, options are a mapping; make it with rwkvpipe.vocab")
    found = OwnTokenizer(import_path, options)
    if found.source() != described.get("source"):
        raise DataError(f"{file}: the code of {import_path} has changed since; make it again with rwkvpipe.vocab")
    return found


def load_engine(path: str | Path, bpe_engine: str) -> Tokenizer:
    """`load_tokenizer`, but a BPE encodes by the engine of that name."""
    found = load_tokenizer(path)
    if bpe_engine == "gigatoken" and isinstance(found, BpeTokenizer):
        found.use_gigatoken()
    return found


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer out of its folder, out of a vocabulary file or a tokenizer.json, or by name.

    The names are `bytes` (id = byte, nothing ends a document) and `world` (RWKV World, from the package rwkv), where
    no file or folder is called so. A folder is one that rwkvpipe.vocab made, or a hub's. Raises DataError when there
    is none, or a damaged one.
    """
    folder = Path(path)
    if str(path) == "bytes" and not folder.exists():
        return ByteTokenizer(0)
    if str(path) == "world" and not folder.exists():
        return load_world()
    if folder.is_file() and folder.suffix != ".json":
        return load_vocabulary(folder)
    file = folder if folder.is_file() else folder / "tokenizer.json"
    if not file.is_file():
        words = [folder / name for name in HUB if (folder / name).is_file()]
        if words:
            return load_vocabulary(words[0])
        raise DataError(
            f"{path}: no tokenizer there; give a folder with tokenizer.json (rwkvpipe.vocab makes one),"
            " a vocabulary file, or one of the names bytes and world"
        )
    described = read_json(file)
    if isinstance(described, dict) and "kind" not in described and "model" in described:
        return BpeTokenizer(file)
    return _read(described if isinstance(described, dict) else {}, file.parent, file)


def files_of(path: str | Path) -> list[Path]:
    """The files that `load_tokenizer` may read of a tokenizer; none of one that is known by name."""
    if Path(path).is_file():
        path = Path(path)
        return [path, *files_of(path.parent)] if path.suffix == ".json" else [path]
    found = (Path(path) / name for name in ("tokenizer.json", MERGES, *HUB))
    return [file for file in found if file.is_file()]


def save_tokenizer(folder: str | Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json and what belongs beside it, from which `load_tokenizer` makes an equal tokenizer."""
    folder = Path(folder)
    if isinstance(tokenizer, ByteTokenizer):
        described: dict[str, Any] = {"kind": "bytes", "offset": tokenizer.offset}
    elif isinstance(tokenizer, IntegerTokenizer):
        described = {"kind": "integer", "size": tokenizer.numbers}
    elif isinstance(tokenizer, BpeTokenizer):
        described = {"kind": "bpe", "end": tokenizer.end}
        tokenizer.write(folder / MERGES)
    elif isinstance(tokenizer, OwnTokenizer):
        described = {"kind": "own", "import_path": tokenizer.import_path, "options": tokenizer.options}
        described["source"] = tokenizer.source()
    else:
        described = {"kind": "world" if isinstance(tokenizer, WorldTokenizer) else "trie"}
        write_vocab(folder / WORDS, tokenizer.entries)
    write_json(folder / "tokenizer.json", described | {"ids": tokenizer.size, "eos": tokenizer.eos})
