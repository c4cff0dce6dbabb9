"""Matrices that nobody trains, as native code reads them fastest, in fp32 or fewer bits; and products with them.

A matrix (out, in) lies in panels of 16 rows, of each in turn one number, or in int8 two: (panels, in, 16, 1) or
(panels, in / 2, 16, 2), filled up with zeros. A product of many rows has the bits of a product of each alone, whatever
the matrix is kept in (`cuda/matvec.h`). With int8 native code reads x in 16 bits, too (`cuda/fixed.h`).

What loses nothing is kept in less than was asked for: a matrix in fp32 whose numbers are all of bf16, as those of
released weights are, in bf16; and one in bf16 in twelve bits a number (`cuda/twelve.h`), where native code reads these.
"""

import mmap
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvpipe.kernel import build
from rwkvpipe.kernel.rounding import from_int8, to_int8

KINDS = ("fp32", "bf16", "int8")
TYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "twelve": torch.int32,
}  # in all that it lies in
EACH = {"fp32": 1, "bf16": 1, "int8": 2}  # numbers of a row that lie side by side
TURN, LINES, CODES = 8, 3, 16  # of twelve bits: numbers of a row in a turn, lines that it takes, codes of a panel
OTHERS = 1 / 256  # numbers that may have no code, as a share of all
WIDE = 16  # rows of a panel
PAGE = 1 << 21  # bytes of a large page
LINE = 64  # bytes that memory is read in
SOME = 1 << 16  # numbers that are looked at at a time
PART = 1 << 24  # numbers that are in fp32 at a time where they are kept in fewer bits and there is no native code


class Panels(NamedTuple):
    """A matrix (out, width): data (panels, words, 16, each), and for int8 the scale of each row (out,).

    In twelve bits data is all words of 32 bits, as `cuda/twelve.h` tells them.
    """

    data: Tensor
    scale: Tensor | None
    out: int
    width: int

    @property
    def kind(self) -> str:
        """What its numbers are kept in."""
        return next(kind for kind, dtype in TYPES.items() if dtype == self.data.dtype)


class Shelf:
    """Room for the panels of a model's matrices, in large pages where the system has them: read a tenth faster so."""

    def __init__(self, sizes: list[tuple[int, int]], kind: str):
        size = sum(_room(out, width, kind) + LINE for out, width in sizes)
        place = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            place.madvise(mmap.MADV_HUGEPAGE)
        self.left = torch.frombuffer(place, dtype=torch.uint8)
        self.left = self.left[-self.left.data_ptr() % PAGE :]

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for so many numbers."""
        size = torch.Size(shape).numel() * dtype.itemsize
        found, self.left = self.left[:size].view(dtype).view(shape), self.left[size + -size % LINE :]
        return found


def _room(out: int, width: int, kind: str) -> int:
    """Bytes that panels take at most: of few numbers a row, twelve bits of each, in whole turns, are more than 16."""
    panels = -(-out // WIDE)
    room = panels * WIDE * -(-width // EACH[kind]) * EACH[kind] * TYPES[kind].itemsize
    if kind == "int8":
        return room
    return max(room, 4 * (panels * (_words(width) + 1) + 1 + 2 * int(OTHERS * out * width)))


def _words(width: int) -> int:
    """Words of 32 bits that a panel in twelve bits has."""
    return CODES + -(-width // TURN) * LINES * WIDE


def lies(kind: str | None) -> int:
    """How native code calls the way a matrix lies; None is a row after the other, as PyTorch has it."""
    return 0 if kind is None else 1 + list(TYPES).index(kind)


def pack(matrix: Tensor, kind: str, shelf: Shelf | None = None) -> Panels:
    """A matrix in panels, rounded, on a shelf if there is one; for int8 each row's largest number becomes 127."""
    (out, width), scale = matrix.shape, None
    exact = kind == "fp32" and all(map(_in_bf16, matrix.split(max(WIDE, SOME // width))))
    if exact or kind == "bf16":
        kind, library = "bf16", build.extension() if matrix.device.type == "cpu" else None
        if library and library.twelve_there():
            found = in_twelve(matrix.float() if exact else matrix.bfloat16().float(), shelf)
            if found:
                return found
        matrix = matrix.bfloat16()
    if kind == "int8":
        matrix, scale = to_int8(matrix)
    each = EACH[kind]
    shape = (-(-out // WIDE), -(-width // each), WIDE, each)
    data = matrix.new_empty(shape) if shelf is None else shelf.take(shape, matrix.dtype)
    matrix, whole = F.pad(matrix, (0, -width % each)), out - out % WIDE
    data[: whole // WIDE] = matrix[:whole].view(-1, WIDE, *shape[1::2]).transpose(1, 2)
    if whole < out:
        data[-1] = F.pad(matrix[whole:], (0, 0, 0, WIDE - (out - whole))).view(WIDE, *shape[1::2]).transpose(0, 1)
    return Panels(data, scale, out, width)


def _in_bf16(matrix: Tensor) -> bool:
    return torch.equal(matrix.bfloat16().to(matrix.dtype), matrix)


def in_twelve(matrix: Tensor, shelf: Shelf | None = None) -> Panels | None:
    """A matrix of bf16, given in fp32, in twelve bits a number; None where too many of its numbers have no code."""
    (out, width), count, matrix = matrix.shape, -(-matrix.shape[0] // WIDE), matrix.contiguous()
    powers, others = matrix.new_empty(count, CODES), torch.zeros(count, dtype=torch.int64)
    build.call("twelve_count", (out, width, count), matrix, powers, others)
    if others.sum() > OTHERS * matrix.numel():
        return None
    starts, each = F.pad(others.cumsum(0), (1, 0)).int(), _words(width)
    size = count * each + count + 1 + 2 * int(starts[-1])
    data = torch.zeros(size, dtype=torch.int32) if shelf is None else shelf.take((size,), torch.int32).zero_()
    data[: count * each].view(count, each)[:, :CODES] = powers.view(torch.int32)
    data[count * each :][: count + 1] = starts
    build.call("twelve_pack", (out, width, count, size), matrix, data)
    return Panels(data, None, out, width)


def _opened(panels: Panels) -> Tensor:
    """Numbers in twelve bits (out, in), in fp32."""
    count, turns = -(-panels.out // WIDE), -(-panels.width // TURN)
    each = _words(panels.width)
    numbers, starts, others = panels.data.tensor_split([count * each, count * each + count + 1])
    powers, lines = numbers.view(count, each).tensor_split([CODES], 1)
    lines, turn = lines.view(count, turns, LINES, WIDE), torch.arange(TURN, dtype=torch.int32)[:, None]
    sizes = lines[:, :, turn.flatten() // 4]  # (panels, turns, 8, 16)
    mantissas = (sizes >> turn % 4 * 8 & 127) << 16
    signs = (sizes >> (turn % 4 * 8 + 15) % 32) << 31
    codes = (lines[:, :, 2:] >> turn * 4 & 15).flatten(1)
    numbers = mantissas.flatten(1) | signs.flatten(1) | powers.gather(1, codes.long())
    numbers, others = numbers.view(torch.float32), others.view(-1, 2)
    panel = torch.repeat_interleave(torch.arange(count), starts.diff())
    numbers[panel, others[:, 0].long()] = others[:, 1].contiguous().view(torch.float32)
    numbers = numbers.view(count, -1, WIDE)
    return numbers.mT.reshape(-1, numbers.shape[1])[: panels.out, : panels.width].contiguous()


def rows(panels: Panels) -> Tensor:
    """Its numbers (out, in), a row after the other, as they are kept, or in fp32 where these take twelve bits."""
    if panels.kind == "twelve":
        return _opened(panels)
    return panels.data.transpose(1, 2).flatten(2).flatten(0, 1)[: panels.out, : panels.width]


def unpack(panels: Panels) -> Tensor:
    """The rounded matrix (out, in), in fp32."""
    return rows(panels).float() if panels.scale is None else from_int8(rows(panels), panels.scale)


def times(x: Tensor, panels: Panels) -> Tensor:
    """(..., in) to (..., out), in fp32. Raises ValueError where x is of another width."""
    if x.shape[-1] != panels.width:
        raise ValueError(f"x is {tuple(x.shape)}; the matrix is ({panels.out}, {panels.width})")
    if build.native(x, panels.data.new_empty(0, dtype=torch.float32)) is None:
        return torch.cat([F.linear(x, unpack(part)) for part in _parts(panels)], -1)
    given = x.reshape(-1, x.shape[-1]).contiguous()
    found = x.new_empty(*x.shape[:-1], panels.out)
    sizes = (len(given), panels.out, given.shape[1], lies(panels.kind))
    build.call("panels_times", sizes, build.words([panels.data]), panels.scale, given, found)
    return found


def _parts(panels: Panels) -> Iterator[Panels]:
    """The matrix a part at a time; in twelve bits at once."""
    if panels.kind == "twelve":
        yield panels
        return
    step = max(1, PART // (WIDE * panels.width))
    for first, data in enumerate(panels.data.split(step)):
        begin, end = first * step * WIDE, min(panels.out, (first + 1) * step * WIDE)
        yield Panels(data, None if panels.scale is None else panels.scale[begin:end], end - begin, panels.width)
