"""Documents as tokens in memory, a unit of work at a time: what processes make and hand over."""

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np

from rwkvpipe.base.config import CorpusConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.base.growing import Spool
from rwkvpipe.data.binidx import LONGEST, token_dtype
from rwkvpipe.data.block import Block
from rwkvpipe.data.corpus import BLOCK, LONG, Bad, Reader, strict
from rwkvpipe.data.document import Document, encoded
from rwkvpipe.data.marks import WEIGHT, marks, weights
from rwkvpipe.data.pairing import Pairing
from rwkvpipe.data.talk import Layout
from rwkvpipe.data.unit import Unit, survey
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.load import Tokenizer

PARTS = ("train", "valid")
TOP = 10  # longest documents that are told of
SPILL = 8 << 20  # bytes of tokens, or of marks, of a parcel that are held at most
BYTE = np.dtype(np.uint8)


@dataclass
class Part:
    """Documents of one of the two parts: tokens (n,), marks (n,) of a `kind` or None, and what is counted of each.

    Many tokens, and many marks, are in a file, for who takes them over.
    """

    tokens: np.ndarray | Path
    marks: np.ndarray | Path | None
    sizes: np.ndarray
    digests: np.ndarray
    widths: np.ndarray
    longest: dict[int, tuple[int, str]] = field(default_factory=dict)  # number: (order among all of the parcel, where)
    kind: np.dtype = BYTE


@dataclass
class Parcel:
    """What a unit of work came to: its parts, what was wrong with rows, what was counted, its share of the input."""

    parts: dict[str, Part]
    errors: list[str]
    counts: Counter
    weight: int = 0


def array_of(found: bytearray | Path, dtype: np.dtype) -> np.ndarray:
    """What a spool took; of a file, which loses its name, it is mapped."""
    if not isinstance(found, Path):
        return np.frombuffer(found, dtype)
    data = np.memmap(found, dtype, "r")
    found.unlink()
    return data


class _Heap:
    """Tokens of documents as they come."""

    def __init__(self, dtype: np.dtype, room: Path | None):
        self.dtype = dtype
        self.room, self.tokens, self.marks = room, Spool(room, SPILL), Spool(room, SPILL)
        self.sizes, self.digests, self.widths = array("i"), array("Q"), array("q")
        self.longest: list[tuple[int, int, int, object]] = []  # size, minus the order, number, where
        self.kind = BYTE  # of marks

    def add(self, document: Document, order: int, pieces: Iterable[tuple[np.ndarray, np.ndarray | None]]) -> None:
        """A document by its tokens and marks. Raises DataError, and then has not added it."""
        before, marked, size = len(self.tokens), len(self.marks) // self.kind.itemsize, 0
        try:
            for tokens, found in pieces:
                self.tokens.write(tokens.data)
                size += len(tokens)
                if found is not None:
                    self._add_marks(found)
            if size > LONGEST:
                raise DataError(
                    f"{document.origin}: a document of over {LONGEST:,} tokens, too many for the format; cut it"
                )
            digest, width = document.digest(), document.width
        except DataError:
            self.tokens.cut(before)
            self.marks.cut(marked * self.kind.itemsize)
            raise
        self._rank(size, order, len(self.sizes), document.origin)
        self.sizes.append(size)
        self.digests.append(digest)
        self.widths.append(width)

    def _add_marks(self, found: np.ndarray) -> None:
        """Marks of a document in one dtype with those before it; all become weights with the first that are."""
        if found.dtype == WEIGHT and self.kind != WEIGHT:
            held, self.kind = array_of(self.marks.taken(), BYTE), WEIGHT
            self.marks = Spool(self.room, SPILL)
            for first in range(0, len(held), BLOCK):
                self.marks.write(weights(held[first : first + BLOCK]).data)
        self.marks.write((weights(found) if self.kind == WEIGHT else found).data)

    def add_all(self, ids: np.ndarray, sizes: np.ndarray, rows: np.ndarray, order: np.ndarray, block: Block) -> None:
        """Texts of a block by their tokens: `rows` (n,) are theirs in the block, `order` (n,) theirs in the parcel."""
        self.tokens.write(ids.astype(self.dtype, copy=False).data)
        for place in np.argsort(-sizes, kind="stable")[:TOP].tolist():
            where = block.place(rows[place])
            self._rank(int(sizes[place]), int(order[place]), len(self.sizes) + place, where)
        self.sizes.frombytes(sizes.astype(np.int32).tobytes())
        starts, ends = block.starts[rows], block.ends[rows]
        self.widths.frombytes((ends - starts).tobytes())
        data = memoryview(block.data)
        self.digests.frombytes(b"".join(
            [blake2b(data[start:end], digest_size=8).digest()
             for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        ))  # fmt: skip

    def _rank(self, size: int, order: int, number: int, where: object) -> None:
        if len(self.longest) < TOP or (size, -order) > self.longest[0][:2]:
            heapq.heappush(self.longest, (size, -order, number, where))
            if len(self.longest) > TOP:
                heapq.heappop(self.longest)

    def part(self, masked: bool) -> Part:
        """All of them."""
        tokens, found = self.tokens.taken(), self.marks.taken() if masked else None
        return Part(
            tokens if isinstance(tokens, Path) else np.frombuffer(tokens, self.dtype),
            found if isinstance(found, Path) or not masked else np.frombuffer(found, self.kind),
            np.asarray(self.sizes, dtype="<i4"),
            np.asarray(self.digests, dtype="<u8"),
            np.asarray(self.widths, dtype="<i8"),
            {number: (-order, str(origin)) for _, order, number, origin in self.longest},
            self.kind,
        )


class Packer:
    """Makes parcels of documents, or of units of a corpus's files: what one process needs for it.

    In `room`, a folder, tokens wait that are too many to be handed over; without it all are held.
    """

    def __init__(self, spec: CorpusConfig, tokenizer: Tokenizer, room: Path | None = None):
        self.spec, self.tokenizer, self.room = spec, tokenizer, room
        self.render = Layout(spec) if spec.format == "chat" else Pairing(spec)
        self.reader = Reader(spec, spec.format, streams=True)
        self.dtype = token_dtype(tokenizer.size).newbyteorder("<")
        self.encode_all = getattr(tokenizer, "encode_all", None)

    def parcel(self, unit: Unit, part: str | None) -> Parcel:
        """The documents of a unit, all in `part`, or shared out as the spec says."""
        filling = Filling(self, part)
        found = self.reader.blocks(unit) if self.encode_all else None
        if found is None:
            for document in self.reader.read(unit, filling.bad):
                filling.add(document)
        else:
            for block in found:
                filling.add_block(block)
        return filling.parcel(unit.weight)

    def pack(self, read: Callable[[Bad], Iterable[Document]], part: str | None) -> Parcel:
        """Documents as a parcel; `read` is told what to do with an error, and gives them."""
        filling = Filling(self, part)
        for document in read(filling.bad):
            filling.add(document)
        return filling.parcel(0)

    def pieces(self, document: Document) -> Iterator[Document]:
        """What a document is packed as: itself, or windows of it."""
        if isinstance(self.render, Pairing):
            return self.render.windows(document, self.tokenizer)
        return iter((document,))

    def tokens(self, document: Document) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Tokens of a document, and of a talk its marks, in pieces. Raises DataError for an id that is none."""
        for ids, mask in encoded(document, self.tokenizer, self.render):
            piece = np.asarray(ids, dtype=np.int64 if len(ids) == 0 else None)
            # what cannot be out of range by its kind is not looked at
            low = int(piece.min()) if len(piece) and piece.dtype.kind != "u" else 0
            narrow = piece.dtype.kind == "u" and np.iinfo(piece.dtype).max < self.tokenizer.size
            if len(piece) and not narrow and (low < 0 or piece.max() >= self.tokenizer.size):
                raise DataError(
                    f"{document.origin}: the tokenizer gave ids from {low} to {piece.max()}, of"
                    f" {self.tokenizer.size} that it has; mend it"
                )
            yield piece.astype(self.dtype, copy=False), None if mask is None else marks(mask)


class Filling:
    """A parcel while it is made, all in `part`, or shared out as the spec says."""

    def __init__(self, packer: Packer, part: str | None):
        self.packer, self.spec, self.fixed = packer, packer.spec, part
        self.errors: list[str] = []
        self.heaps = {name: _Heap(packer.dtype, packer.room) for name in PARTS}
        self.counts: Counter = Counter()

    def bad(self, error: DataError) -> None:
        """What is done with a row that cannot be used."""
        if self.spec.on_error == "stop":
            strict(error)
        self.errors.append(str(error))

    def _share(self, fraction: float) -> str:
        return "valid" if self.spec.valid and fraction < self.spec.valid else "train"

    def add(self, document: Document) -> None:
        """A document."""
        if document.text == "" or (document.ids is not None and not len(document.ids)):
            self.counts["empty"] += 1
            return
        try:
            part = self.fixed or (self._share(document.fraction) if self.spec.valid else "train")
            for piece in self.packer.pieces(document):  # windows of a text are not shared out one by one
                self.heaps[part].add(piece, self.counts["seen"], self.packer.tokens(piece))
                self.counts["seen"] += 1
        except DataError as error:
            self.bad(error)
            return
        if self.spec.format == "chat":
            said = (turn["content"] for turn in document.talk() if turn["role"] == "assistant")
            self.counts["blank_lines"] += any(chat.TURN_END in words for words in said)

    def add_block(self, block: Block) -> None:
        """Texts by the thousand; those that are odd, or long, one by one, each at its turn."""
        widths = block.ends - block.starts
        begun = 0
        for row in np.flatnonzero((block.starts < 0) | (widths > LONG)).tolist():
            self._add_rows(block, np.arange(begun, row))
            if block.starts[row] < 0:
                for document in self.packer.reader.row(block.odd(row), block.place(row), self.bad):
                    self.add(document)
            else:
                start, end = int(block.starts[row]), int(block.ends[row])
                self.add(Document(blocks=partial(_blocks, block.data, start, end), origin=block.place(row)))
            begun = row + 1
        self._add_rows(block, np.arange(begun, len(widths)))

    def _add_rows(self, block: Block, rows: np.ndarray) -> None:
        some = block.ends[rows] > block.starts[rows]
        self.counts["empty"] += len(rows) - int(some.sum())
        rows = rows[some]
        if not len(rows):
            return
        ids, sizes = self.packer.encode_all(block.data, block.starts[rows], block.ends[rows])
        if (sizes < 0).any():
            for row in rows.tolist():
                self.add(Document(text=_text(block, row), origin=block.place(row)))
            return
        order = self.counts["seen"] + np.arange(len(rows))
        self.counts["seen"] += len(rows)
        if self.fixed or not self.spec.valid:
            self.heaps[self.fixed or "train"].add_all(ids, sizes, rows, order, block)
            return
        valid = np.array([self._share(Document(text=_text(block, row)).fraction) == "valid" for row in rows.tolist()])
        of_valid = np.repeat(valid, sizes)
        self.heaps["train"].add_all(ids[~of_valid], sizes[~valid], rows[~valid], order[~valid], block)
        self.heaps["valid"].add_all(ids[of_valid], sizes[valid], rows[valid], order[valid], block)

    def parcel(self, weight: int) -> Parcel:
        """What it came to."""
        masked = self.spec.masked
        parts = {name: heap.part(masked) for name, heap in self.heaps.items()}
        return Parcel(parts, self.errors, self.counts, weight)


def _text(block: Block, row: int) -> str:
    return str(block.data[block.starts[row] : block.ends[row]], "utf-8")


def _blocks(data: np.ndarray, start: int, end: int) -> Iterator[bytes]:
    """A long text some at a time, cut before characters."""
    while start < end:
        stop = min(start + BLOCK, end)
        while stop < end and data[stop] & 0xC0 == 0x80:
            stop -= 1
        yield data[start:stop].tobytes()
        start = stop


class Task:
    """What a process does with a job: the survey of a file, or a unit and the part that it belongs to."""

    def __init__(self, spec: CorpusConfig, load: Callable[[], Tokenizer], room: Path):
        self.spec, self.load, self.room = spec, load, room
        self.packer: Packer | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"packer": None}  # each process loads its own

    def __call__(self, job: tuple) -> Parcel | tuple[str, list[int]]:
        what, detail = job
        if isinstance(what, str):
            return survey(what, detail)
        if self.packer is None:
            self.packer = Packer(self.spec, self.load(), self.room)
        return self.packer.parcel(what, detail)


def loose(packer: Packer, documents: Iterable[Document], count: int = 1000) -> Iterator[Parcel]:
    """Parcels of so many documents each that come from no file."""
    found = iter(documents)
    while some := list(islice(found, count)):
        yield packer.pack(lambda _, some=some: some, None)


def limited(packer: Packer, units: Sequence[Unit], limit: int) -> Iterator[Parcel]:
    """Parcels of the first `limit` documents of files."""
    left = limit

    def some(unit: Unit, bad: Bad) -> Iterator[Document]:
        nonlocal left
        for document in islice(packer.reader.read(unit, bad), left):
            left -= 1
            yield document

    for unit in units:
        if left:
            yield packer.pack(lambda bad, unit=unit: some(unit, bad), None)
