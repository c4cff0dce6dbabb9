"""The binidx pair: all tokens of a corpus in one file, where each document lies in another.

PREFIX.bin is the tokens one after another; PREFIX.idx is Megatron's index (magic, version, dtype, sizes, pointers,
document index, little-endian). Two more files are ours: a mask beside them, PREFIX.mask, one uint8 a token, or, where
some weigh other than 0 and 1, one fp32 (which of both, its length says); and, in place of the .bin, PREFIX.parts, which
names the pairs that the tokens lie in.
"""

from array import array
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import numpy as np

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import atomic
from rwkvpipe.data.marks import WEIGHT, marks, narrowed, runs, weights, widened
from rwkvpipe.data.spread import Spread, read_parts

MAGIC = b"MMIDIDX\x00\x00"
CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOATS = {6: ("<f4", "<f8"), 7: ("<f8",)}  # read if they are whole; which of two, the length of the .bin says
HEAD = 34  # bytes before the sizes
BLOCK = 1 << 20  # items of an index that are checked at once
LONGEST = 2**31 - 1  # tokens of a document: sizes are int32


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that RWKV programs read: uint16 to 65,536 ids, int32 above. Raises DataError for too many."""
    if vocab_size > 2**31:
        raise DataError(f"a vocabulary of {vocab_size:,} ids: there is room for 2,147,483,648; number them anew from 0")
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.int32)


def _prefix(path: str | Path) -> str:
    return str(path).removesuffix(".bin").removesuffix(".idx")


class BinidxWriter:
    """Write documents one by one; the files appear, whole, when the context ends without an exception.

    `path` is the prefix, without a suffix; `dtype` one of uint16, int32, uint8, int8, int16, int64. With `masked` there
    is a mask file even if no document comes; left out, the first document decides.
    """

    def __init__(self, path: str | Path, dtype: np.dtype | type, *, masked: bool | None = None):
        self.prefix = _prefix(path)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in {np.dtype(name) for name in CODES.values()}:
            raise DataError(f"{self.prefix}: tokens of dtype {np.dtype(dtype)} cannot be stored; use uint16 or int32")
        self.sizes = array("i")
        self.tokens = self._begun = 0
        self.masked = masked

    def __enter__(self) -> "BinidxWriter":
        with ExitStack() as stack:
            self._bin = stack.enter_context(open(stack.enter_context(atomic(f"{self.prefix}.bin")), "wb"))
            self._mask, self._odd = None, []
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *reason) -> None:
        if reason[0] is not None:
            self._stack.__exit__(*reason)
            return
        with self._stack:
            self._finish()

    def add(self, ids, mask=None) -> None:
        """Append a document: ids (n,) whole numbers, mask (n,) of numbers from 0 up for all documents or for none.

        Raises DataError when an id does not fit the dtype.
        """
        self.extend(ids, mask)
        self.end()

    def extend(self, ids, mask=None) -> None:
        """Append a piece of a document, which `end` ends."""
        ids = np.asarray(ids, dtype=np.int64 if len(ids) == 0 else None)
        assert ids.ndim == 1 and ids.dtype.kind in "iu", f"a row of whole numbers is needed, not {ids.dtype}"
        limits = np.iinfo(self.dtype)
        if len(ids) and not (limits.min <= ids.min() and ids.max() <= limits.max):
            raise DataError(f"{self.prefix}: an id of {ids.min()} to {ids.max()} does not fit {self.dtype}; use int32")
        if self.masked is None:
            self.masked = mask is not None
        assert self.masked == (mask is not None), "all documents have masks, or none"
        self._bin.write(ids.astype(self.dtype).tobytes())
        if mask is not None:
            mask = marks(mask)
            assert mask.shape == ids.shape, f"{len(ids)} ids with {mask.size} marks"
            self._odd.append(runs(mask, self.tokens + self._begun))
            self._open_mask().write(narrowed(mask).tobytes())
        self._begun += len(ids)
        if self._begun > LONGEST:
            raise DataError(f"{self.prefix}: a document of over {LONGEST:,} tokens, too many for the format; cut it")

    def end(self) -> None:
        """End the document whose pieces were given."""
        self.sizes.append(self._begun)
        self.tokens += self._begun
        self._begun = 0

    def _open_mask(self):
        if self._mask is None:
            part = self._stack.enter_context(atomic(f"{self.prefix}.mask"))
            self._mask = self._stack.enter_context(open(part, "wb"))  # noqa: SIM115
        return self._mask

    def _finish(self) -> None:
        """Write the index and close the streams; the stack then renames all."""
        assert not self._begun, "the last document was not ended"
        if self.masked:
            self._open_mask().close()
            if sum(map(len, self._odd)):
                wide = Path(f"{self._mask.name}.wide")
                with open(wide, "wb") as file:
                    file.writelines(widened(Path(self._mask.name), np.concatenate(self._odd)))
                wide.replace(self._mask.name)
        self._bin.close()
        write_index(self._stack.enter_context(atomic(f"{self.prefix}.idx")), self.dtype, np.asarray(self.sizes))


def write_index(path: Path, dtype: np.dtype, sizes: np.ndarray, ends: np.ndarray | None = None) -> None:
    """Write an index into a temporary file: of items of `sizes` (n,) tokens, each a document.

    With `ends` (m,), which leads from 0 to n, documents have several items.
    """
    code = next(code for code, name in CODES.items() if np.dtype(name) == dtype)
    count = len(sizes)
    ends = np.arange(count + 1, dtype="<i8") if ends is None else ends
    with open(path, "wb") as file:
        file.write(MAGIC + (1).to_bytes(8, "little") + bytes([code]))
        file.write(count.to_bytes(8, "little") + len(ends).to_bytes(8, "little"))
        for first in range(0, count, BLOCK):
            file.write(sizes[first : first + BLOCK].astype("<i4").tobytes())
        before = 0
        for first in range(0, count, BLOCK):
            borders = before + np.cumsum(sizes[first : first + BLOCK], dtype=np.int64)
            file.write((np.concatenate(([before], borders[:-1])) * dtype.itemsize).astype("<i8").tobytes())
            before = int(borders[-1])
        for first in range(0, len(ends), BLOCK):
            file.write(ends[first : first + BLOCK].astype("<i8").tobytes())


class Binidx:
    """A binidx pair, memory-mapped: `len` is the number of tokens.

    `dtype` is the tokens'; floats, if they are whole numbers, are read as int64. The index of a corpus of many millions
    of documents is checked block by block and stays on disk until `documents` is asked for. Raises DataError naming the
    file that is missing or damaged, and how; with `rows`, also for an id that a model of so many rows has none for,
    when it is read.
    """

    def __init__(self, path: str | Path, rows: int | None = None):
        self.prefix, self.rows = _prefix(path), rows
        self.dtype, self._sizes, self._ends = self._index(Path(f"{self.prefix}.idx"))
        count, listed = int(self._sizes.sum(dtype=np.int64)), Path(f"{self.prefix}.parts")
        self.parts = [Binidx(part) for part in read_parts(listed)] if listed.is_file() else []
        if listed.is_file():
            self._tokens = Spread([part._tokens for part in self.parts])
            if len(self) != count or any(part.dtype != self.dtype for part in self.parts):
                raise DataError(f"{listed}: its pairs are others than when they were joined; make the corpus again")
        else:
            self._tokens = _mapped(Path(f"{self.prefix}.bin"), self.dtype, count)
        self._marks: np.ndarray | Spread | None = None

    @property
    def sizes(self) -> np.ndarray:
        """How many tokens each item has (n,)."""
        return self._sizes

    @property
    def ends(self) -> np.ndarray:
        """Items before each document, and all items (m,)."""
        return self._ends

    @property
    def masked(self) -> bool:
        """Whether there is a mask beside it."""
        return all(part.masked for part in self.parts) if self.parts else Path(f"{self.prefix}.mask").is_file()

    @cached_property
    def documents(self) -> np.ndarray:
        """The first token of each document and the one after its last (n, 2)."""
        borders = np.concatenate(([0], np.cumsum(self._sizes, dtype=np.int64)))  # tokens before each item
        starts = borders[self._ends]
        return np.stack([starts[:-1], starts[1:]], axis=1)  # (n, 2)

    @staticmethod
    def _index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
        """dtype, sizes in tokens (n,), and where documents begin among the items (m,)."""
        raw = _mapped(path, np.dtype(np.uint8), None)
        head = raw[:HEAD].tobytes()
        if head[: len(MAGIC)] != MAGIC:
            raise DataError(f"{path}: no binidx index (its first bytes are not MMIDIDX); make it with rwkvpipe.pack")
        if len(head) < HEAD:
            raise DataError(f"{path}: cut short: {len(head)} bytes, the head alone has {HEAD}; make it again")
        version, code = int.from_bytes(head[9:17], "little"), head[17]
        count, documents = int.from_bytes(head[18:26], "little"), int.from_bytes(head[26:34], "little")
        if version != 1:
            raise DataError(f"{path}: version {version} of the format; only 1 is known")
        if code not in CODES and code not in FLOATS:
            known = ", ".join(map(str, sorted((*CODES, *FLOATS))))
            raise DataError(f"{path}: dtype code {code} is unknown; known: {known}")
        wanted = HEAD + 12 * count + 8 * documents
        if len(raw) != wanted:
            how = "cut short" if len(raw) < wanted else "too long"
            raise DataError(
                f"{path}: {how}: {len(raw)} bytes, {count} items and {documents} document borders take {wanted};"
                " copy or make it again"
            )
        sizes = raw[HEAD : HEAD + 4 * count].view("<i4")
        pointers = raw[HEAD + 4 * count : HEAD + 12 * count].view("<i8")
        ends = raw[HEAD + 12 * count :].view("<i8")
        dtype = _dtype(path, code, sizes)
        wrong = _items(sizes, pointers, dtype.itemsize) or _borders(ends, count)
        if wrong:
            raise DataError(f"{path}: damaged: {wrong}; copy or make it again")
        return dtype, sizes, ends

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, start: int, count: int) -> np.ndarray:
        """`count` tokens (count,) from token `start` on, across the borders of documents; a view of the file."""
        assert start >= 0 and start + count <= len(self), f"{self.prefix}: {start} + {count} of {len(self)} tokens"
        found = self._tokens[start : start + count]
        if self.dtype.kind == "f":
            if not np.array_equal(found, np.trunc(found)) or not np.isfinite(found).all():
                raise DataError(f"{self.prefix}.bin: holds a number that is not whole near token {start}; tokens are")
            found = found.astype(np.int64)
        if self.rows is not None and count and (found.min() < 0 or found.max() >= self.rows):
            wrong = found[(found < 0) | (found >= self.rows)][0]
            raise DataError(
                f"{self.prefix}.bin: holds the id {wrong} near token {start}, the model has {self.rows} rows;"
                " pack the corpus with the model's tokenizer"
            )
        return found

    def mask(self, start: int, count: int) -> np.ndarray:
        """The marks (count,) of those tokens, uint8 or fp32. Raises DataError when there is no mask file."""
        if self._marks is None:
            self._marks = self._beside()
        assert start >= 0 and start + count <= len(self), f"{self.prefix}: {start} + {count} of {len(self)} marks"
        return self._marks[start : start + count]

    def weights(self, start: int, count: int) -> np.ndarray:
        """How much each of those tokens counts (count,) fp32. Raises DataError for a mask that says no such thing."""
        found = weights(self.mask(start, count))
        if not np.isfinite(found).all() or (found < 0).any():
            raise DataError(f"{self.prefix}.mask: holds what is no number from 0 up near token {start}; make it again")
        return found

    def _beside(self) -> np.ndarray | Spread:
        """The marks of all tokens, on disk."""
        if self.parts:
            return Spread([part._beside() for part in self.parts])
        return _mapped(Path(f"{self.prefix}.mask"), self.marks, len(self._tokens))

    @property
    def marks(self) -> np.dtype:
        """What marks are: uint8, or fp32 where the mask file has room for that."""
        path, wide = Path(f"{self.prefix}.mask"), len(self) * WEIGHT.itemsize
        return WEIGHT if wide and path.is_file() and path.stat().st_size == wide else np.dtype(np.uint8)


def _dtype(path: Path, code: int, sizes: np.ndarray) -> np.dtype:
    """What a code stands for: of floats of two kinds, the one that the length of the .bin fits."""
    if code in CODES:
        return np.dtype(CODES[code])
    tokens, file = int(sizes.sum(dtype=np.int64)), path.with_name(f"{path.name.removesuffix('.idx')}.bin")
    found = [np.dtype(name) for name in FLOATS[code]]
    held = file.stat().st_size if file.is_file() else 0
    return next((dtype for dtype in found if dtype.itemsize * tokens == held), found[-1])


def _items(sizes: np.ndarray, pointers: np.ndarray, width: int) -> str | None:
    """What is wrong with items (n,) of tokens of `width` bytes, each of which begins where the one before it ends."""
    before = 0
    for first in range(0, len(sizes), BLOCK):
        block, given = sizes[first : first + BLOCK], pointers[first : first + BLOCK]
        if block.min() < 0:
            number = int((block < 0).argmax())
            return f"item {first + number + 1} has {block[number]} tokens"
        after = before + np.cumsum(block, dtype=np.int64)
        wanted = (after - block) * width
        if not np.array_equal(given, wanted):
            number = int((given != wanted).argmax())
            end, whole = int(given[number]) + int(block[number]) * width, int(sizes.sum(dtype=np.int64)) * width
            outside = f", outside the {whole} bytes of all items" if given[number] < 0 or end > whole else ""
            return (
                f"item {first + number + 1} of {block[number]} tokens begins at byte {given[number]}{outside}; the one"
                f" before it ends at byte {wanted[number]}"
            )
        before = int(after[-1])
    return None


def _borders(ends: np.ndarray, count: int) -> str | None:
    """What is wrong with a document index (m,), which leads from 0 to the number of items."""
    if not len(ends) or ends[0] != 0 or ends[-1] != count:
        return f"the document index does not lead from 0 to its {count} items"
    for first in range(0, len(ends) - 1, BLOCK):
        back = np.diff(ends[first : first + BLOCK + 1]) < 0
        if back.any():
            number = first + int(back.argmax())
            return f"the document index goes back: document {number + 1} is items {ends[number]} to {ends[number + 1]}"
    return None


def _mapped(path: Path, dtype: np.dtype, count: int | None) -> np.ndarray:
    """A file as an array. Raises DataError when it is missing or has not `count` numbers."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; a corpus has .bin, .idx and, for talks, .mask (rwkvpipe.pack)")
    size = path.stat().st_size
    if count is not None and size != count * dtype.itemsize:
        raise DataError(
            f"{path}: has {size} bytes, but {count} tokens of {dtype.itemsize} bytes, as its index says, take"
            f" {count * dtype.itemsize}; it was cut short or belongs to another index; copy or make both again"
        )
    # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r") if size else np.zeros(0, dtype=dtype)
