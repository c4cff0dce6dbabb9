"""A long JSON value read piece by piece: the items of a list, or of the list that an object holds under a name."""

import codecs
import json
from collections.abc import Iterator, Set
from typing import Any, BinaryIO

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import unreadable
from rwkvpipe.data.unit import Place, Unit

ITEM = 1 << 26  # characters of one item at most
READ = 1 << 18
MOST = 1 << 26  # bytes that are read at once at most
SPACE = " \t\r\n"


class Pieces:
    """A JSON text of which a part is held. Raises DataError naming the line where it is broken."""

    def __init__(self, unit: Unit, file: BinaryIO):
        self.unit, self.file = unit, file
        self.text, self.place, self.end = "", 0, False
        self.lines, self.counted = 1, 0  # the line of the character `counted` of the text
        self.size = READ
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.scan = json.JSONDecoder().raw_decode

    def line(self, place: int) -> int:
        """The line of a place of the text that is held."""
        if place < self.counted:
            return self.lines - self.text.count("\n", place, self.counted)
        self.lines += self.text.count("\n", self.counted, place)
        self.counted = place
        return self.lines

    def fault(self, problem: str, place: int) -> DataError:
        """The error at a place of the text that is held."""
        return DataError(f"{self.unit.path}:{self.line(place)}: not JSON: {problem}; mend it")

    def more(self) -> None:
        """Hold one more piece, and drop what was read. Raises DataError when there is none."""
        if self.end:
            raise self.fault("it has no end", len(self.text))
        self.line(self.place)
        self.text, self.place, self.counted = self.text[self.place :], 0, 0
        piece = self.file.read(self.size)
        self.end = not piece
        try:
            self.text += self.decode(piece, self.end)
        except UnicodeDecodeError as error:
            line = self.line(len(self.text)) + error.object.count(b"\n", 0, error.start)
            raise DataError(f"{self.unit.path}:{line}: not UTF-8; save it as UTF-8") from None
        self.size = min(2 * self.size, MOST)  # so that a long item is tried few times

    def mark(self) -> str:
        """The next character that is no space."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in SPACE:
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            self.more()

    def expect(self, marks: str, what: str) -> str:
        """One of these characters, which is passed over."""
        found = self.mark()
        if found not in marks:
            raise self.fault(f"{what} is needed", self.place)
        self.place += 1
        return found

    def item(self) -> Any:
        """The value that stands here."""
        while True:
            try:
                value, place = self.scan(self.text, self.place)
            except json.JSONDecodeError as error:
                # a piece may end in the middle of an item, at most so many characters after where it is noticed
                broken = error.pos < len(self.text) - 12 and not error.msg.startswith("Unterminated")
                if self.end or broken:
                    raise self.fault(error.msg, error.pos) from None
                if len(self.text) - self.place > ITEM:
                    raise self.fault(f"an item of over {ITEM >> 20} million characters", self.place) from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.unit.path}: {unreadable(error)}") from None
            else:
                # a number may go on in the next piece, also behind a dot or an e+ that is held already
                if self.end or isinstance(value, dict | list | str) or place < len(self.text) - 3:
                    self.place, self.size = place, READ
                    return value
            self.more()

    def items(self) -> Iterator[tuple[int, Any]]:
        """(line, item) of the list that stands here."""
        self.expect("[", "a list")
        if self.mark() == "]":
            self.place += 1
            return
        while True:
            self.mark()
            line = self.line(self.place)
            yield line, self.item()
            if self.expect(",]", "a comma, or the end of the list,") == "]":
                return

    def members(self) -> Iterator[str]:
        """Names of the object that stands here; whoever asks reads each one's value before the next."""
        self.expect("{", "an object")
        if self.mark() == "}":
            self.place += 1
            return
        while True:
            if self.mark() != '"':
                raise self.fault("a name in quotes is needed", self.place)
            name = self.item()
            self.expect(":", "a colon")
            self.mark()
            yield name
            if self.expect(",}", "a comma, or the end of the object,") == "}":
                return

    def done(self) -> None:
        """Raise DataError where more follows than space."""
        if self.text[self.place :].strip() or self.file.read(READ).strip():
            raise self.fault("more after the end", self.place)


def list_rows(unit: Unit, file: BinaryIO) -> Iterator[tuple[Place, Any]]:
    """(place, item) of a JSON list."""
    pieces = Pieces(unit, file)
    for number, (_, value) in enumerate(pieces.items(), 1):
        yield Place(unit, number, "item"), value
    pieces.done()


def object_rows(unit: Unit, file: BinaryIO, name: str, others: dict) -> Iterator[tuple[Place, dict]]:
    """(place, row) of each item of the list that a JSON object holds under `name`: `others`, and a list of that item.

    What stands there and is no list makes one row.
    """
    pieces, found = Pieces(unit, file), False
    for member in pieces.members():
        if member != name:
            pieces.item()
            continue
        found, line = True, pieces.line(pieces.place)
        if pieces.mark() != "[":
            yield Place(unit, line), others | {name: pieces.item()}
            continue
        for line, value in pieces.items():
            yield Place(unit, line), others | {name: [value]}
    pieces.done()
    if not found:
        yield Place(unit, 1), others


def other_members(unit: Unit, file: BinaryIO, name: str, needed: Set[str] | None) -> dict:
    """The members of a JSON object under other names than `name`, of those that are needed."""
    pieces, found = Pieces(unit, file), {}
    for member in pieces.members():
        if member == name and pieces.mark() == "[":
            for _ in pieces.items():
                pass
        elif (value := pieces.item()) is not None and (needed is None or member in needed):
            found[member] = value
    return found
