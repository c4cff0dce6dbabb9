"""Byte pair encoding by heart: texts are cut where a word begins for sure, and the ids of a piece are remembered.

GPT-2's pattern, by which a byte-level vocabulary tells words apart, looks back at nothing. So where a word begins
whatever stands around it, a text may be cut, and the ids of a piece depend on the piece alone. Most pieces have come
before. Only what ASCII says for sure is a border; a text, or what is left of it, may be one piece.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

WHITE = r"\x85\xa0\u1680\u180e\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # beyond ASCII
ALONE = r"(?![^\t\n\r -~])"  # nothing beyond what ASCII writes may belong to the word, too
PIECE = re.compile(
    "|".join(
        (
            rf" ?[A-Za-z]++{ALONE}",
            rf" ?[0-9]++{ALONE}",
            # behind an apostrophe may be the end of a shortened word: 's 't 're (3.11.2 errs in possessive groups)
            rf" ?[!-/:-@\[-`{{-~]++(?:(?<=')[A-Za-z]++|(?!(?<=')[A-Za-z])){ALONE}",
            # the last of several white spaces stands alone, or with the word behind it
            rf"[ \t\n\r]+(?=[ \t\n\r][^\x00-\x20\x7f{WHITE}])",
            rf"[\t\n\r](?=[^\x00-\x20\x7f{WHITE}])",
            r"[ \t\n\r]++\Z",
            rf" ?[^\x00-\x20]++(?<![{WHITE}])(?=[ \t\n\r]|\Z)",
            r"(?s:.+)",
        )
    )
)
PART = 1 << 18  # characters of texts that are looked up together
KNOWN = 1 << 17  # pieces remembered
LONG = 32  # characters of a piece that hardly comes twice
NEW = 3  # pieces by themselves take so many times as long as in a text
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}

Encode = Callable[[list[str]], Iterable[Sequence[int]]]


def fits(described: dict) -> bool:
    """Whether a tokenizer.json tells words apart by GPT-2's pattern, as its text stands, and nothing else does."""
    words, model = described.get("pre_tokenizer") or {}, described.get("model") or {}
    plain = all(words.get(name) == value for name, value in WORDS.items()) and not described.get("normalizer")
    return plain and not model.get("dropout") and all(one.get("special") for one in described.get("added_tokens") or ())


class Pieces:
    """Remembers what `encode` gives for pieces of texts."""

    def __init__(self, encode: Encode):
        self._encode = encode
        self._known: dict[str, bytes] = {}

    def encode_all(self, texts: Iterable[str]) -> Iterator[bytes]:
        """The ids of each text, int32 numbers side by side."""
        part, size = [], 0
        for text in texts:
            if len(text) > PART:
                yield from self._looked_up(part)
                part, size = [], 0
                found = (match.group() for match in PIECE.finditer(text))
                yield b"".join(chain.from_iterable(self._looked_up([some]) for some in _some(found)))
                continue
            part.append(PIECE.findall(text))
            size += len(text)
            if size >= PART:
                yield from self._looked_up(part)
                part, size = [], 0
        yield from self._looked_up(part)

    def _looked_up(self, texts: list[list[str]]) -> Iterator[bytes]:
        """The ids of texts that are cut."""
        known = self._known
        new = list(set(chain.from_iterable(texts)) - known.keys())
        if NEW * len(new) > sum(map(len, texts)):
            yield from self._bytes(["".join(pieces) for pieces in texts])
            return
        if new:
            known.update(zip(new, self._bytes(new), strict=True))
        for pieces in texts:
            yield b"".join(map(known.__getitem__, pieces))
        if len(known) > KNOWN:
            known.clear()
        for piece in new:
            if len(piece) > LONG:
                known.pop(piece, None)

    def _bytes(self, texts: list[str]) -> Iterator[bytes]:
        return (array("i", ids).tobytes() for ids in self._encode(texts))


def _some(pieces: Iterator[str]) -> Iterator[list[str]]:
    """So many pieces at a time as PART characters may be."""
    while some := list(islice(pieces, PART // 4)):
        yield some
