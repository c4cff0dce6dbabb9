"""Where a row keeps a value: dotted paths with indices and fan-out, and templates that put values together.

`data.paragraphs[*].qas[0]."an odd.name"`: names are separated by dots, quotes keep a name's dots and brackets, `[n]` is
an item of a list (`[-1]` the last), `[*]` makes a record of each item.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from rwkvpipe.base.errors import ConfigError, DataError

NAMES = ("question", "answer", "options", "label", "messages", "text", "prompt", "chosen", "rejected")
STEP = re.compile(r'(?P<dot>\.)?(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<name>[^."\[\]]+))|\[(?P<index>\*|-?\d{1,9})\]')
SLOT = re.compile(r"\{(\w+)\}")
EACH = None  # the step of [*]
MISSING = object()
Steps = tuple[str | int | None, ...]


def steps(path: str) -> Steps:
    """A path taken apart. Raises ConfigError saying where it breaks the grammar."""
    found: list[str | int | None] = []
    place = 0
    while place < len(path):
        step = STEP.match(path, place)
        # names stand after dots, but for the first; an index stands after a name
        if not step or (bool(step["dot"]) == (place == 0) if step["index"] is None else place == 0):
            break
        if step["index"] is not None:
            found.append(EACH if step["index"] == "*" else int(step["index"]))
        else:
            found.append(step["name"] or re.sub(r"\\(.)", r"\1", step["quoted"] or ""))
        place = step.end()
    if place < len(path) or not path:
        raise ConfigError(
            f"{path!r}: no path at character {place + 1}; names are separated by dots, items are [0] or [*], and a name"
            ' with dots, brackets or quotes stands in quotes: a.list[0]."odd.name"'
        )
    return tuple(found)


def _at(value: Any, path: Steps) -> Any:
    """What lies at the end of a path without fan-out, or MISSING."""
    for step in path:
        named = isinstance(step, str) and isinstance(value, dict) and step in value
        if not named and not (isinstance(step, int) and isinstance(value, list) and -len(value) <= step < len(value)):
            return MISSING
        value = value[step]
    return value


def slots(template: str) -> list[str]:
    """Names that a template puts in; a brace that holds no name is text."""
    return SLOT.findall(template)


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with its names replaced, in one go: braces inside values are harmless."""
    return SLOT.sub(lambda found: values[found[1]], template)


class Columns:
    """Our names of values to where rows keep them, with templates that make one of several.

    Raises ConfigError for a name that means nothing, a path that is none, and two lists that are fanned out side by
    side.
    """

    def __init__(self, columns: Mapping[str, str], templates: Mapping[str, str] | None = None):
        self.given, self.templates = dict(columns), dict(templates or {})
        self._check()
        self.paths = {path: steps(path) for path in self.given.values()}
        # what stands inside a row is looked up and laid beside the row's own columns, under the path
        self.inside = {path: found for path, found in self.paths.items() if found != (path,)}
        stars = {found[: place + 1] for found in self.paths.values() for place, s in enumerate(found) if s is EACH}
        self.fans = sorted(stars, key=len)
        for short, long in zip(self.fans, self.fans[1:], strict=False):
            if long[: len(short)] != short:
                raise ConfigError("columns: two lists are fanned out by [*], and neither stands in the other")

    def _check(self) -> None:
        used = {name for template in self.templates.values() for name in slots(template)}
        for key, names, known in (
            ("columns", self.given, {*NAMES, *used}),
            ("templates", self.templates, set(NAMES)),
            ("templates", used, {*NAMES, *self.given}),
        ):
            for name in names:
                if name not in known:
                    near = difflib.get_close_matches(name, sorted(known), n=1)
                    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
                    if names is used:
                        hint += f", or say where it stands: columns: {{{name}: {name}}}"
                    raise ConfigError(f"{key}.{name}: no such name; {hint}")

    @cached_property
    def names(self) -> dict[str, str]:
        """Our name to the key of a record that holds it."""
        return self.given | {name: f"templates.{name}" for name in self.templates}

    @cached_property
    def tops(self) -> set[str]:
        """The columns of a row that these need."""
        named = {str(found[0]) for found in self.paths.values()}
        return named | {name for text in self.templates.values() for name in slots(text) if name not in self.given}

    def records(self, row: dict, where: object) -> Iterator[tuple[object, dict]]:
        """(where, record) of a row: itself, or one for each item that `[*]` reaches, with what was looked up in it.

        Raises DataError where there is no list to fan out.
        """
        if not self.inside:
            yield where, row
            return
        plain = {path: value for path, found in self.inside.items() if EACH not in found
                 and (value := _at(row, found)) is not MISSING}  # fmt: skip
        if not self.fans:
            yield where, row | plain
            return
        for number, found in enumerate(self._fanned(row, 0, where), 1):
            yield Record(where, number), row | plain | found

    def _fanned(self, value: Any, depth: int, where: object) -> Iterator[dict]:
        """Values under the list of fan `depth`, which stands in `value`, the item of the fan before it."""
        before, here = self.fans[depth - 1] if depth else (), self.fans[depth]
        items = _at(value, here[len(before) : -1])
        if not isinstance(items, list):
            shown = "missing" if items is MISSING else "null" if items is None else f"a {type(items).__name__}"
            raise DataError(f"{where}: `{written(here)}` needs a list, which is {shown}; mend columns, or the row")
        last = depth + 1 == len(self.fans)
        for item in items:
            found = {}
            for path, parts in self.inside.items():
                if parts[: len(here)] == here and EACH not in parts[len(here) :]:
                    reached = _at(item, parts[len(here) :])
                    if reached is not MISSING:
                        found[path] = reached
            if last:
                yield found
            else:
                for more in self._fanned(item, depth + 1, where):
                    yield found | more


def written(path: Steps) -> str:
    """Steps as a path again."""
    parts = ["[*]" if s is EACH else f"[{s}]" if isinstance(s, int) else f".{s}" for s in path]
    return "".join(parts).removeprefix(".")


class Record:
    """Where a record came from: its row and its number in it."""

    def __init__(self, row: object, number: int):
        self.row, self.number = row, number

    def __str__(self) -> str:
        return f"{self.row}: record {self.number}"
