"""Lines of a unit of a file, in blocks of bounded size."""

import math
from collections.abc import Iterator
from typing import BinaryIO

from rwkvpipe.base.errors import DataError
from rwkvpipe.data.kind import BOM
from rwkvpipe.data.unit import Place, Unit
from rwkvpipe.data.workers import turn

BLOCK = 1 << 20  # bytes of lines that are held at once; a line may be longer
LINE = 1 << 27  # bytes of a line at most
LARGE = 1 << 22  # bytes of a line that one process holds at a time
READ = 1 << 18


def _begin(unit: Unit, file: BinaryIO) -> tuple[int, int]:
    """Go to the first line that begins in the unit; the place of it, and how many lines of the unit are before it."""
    if not unit.start:
        return 0, 0
    place = unit.start - 1
    file.seek(place)
    stop = math.inf if unit.stop is None else unit.stop
    # the rest of a line that begins before, which may be longer than the unit
    while place < stop and (rest := file.readline(READ)):
        place += len(rest)
        if rest.endswith(b"\n"):
            break
    return place, int(place > unit.start)


def blocks(unit: Unit, file: BinaryIO) -> Iterator[tuple[int, bytearray | DataError]]:
    """(lines of the unit before it, whole lines) of the lines that begin in the unit; or the error of one too long.

    The bytes are for who asks: they may be written to. Of several processes one at a time holds a large line, until it
    asks for what follows or its work is done.
    """
    place, number = _begin(unit, file)
    stop = math.inf if unit.stop is None else unit.stop
    held = bytearray()
    while place < stop:
        piece = file.read(int(min(BLOCK, stop - place)))
        if not piece:
            break
        cut = piece.rfind(b"\n") + 1
        held += piece[:cut] if cut else piece
        place += len(piece)
        if cut:
            ended = held.count(b"\n")  # before whoever reads them writes into them
            yield number, _bare(held, unit.start + number)
            number += ended
            held = bytearray(piece[cut:])
            turn.leave()
        elif len(held) > LINE:
            yield number, _long(unit, number)
            held = bytearray()
            turn.leave()
            place += _pass(file)
            number += 1
        elif len(held) > LARGE:
            turn.take()
    while held and not held.endswith(b"\n") and len(held) <= LINE and (piece := file.readline(READ)):
        held += piece
        if len(held) > LARGE:
            turn.take()
    if len(held) > LINE:
        yield number, _long(unit, number)
    elif held:
        yield number, _bare(held, unit.start + number)


def _bare(block: bytearray, place: int) -> bytearray:
    """A block less the byte order mark that a file may begin with."""
    if not place and block.startswith(BOM):
        del block[: len(BOM)]
    return block


def _long(unit: Unit, number: int) -> DataError:
    return DataError(
        f"{Place(unit, number + 1)}: a line of over {LINE >> 20} MB; cut the document, or make a text file of it"
    )


def _pass(file: BinaryIO) -> int:
    """Read to the end of a line; how many bytes that was."""
    size = 0
    while piece := file.readline(READ):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


def lines(unit: Unit, file: BinaryIO) -> Iterator[tuple[Place, bytes | DataError]]:
    """Lines that begin in the unit, but for blank ones."""
    for before, block in blocks(unit, file):
        if isinstance(block, DataError):
            yield Place(unit, before + 1), block
            continue
        start = 0
        for number in range(before + 1, before + 2 + block.count(b"\n")):
            end = block.find(b"\n", start) + 1 or len(block)
            line = bytes(memoryview(block)[start:end])
            start = end
            if line and not line.isspace():
                yield Place(unit, number), line
