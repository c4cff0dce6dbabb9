"""The vocabulary of released RWKV models, RWKV World: found in a package or at a path, and known by its content."""

import hashlib
import struct
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from rwkvpipe.base.errors import DataError
from rwkvpipe.tokenizer.trie import TrieTokenizer, read_vocab

PACKAGE, FILE = "rwkv", "rwkv/rwkv_vocab_v20230424.txt"
DIGEST = "9b50051c26774b8fc5fc38f78d37218e5e07bf5d98cd7d15645f6a8894c842c6"
ROWS = 65536  # of the models' tables; the entries end at 65529


def digest(entries: dict[int, bytes]) -> str:
    """sha256 over id (uint32), length (uint16) and bytes of each entry by rising ids: one for both line ends."""
    found = hashlib.sha256()
    for number, word in sorted(entries.items()):
        found.update(struct.pack("<IH", number, len(word)) + word)
    return found.hexdigest()


def is_world(entries: dict[int, bytes]) -> bool:
    """Whether a vocabulary is RWKV World, whatever its file was called."""
    small = len(entries) == 65529 and max(entries) == 65529 and max(map(len, entries.values())) < 2**16
    return small and digest(entries) == DIGEST


def packaged() -> Path:
    """The vocabulary's file in the installed package `rwkv`, of which no code is run. Raises DataError without it."""
    try:
        path = Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise DataError(
            f"the RWKV World vocabulary is not here: install the package {PACKAGE} (pip install {PACKAGE}), or give"
            " the path of rwkv_vocab_v20230424.txt"
        )
    return path


class WorldTokenizer(TrieTokenizer):
    """RWKV World: ids 1 to 65529 have entries, 0 ends a document, the rows up to 65535 are never used."""

    def __init__(self, entries: dict[int, bytes], engine: str | None = None):
        super().__init__(entries, engine)
        self.size = ROWS


def load_world(path: str | Path | None = None) -> WorldTokenizer:
    """RWKV World out of a file, or out of the package. Raises DataError where the file holds anything else."""
    path = packaged() if path is None else path
    entries = read_vocab(path)
    if not is_world(entries):
        raise DataError(
            f"{path}: not the RWKV World vocabulary: {len(entries)} entries with sha256 {digest(entries)[:16]}... as a"
            f" table, wanted is {DIGEST[:16]}...; fetch the file again, or use kind trie for a vocabulary of its own"
        )
    return WorldTokenizer(entries)


def load_vocabulary(path: str | Path) -> TrieTokenizer:
    """The tokenizer of a vocabulary file: RWKV World if that is what it holds, else one of its own."""
    entries = read_vocab(path)
    return WorldTokenizer(entries) if is_world(entries) else TrieTokenizer(entries)
