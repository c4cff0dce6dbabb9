"""What ids write: bytes that grow token by token, which ids stand for something, and texts that may be chosen among."""

from functools import cached_property, lru_cache

import numpy as np

from rwkvpipe.base.errors import ConfigError
from rwkvpipe.tokenizer.bpe import BpeTokenizer
from rwkvpipe.tokenizer.byte import ByteTokenizer, utf8
from rwkvpipe.tokenizer.load import Tokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer

LOST = "\ufffd".encode()


class Words:
    """The ids of a vocabulary, as a model of `size` ids sees them."""

    def __init__(self, tokenizer: Tokenizer, size: int):
        self.tokenizer, self.size, self.eos = tokenizer, size, tokenizer.eos
        # whose tokens write the same bytes wherever they stand
        self.plain = isinstance(tokenizer, ByteTokenizer | TrieTokenizer | BpeTokenizer)

    @cached_property
    def owned(self) -> np.ndarray:
        """Which ids (size,) may be written: those that stand for something, and the one that ends documents."""
        owns = self.tokenizer.owns
        return np.array([owns(number) or number == self.eos for number in range(self.size)], dtype=bool)

    @cached_property
    def by_bytes(self) -> dict[bytes, list[int]]:
        """Ids by what they write."""
        found: dict[bytes, list[int]] = {}
        for number in self.owned.nonzero()[0].tolist():
            if number != self.eos:
                found.setdefault(self.tokenizer.decode_bytes([number]), []).append(number)
        found.pop(b"", None)
        return found

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self.by_bytes), default=0)

    def grown(self, data: bytearray, ids: list[int]) -> tuple[bytearray, int]:
        """What ids write, given what all but the last of them wrote (which may be changed); from where on it is new."""
        if self.plain:
            before = len(data)
            data += self.tokenizer.decode_bytes(ids[-1:])
            return data, before
        found = bytearray(self.tokenizer.decode_bytes(ids))
        if found.startswith(data):
            return found, len(data)
        pairs = enumerate(zip(data, found, strict=False))
        return found, next((n for n, (old, new) in pairs if old != new), len(found))

    def settled(self, data: bytearray) -> bytearray:
        """What of it further ids cannot change: some tokenizers write U+FFFD for a character until it is whole."""
        end = len(data)
        while not self.plain and data.endswith(LOST, 0, end):
            end -= len(LOST)
        return data[:end]


@lru_cache(maxsize=4)
def words(tokenizer: Tokenizer, size: int) -> Words:
    """The words of a tokenizer: looked through once, however many engines use it."""
    return Words(tokenizer, size)


class Node:
    """A place in texts: what may follow, byte by byte, whether a text ends here, and the ids that may come."""

    def __init__(self):
        self.next: dict[int, Node] = {}
        self.end = False
        self.ids: list[int] = []

    def after(self, data: bytes | bytearray) -> "Node":
        """The place some bytes further. Raises KeyError where no text goes on so."""
        node = self
        for byte in data:
            node = node.next[byte]
        return node


class Choices:
    """The texts that a completion may be, as a tree of their bytes: any tokens that spell one of them will do.

    Ids that no other can bring to the end of a text are left out from the start. Raises ConfigError for texts that
    the vocabulary cannot spell.
    """

    def __init__(self, texts: tuple[str, ...], words: Words):
        if not words.plain:
            raise ConfigError("sampling.choices: needs a tokenizer of bytes, tries or BPE, whose tokens write bytes")
        self.words, self.root = words, Node()
        nodes = [self.root]
        for text in texts:
            node = self.root
            for byte in utf8(text):
                if byte not in node.next:
                    node.next[byte] = Node()
                    nodes.append(node.next[byte])
                node = node.next[byte]
            if node is self.root:
                raise ConfigError("sampling.choices: an empty text is no choice; remove it")
            node.end = True
        for node in reversed(nodes):  # what follows a node was made after it
            node.ids = self._ids(node)
        if not self.root.ids:
            raise ConfigError("sampling.choices: the vocabulary can spell none of them; change them")

    def _ids(self, node: Node) -> list[int]:
        """Ids that may come next; where a text ends and a longer one goes on, the id that ends documents, too."""
        found, places = [], [(b"", node)]
        while places:
            data, place = places.pop()
            if place.end or place.ids:
                found += self.words.by_bytes.get(data, [])
            if len(data) < self.words.longest:
                places += [(data + bytes([byte]), child) for byte, child in place.next.items()]
        if node.end and self.words.eos is not None:
            found.append(self.words.eos)
        return sorted(found)

    def over(self, node: Node) -> bool:
        """Whether a text is whole here and none goes on; without an id that ends documents, the shorter one wins."""
        return node.end and (self.words.eos is None or node.ids == [self.words.eos])


@lru_cache(maxsize=64)
def choices(texts: tuple[str, ...], words: Words) -> Choices:
    """The tree of these texts, made once for all rows that choose among them."""
    return Choices(texts, words)
