"""Documents as tokens in memory, a unit of work at a time: what processes make and hand over."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from rwkvpipe.base.config import CorpusConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.data.binidx import LONGEST, token_dtype
from rwkvpipe.data.corpus import Bad, Reader
from rwkvpipe.data.document import Document, encoded
from rwkvpipe.data.talk import Layout
from rwkvpipe.data.unit import Unit, survey
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.load import Tokenizer, load_tokenizer

PARTS = ("train", "valid")
TOP = 10  # longest documents that are told of


@dataclass
class Part:
    """Documents of one of the two parts: tokens (n,), marks (n,) or None, and of each document what is counted."""

    tokens: np.ndarray
    marks: np.ndarray | None
    sizes: np.ndarray
    digests: np.ndarray
    widths: np.ndarray
    longest: dict[int, tuple[int, str]] = field(default_factory=dict)  # number: (order among all of the parcel, where)


@dataclass
class Parcel:
    """What a unit of work came to: its parts, what was wrong with rows, what was counted, its share of the input."""

    parts: dict[str, Part]
    errors: list[str]
    counts: Counter
    weight: int = 0


class _Heap:
    """Tokens of documents as they come."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype
        self.pieces: list[np.ndarray] = []
        self.marks: list[np.ndarray] = []
        self.sizes: list[int] = []
        self.digests: list[int] = []
        self.widths: list[int] = []
        self.longest: list[tuple[int, int, int, object]] = []  # size, minus the order, number, where

    def add(self, document: Document, order: int, pieces: list[np.ndarray], marks: list[np.ndarray]) -> None:
        size = sum(map(len, pieces))
        if size > LONGEST:
            raise DataError(
                f"{document.origin}: a document of over {LONGEST:,} tokens, too many for the format; cut it"
            )
        self.pieces += pieces
        self.marks += marks
        if len(self.longest) < TOP or size > self.longest[0][0]:
            heapq.heappush(self.longest, (size, -order, len(self.sizes), document.origin))
            if len(self.longest) > TOP:
                heapq.heappop(self.longest)
        self.sizes.append(size)
        self.digests.append(document.digest())
        self.widths.append(document.width)

    def part(self, masked: bool) -> Part:
        empty = [np.zeros(0, self.dtype)]
        return Part(
            np.concatenate(self.pieces or empty),
            np.concatenate(self.marks or [np.zeros(0, np.uint8)]) if masked else None,
            np.asarray(self.sizes, dtype="<i4"),
            np.asarray(self.digests, dtype="<u8"),
            np.asarray(self.widths, dtype="<i8"),
            {number: (-order, str(origin)) for _, order, number, origin in self.longest},
        )


class Packer:
    """Makes parcels of documents, or of units of a corpus's files: what one process needs for it."""

    def __init__(self, spec: CorpusConfig, tokenizer: Tokenizer):
        self.spec, self.tokenizer = spec, tokenizer
        self.render = Layout(spec)
        self.reader = Reader(spec, spec.format)
        self.dtype = token_dtype(tokenizer.size).newbyteorder("<")

    def parcel(self, unit: Unit, part: str | None) -> Parcel:
        """The documents of a unit, all in `part`, or shared out as the spec says."""
        found = self.pack(lambda bad: self.reader.read(unit, bad), part)
        found.weight = unit.weight
        return found

    def pack(self, read: Callable[[Bad], Iterable[Document]], part: str | None) -> Parcel:
        """Documents as a parcel; `read` is told what to do with an error, and gives them."""
        errors: list[str] = []

        def bad(error: DataError) -> None:
            if self.spec.on_error == "stop":
                raise error
            errors.append(str(error))

        heaps, counts = {name: _Heap(self.dtype) for name in PARTS}, Counter()
        for document in read(bad):
            if document.text == "":
                counts["empty"] += 1
                continue
            try:
                pieces, marks = self._tokens(document)
                share = "valid" if self.spec.valid and document.fraction < self.spec.valid else "train"
                heaps[part or share].add(document, counts["seen"], pieces, marks)
            except DataError as error:
                bad(error)
                continue
            counts["seen"] += 1
            if self.spec.format == "chat":
                said = (turn["content"] for turn in document.talk() if turn["role"] == "assistant")
                counts["blank_lines"] += any(chat.TURN_END in words for words in said)
        masked = self.spec.format == "chat"
        return Parcel({name: heap.part(masked) for name, heap in heaps.items()}, errors, counts)

    def _tokens(self, document: Document) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Tokens of a document, and of a talk its marks, in pieces. Raises DataError for an id that is none."""
        pieces, marks = [], []
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
            pieces.append(piece.astype(self.dtype, copy=False))
            if mask is not None:
                marks.append(np.asarray(mask, dtype=np.uint8))
        return pieces, marks


class Task:
    """What a process does with a job: the survey of a file, or a unit and the part that it belongs to."""

    def __init__(self, spec: CorpusConfig, tokenizer: str):
        self.spec, self.tokenizer = spec, tokenizer
        self.packer: Packer | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"packer": None}  # each process loads its own

    def __call__(self, job: tuple) -> Parcel | tuple[str, list[int]]:
        what, detail = job
        if isinstance(what, str):
            return survey(what, detail)
        if self.packer is None:
            self.packer = Packer(self.spec, load_tokenizer(self.tokenizer))
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
