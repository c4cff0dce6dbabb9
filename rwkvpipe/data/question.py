"""Rows of files as questions, each checked, under the names that their authors chose."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rwkvpipe.base.column import NAMES, Columns, fill, slots
from rwkvpipe.base.errors import DataError
from rwkvpipe.data.document import Document
from rwkvpipe.tokenizer.chat import ROLES, TURN_END, text


def contents(row: dict) -> str:
    """What a row has, for people who look for something else in it."""
    inner = next(
        (name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)), ""
    )
    more = f"; each item of `{inner}` is a row to columns such as {inner}[*].question" if inner else ""
    return f"the row has {', '.join(row) or 'nothing'}{more}"


def words(row: dict, column: str, where: object, *, least: int = 1, needed: str = "text") -> str:
    """A text of a row. Raises DataError when it is missing, not what is needed, no UTF-8, or shorter than `least`."""
    if column not in row:
        raise DataError(f"{where}: no `{column}`; {contents(row)} (columns or field says)")
    value = row[column]
    if isinstance(value, bytes):  # as some tables keep texts
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: `{column}` is not UTF-8 at byte {error.start}; mend it") from None
    if not isinstance(value, str):
        shown = "null" if value is None else f"{type(value).__name__} {str(value)[:30]}"
        raise DataError(f"{where}: `{column}` is {shown}, {needed} is needed")
    if len(value.strip()) < least:
        raise DataError(f"{where}: `{column}` is empty; mend or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: `{column}` has half a surrogate pair at {error.start + 1}; mend it") from None
    return value


def _options(row: dict, column: str, where: object) -> list[str] | None:
    value = row.get(column)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(o, str) and o.strip() for o in value):
        raise DataError(f"{where}: `{column}` must be a list of two texts or more, none empty")
    return [words({column: option}, column, where) for option in value]


def _index(value: Any, options: list[str], where: object) -> int:
    """Which option is meant: a number counts from 0; a text is an option, a letter, or a number."""
    meant = value
    if isinstance(value, str):
        found = [number for number, option in enumerate(options) if option.strip() == value.strip()]
        if found:
            return found[0]
        word = value.strip().strip("().").upper()
        if len(word) == 1 and word.isascii() and word.isalpha():
            meant = ord(word) - ord("A")
        elif word.isascii() and word.isdigit():
            meant = int(word[:9])
    if isinstance(meant, int) and not isinstance(meant, bool) and 0 <= meant < len(options):
        return meant
    raise DataError(
        f"{where}: {str(value)[:40]!r} is none of the {len(options)} options; the answer is an option's text,"
        " its letter, or its number counted from 0"
    )


def _answer(value: Any, column: str, where: object) -> str:
    """An answer as text; a whole number becomes its digits."""
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return words({column: value}, column, where)


def _prompt(row: dict, column: str, where: object) -> str:
    """What is asked: a text, or turns of talk that begin with the user's, whose name a stage's prompt writes."""
    value = row.get(column)
    if not isinstance(value, list):
        return words(row, column, where)
    known = all(isinstance(turn, dict) and turn.get("role") in ROLES for turn in value)
    if not value or not known or value[0]["role"] != "user" or value[-1]["role"] != "user":
        raise DataError(
            f"{where}: `{column}` is a list, but not of turns (role, content) from the user's first to the user's last;"
            " give such turns, or a text"
        )
    said = [{"role": turn["role"], "content": words(turn, "content", where)} for turn in value]
    return text(said).removeprefix("User: ").removesuffix(TURN_END)


def _plain(value: object) -> bool:
    """Whether JSON holds it as it is."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(each) for key, each in value.items())
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def question(row: dict, columns: Mapping[str, str], where: object, *, open_: bool = False) -> Document:
    """A row with a question and its answer (with options: which of them) as a document.

    `columns` is our name to the file's. An `open_` question may have no answer: what judges it may need none.
    Raises DataError naming `where` and the column.
    """
    column = {name: columns.get(name, name) for name in NAMES}
    more = {name: value for name, value in row.items() if name not in (*NAMES, *column.values()) and _plain(value)}
    if "question" not in columns and column["question"] not in row and "prompt" in row:
        column["question"] = "prompt"
    asked = _prompt(row, column["question"], where)
    options = _options(row, column["options"], where)
    if column["options"] in columns.values() and options is None:
        raise DataError(f"{where}: no `{column['options']}`, which columns.options names")
    given, label = row.get(column["answer"]), row.get(column["label"])
    if options is None:
        if given is None and open_ and "answer" not in columns:
            return Document(question=asked, more=more, origin=where)
        if given is None:
            words(row, column["answer"], where)  # says what is wrong
        return Document(question=asked, answer=_answer(given, column["answer"], where), more=more, origin=where)
    if given is None and label is None:
        raise DataError(f"{where}: neither `{column['answer']}` nor `{column['label']}` says which option is right")
    right = _index(given if label is None else label, options, where)
    if label is not None and isinstance(given, str) and given in options and given != options[right]:
        raise DataError(f"{where}: `{column['answer']}` and `{column['label']}` name different options")
    found = Document(question=asked, answer=options[right], options=tuple(options), label=right, origin=where)
    return replace(found, more=more)


def filled(record: dict, columns: Columns, where: object) -> dict:
    """A record with what templates make of it, under their names. Raises DataError naming what is missing."""
    if not columns.templates:
        return record
    used = {name for template in columns.templates.values() for name in slots(template)}
    values = {}
    for name in used:
        column = columns.given.get(name, name)
        values[name] = _answer(record[column], column, where) if column in record else words(record, column, where)
    made = {f"templates.{name}": fill(template, values) for name, template in columns.templates.items()}
    return record | made
