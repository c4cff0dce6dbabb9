"""Longest match over bytes: own vocabularies and those in RWKV-LM's file format."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import write_text
from rwkvpipe.tokenizer.byte import PIECE, each_text, unknown, utf8
from rwkvpipe.tokenizer.memo import Memo
from rwkvpipe.tokenizer.native import NativeTrie, native

BOM = b"\xef\xbb\xbf"
SHORT = 400  # bytes of a text that is done before numpy has begun
# most lines need no parser: a literal without an escape is its own text, and in bytes literals there is ASCII alone
PLAIN = re.compile(rb"(\d{1,9}) (b?)(?:'(?=[^'\\]*' \d+$)|\"(?=[^\"\\]*\" \d+$))([^\\]*)['\"] (\d{1,9})")
ENDS = (b"\0", b"<|endoftext|>", b"</s>")  # what trainers write as the text of id 0


class TrieTokenizer:
    """At each place the longest entry that fits is taken; id 0 ends a document.

    `entries` maps ids (from 1) to bytes. `engine` is `native` (C++), `numpy` or `plain`, the first that can be had if
    left out; the ids are the same with each. Raises DataError for ids below 1, empty entries, and equal ones.
    """

    def __init__(self, entries: dict[int, bytes], engine: str | None = None):
        for number, word in entries.items():
            if number < 1 or not word:
                raise DataError(f"id {number} ({word!r}): ids begin at 1 (0 ends a document), and no entry is empty")
        self.entries = dict(entries)
        self.ids = {word: number for number, word in entries.items()}
        if len(self.ids) < len(entries):
            double = next(word for number, word in entries.items() if self.ids[word] != number)
            raise DataError(f"two ids stand for {double!r}; remove one")
        self.size = max(entries, default=0) + 1
        self.eos = 0
        # which lengths to try, longest first, by the first two bytes; one byte is tried last
        found = defaultdict(set)
        for word in self.ids:
            if len(word) > 1:
                found[word[:2]].add(len(word))
        self._longest = max(map(len, self.ids), default=1)
        self._lengths = {start: (*sorted(lengths, reverse=True), 1) for start, lengths in found.items()}
        self._wanted = engine

    @cached_property
    def _engine(self) -> NativeTrie | Memo | None:
        """What encodes; None is the search of this module alone."""
        if self._wanted == "plain":
            return None
        found = native(self.ids) if self._wanted in (None, "native") else None
        if found is None and self._wanted == "native":
            raise DataError("engine: there is no native one here; install g++, or leave engine out")
        return found or Memo(self.ids, self._part)

    @property
    def engine(self) -> str:
        """Name of what encodes: native, numpy or plain."""
        return "plain" if self._engine is None else self._engine.name

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text (as UTF-8). Raises DataError naming the first character that no entry fits."""
        data = utf8(text)
        engine = self._engine
        if engine is None or (len(data) < SHORT and isinstance(engine, Memo)):
            return self._part(data, 0, len(data))[0]
        found = self._ids_of(data, 0, len(data))[0]
        return engine.listed(found) if isinstance(engine, NativeTrie) else found.tolist()

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """The same ids as an array, which is faster than a list: (n,) of whole numbers."""
        data = utf8(text)
        return self._ids_of(data, 0, len(data))[0]

    def stream(self, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The same ids, array after array, of a text that comes block after block."""
        held, place, passed = b"", 0, (0, 0)
        waiting = iter(blocks)
        block = next(waiting, b"")
        while block is not None:
            following = next(waiting, None)
            if place:
                passed, held, place = _passed(passed, held[:place]), held[place:], 0
            held = held + block if held else block
            # an entry that begins so far before the end is whole, whatever follows
            end = len(held) - (0 if following is None else self._longest)
            while place < end:
                found, place = self._ids_of(held, place, min(end, place + PIECE), passed)
                yield found
            block = following

    def encode_all(self, data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts, bytes from starts[k] to ends[k] of `data`, each ended by `eos`; and how many of each (n,).

        -1 is a text that holds what the vocabulary does not know; its ids are left out.
        """
        if isinstance(self._engine, NativeTrie):
            return self._engine.encode_all(data, starts, ends, self.eos)
        return each_text(self.encode_array, data, starts, ends, self.eos)

    def _ids_of(self, data: bytes, place: int, stop: int, passed: tuple[int, int] = (0, 0)) -> tuple[np.ndarray, int]:
        """Ids of entries that begin from `place` to about `stop`, and where the next one begins.

        Lines, and characters of a line begun, that were `passed` stand before the data, for errors.
        """
        if self._engine is None:
            found, end = self._part(data, place, stop)
            return np.array(found, dtype=np.int32), end
        stop = min(stop, len(data))
        if isinstance(self._engine, Memo) and (cut := self._engine.last_cut(data, place, stop)) < stop:
            # it takes an end for the end of the text: up to its last cut, and from there on the plain way
            ids, place = self._engine.part(data[:cut], place, cut) if cut > place else (np.zeros(0, np.int32), place)
            more, end = self._part(data, place, stop)
            return np.concatenate([ids, np.array(more, dtype=np.int32)]), end
        ids, end = self._engine.part(data, place, stop)
        if end < min(stop, len(data)):
            raise self._missing(data, end, passed)
        return ids, end

    def _part(self, data: bytes, place: int, stop: int) -> tuple[list[int], int]:
        """Ids of entries that begin before `stop`, and where the next one begins: the same whatever `stop` is."""
        ids, lengths, found, end = self.ids, self._lengths, [], min(stop, len(data))
        while place < end:
            for length in lengths.get(data[place : place + 2], (1,)):
                number = ids.get(data[place : place + length])
                if number is not None:
                    break
            else:
                raise self._missing(data, place)
            found.append(number)
            place += length
        return found, place

    def _missing(self, data: bytes, place: int, passed: tuple[int, int] = (0, 0)) -> DataError:
        start = place
        while start > 0 and place - start < 3 and data[start] & 0xC0 == 0x80:  # back to where the character begins
            start -= 1
        character = data[start : start + 4].decode("utf-8", "ignore")[:1]
        shown = f"{character!r} (U+{ord(character):04X})" if character else f"the byte 0x{data[place]:02x}"
        lines, characters = _passed(passed, data[:start])
        where = f"line {lines + 1}, " if lines else ""
        line = data[max(0, data.rfind(b"\n", 0, start) + 1, start - 120) : start].decode("utf-8", "replace")
        return DataError(
            f"the vocabulary has no {shown}, {where}character {characters + 1} of {(line + character)[-30:]!r};"
            " learn the vocabulary from this text too, or use kind bytes"
        )

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; the end of a document gives none. Raises DataError for an id without an entry."""
        found = []
        for number in ids:
            number = int(number)
            if number in self.entries:
                found.append(self.entries[number])
            elif number != self.eos:
                raise unknown(number, self.size)
        return b"".join(found)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def owns(self, number: int) -> bool:
        """Whether an id has an entry."""
        return number in self.entries


def _passed(before: tuple[int, int], data: bytes) -> tuple[int, int]:
    """Lines, and characters of the line begun, before and in some bytes of a text."""
    lines = data.count(b"\n")
    begun = len(data[data.rfind(b"\n") + 1 :].decode("utf-8", "replace"))
    return before[0] + lines, begun + (0 if lines else before[1])


def _entry(line: str, where: str) -> tuple[int, bytes]:
    """One line, `id literal length`: the literal may hold spaces, so it ends at the last one."""
    number, _, rest = line.partition(" ")
    literal, _, length = rest.rpartition(" ")
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in (number, length)):
        raise DataError(f"{where}: not `id 'text' length`, as RWKV-LM's vocabulary files have it; mend or remove it")
    try:
        word = ast.literal_eval(literal.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two of brackets in brackets
        word = None
    if not isinstance(word, str | bytes):
        raise DataError(f"{where}: {literal[:40]} is no Python text or bytes literal; write 'text' or b'\\xff'")
    try:
        word = utf8(word)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if len(word) != int(length):
        raise DataError(f"{where}: the entry has {len(word)} bytes, the line says {length}; the file is damaged")
    return int(number), word


def _lines(path: str | Path) -> Iterator[tuple[str, int, bytes]]:
    """(place, id, entry) of each line that has one. Raises DataError naming file and line."""
    # not splitlines: an entry may hold a character that Python takes for a line end
    for count, raw in enumerate(Path(path).read_bytes().removeprefix(BOM).split(b"\n"), 1):
        raw, where = raw.rstrip(b"\r"), f"{path}:{count}"
        plain = PLAIN.fullmatch(raw)
        if plain and len(plain[3]) == int(plain[4]) and (not plain[2] or plain[3].isascii()):
            with suppress(UnicodeDecodeError):
                plain[3].decode("utf-8")
                yield where, int(plain[1]), plain[3]
                continue
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line; is it a vocabulary file?") from None
        if line.strip() and not line.startswith("#"):
            yield where, *_entry(line, where)


def read_vocab(path: str | Path) -> dict[int, bytes]:
    """Read a vocabulary file: a line `id 'text' length` or `id b'bytes' length` for each entry.

    Both kinds of line end are read; blank lines and those that begin with # are skipped, and so is id 0 where its
    text only marks the end of a document. Nothing in the file is run. Raises DataError naming file and line.
    """
    entries: dict[int, bytes] = {}
    places: dict[bytes, int] = {}
    for where, number, word in _lines(path):
        if number == 0 and word in ENDS:
            continue
        if number == 0:
            raise DataError(f"{where}: id 0 ends a document and can have no text; number the entries from 1")
        if not word:
            raise DataError(f"{where}: the entry is empty; remove the line")
        if number in entries:
            raise DataError(f"{where}: id {number} stands twice; remove one of the lines")
        if word in places:
            raise DataError(f"{where}: {word!r} is the entry of id {places[word]} already; remove one of the lines")
        entries[number] = word
        places[word] = number
    if not entries:
        raise DataError(f"{path}: no entries in it; a vocabulary file has a line `id 'text' length` for each")
    return entries


def write_vocab(path: str | Path, entries: dict[int, bytes]) -> None:
    """Write a vocabulary file in RWKV-LM's format, ordered by id; bytes that are no UTF-8 as b'...'."""
    lines = []
    for number, word in sorted(entries.items()):
        try:
            literal = repr(word.decode("utf-8"))
        except UnicodeDecodeError:
            literal = repr(word)
        lines.append(f"{number} {literal} {len(word)}\n")
    write_text(path, "".join(lines))
