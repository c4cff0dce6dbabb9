"""Longest match without a compiler: texts are cut where no entry can reach across, and the pieces remembered.

Between two neighbouring bytes that stand beside each other in no entry of the vocabulary, none can span: there the
search for the longest entry starts anew whatever came before. So a text may be cut at all those places, and the ids of
a piece depend on the piece alone. numpy finds the cuts and looks the pieces up, thousands at a time.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping

import numpy as np

BLOCK = 1 << 16  # bytes cut at once
SHORT = 15  # bytes of a piece that fits, with its length, into two numbers
LONG = 64  # longer pieces hardly come twice
BITS = 17  # of a hash: so many pieces are found by number, the newest of those that have the same
PIECES = 1 << 16  # pieces remembered
ROOM = 1 << 19  # ids of them all
COUNTS = np.arange(SHORT + 2)
# by length, and for all that are longer: which bits of a piece's first and next 8 bytes are its own, and a mark
FIRST = np.array([(1 << 8 * min(n, 8)) - 1 for n in COUNTS[:-1].tolist()] + [0], dtype=np.uint64)
NEXT = np.array([(1 << 8 * max(n - 8, 0)) - 1 for n in COUNTS[:-1].tolist()] + [0], dtype=np.uint64)
MARK = (COUNTS << 56).astype(np.uint64)
SPREAD, MIXED = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd, with bits as drawn by lot

Plain = Callable[[bytes, int, int], tuple[list[int], int]]


def apart(words: Iterable[bytes]) -> np.ndarray:
    """(65536,) bool: whether no entry has these two bytes, first * 256 + second, beside each other."""
    found = np.ones(1 << 16, dtype=bool)
    words = [word for word in words if len(word) > 1]
    if words:
        text = np.frombuffer(b"".join(words), dtype=np.uint8).astype(np.uint16)
        inside = np.ones(len(text) - 1, dtype=bool)
        inside[np.cumsum([len(word) for word in words])[:-1] - 1] = False
        found[((text[:-1] << 8) | text[1:])[inside]] = False
    return found


class Memo:
    """The engine of a vocabulary: `plain(data, start, stop)` is the search that it remembers the results of."""

    name = "numpy"

    def __init__(self, words: Mapping[bytes, int], plain: Plain):
        self.words, self.plain = words, plain
        self._apart = apart(words)
        self._known: dict[bytes, int] = {}  # piece to its number
        # filled one by one, which arrays of Python do faster, and read by thousands, which is numpy's
        self._ids = array("i", bytes(4 * ROOM))  # of all pieces, one after the other
        self._used = 0
        # where a piece's ids start and how many there are; the last one is what is not remembered
        self._first = array("q", bytes(8 * (PIECES + 1)))
        self._count = array("q", bytes(8 * (PIECES + 1)))
        self._all_ids = np.frombuffer(self._ids, dtype=np.int32)
        self._all_first = np.frombuffer(self._first, dtype=np.int64)
        self._all_count = np.frombuffer(self._count, dtype=np.int64)
        # by hash: the two numbers that a short piece is, and which piece it is
        self._low = np.zeros(1 << BITS, dtype=np.uint64)
        self._high = np.zeros(1 << BITS, dtype=np.uint64)
        self._number = np.zeros(1 << BITS, dtype=np.int64)

    def part(self, data: bytes, place: int, stop: int) -> tuple[np.ndarray, int]:
        """Ids of a text from `place` to `stop` or a little further, and where the next one begins."""
        found = [np.zeros(0, dtype=np.int32)]
        stop = min(stop, len(data))
        while place < stop:
            edges = self._edges(data, place)
            found.append(self._block(data, edges))
            place = int(edges[-1])
        return np.concatenate(found), place

    def last_cut(self, data: bytes, place: int, stop: int) -> int:
        """The last place from `place` to `stop` before which no entry reaches across; `place` if there is none.

        The end of the data is one.
        """
        if stop >= len(data):
            return len(data)
        first = max(place, stop - BLOCK)
        tail = np.frombuffer(data, dtype=np.uint8, offset=first, count=stop + 1 - first).astype(np.uint16)
        cuts = np.flatnonzero(self._apart[(tail[:-1] << 8) | tail[1:]])
        return first + 1 + int(cuts[-1]) if len(cuts) else place

    def _edges(self, data: bytes, place: int) -> np.ndarray:
        """Where pieces begin and end, from `place` to the last cut of a block; a block without any grows."""
        size = BLOCK
        while True:
            end = min(place + size, len(data))
            pairs = np.ndarray(end - place - 1, dtype=">u2", buffer=data, offset=place, strides=(1,))
            cuts = np.flatnonzero(self._apart[pairs]) + (place + 1)
            if end == len(data):
                return np.concatenate([[place], cuts, [end]])
            if len(cuts):
                return np.concatenate([[place], cuts])
            size *= 2

    def _block(self, data: bytes, edges: np.ndarray) -> np.ndarray:
        """Ids of the pieces between edges."""
        starts, lengths = edges[:-1], np.minimum(edges[1:] - edges[:-1], SHORT + 1)
        padded = data[edges[0] : edges[-1]] + bytes(16)
        ahead = np.ndarray(len(padded) - 8, dtype="<u8", buffer=padded, strides=(1,))  # the next 8 bytes everywhere
        places = starts - edges[0]
        low = ahead[places] & FIRST[lengths]
        high = (ahead[places + 8] & NEXT[lengths]) | MARK[lengths]
        slots = (((low * SPREAD) ^ (high * MIXED)) * SPREAD >> np.uint64(64 - BITS)).astype(np.int64)
        numbers = self._number[slots]
        unknown = np.flatnonzero((self._low[slots] != low) | (self._high[slots] != high))
        loose: dict[int, list[int]] = {}  # ids of pieces that are not remembered
        if len(unknown):
            found = [
                self._find(data, start, end, index, loose)
                for index, start, end in zip(
                    unknown.tolist(), starts[unknown].tolist(), edges[unknown + 1].tolist(), strict=True
                )
            ]
            numbers[unknown] = found
            kept = unknown[(lengths[unknown] <= SHORT) & (numbers[unknown] < PIECES)]
            self._low[slots[kept]], self._high[slots[kept]] = low[kept], high[kept]
            self._number[slots[kept]] = numbers[kept]
        counts = self._all_count[numbers]
        for index, ids in loose.items():
            counts[index] = len(ids)
        ends = np.cumsum(counts)
        whence = np.repeat(self._all_first[numbers] - ends + counts, counts)
        whence += np.arange(len(whence))
        found = self._all_ids.take(whence, mode="clip")  # where loose pieces stand, anything
        for index, ids in loose.items():
            found[ends[index] - len(ids) : ends[index]] = ids
        return found

    def _find(self, data: bytes, start: int, end: int, index: int, loose: dict[int, list[int]]) -> int:
        """The number of a remembered piece; PIECES for another one, whose ids go into `loose`."""
        piece = data[start:end]
        number = self._known.get(piece)
        if number is not None:
            return number
        whole = self.words.get(piece)
        ids = self.plain(data, start, end)[0] if whole is None else [whole]
        number = len(self._known)
        if number == PIECES or end - start > LONG or self._used + len(ids) > ROOM:
            loose[index] = ids
            return PIECES
        for place, one in enumerate(ids, self._used):
            self._ids[place] = one
        self._first[number], self._count[number] = self._used, len(ids)
        self._used += len(ids)
        self._known[piece] = number
        return number
