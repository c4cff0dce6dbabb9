"""Pairs of answers to one prompt, of which one is preferred."""

import re
from collections.abc import Mapping
from typing import Any

from rwkvpipe.base.errors import DataError
from rwkvpipe.data.question import contents
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.load import Tokenizer

PARTS = ("prompt", "chosen", "rejected")
Ids = tuple[list[int], list[int]]
"""Ids of a text, and which of them are learned."""


def _turns(value: Any, role: str, name: str) -> list[dict]:
    """A list of turns, checked; a text is one turn of `role`. Raises DataError naming the column and the turn."""
    if not isinstance(value, list):
        value = [{"role": role, "content": value}]
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict) or turn.get("role") not in chat.ROLES or not _text(turn.get("content")):
            raise DataError(f"turn {number} of `{name}` is no object with role ({', '.join(chat.ROLES)}) and content")
        for key in ("weight", "train"):
            if turn.get(key) not in (None, 1):  # True is 1
                raise DataError(
                    f"turn {number} of `{name}` has {key} {turn[key]!r}: answers are judged whole; remove it"
                )
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _text(value: Any) -> bool:
    """Whether it is a text that is not empty and can be written as UTF-8."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


def _common(one: list[dict], other: list[dict]) -> int:
    """How many turns two talks begin with alike."""
    apart = (n for n, turns in enumerate(zip(one, other, strict=False)) if turns[0] != turns[1])
    return next(apart, min(len(one), len(other)))


def _parted(prompt: list[dict] | None, answers: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Prompt and answers of talks that hold the prompt themselves, or whose prompt is what both begin with.

    Raises DataError for talks that begin otherwise than with the prompt.
    """
    chosen, rejected = answers.values()
    same = _common(chosen, rejected)
    if prompt is None:
        begun, place = chosen[:same], same
    elif all(talk[0]["role"] == "assistant" for talk in (chosen, rejected)):
        begun, place = prompt, 0
    elif chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        begun, place = prompt, len(prompt)
    else:  # such as a system's turn before it
        begun, place = (chosen[:same], same) if prompt and chosen[:same][-len(prompt) :] == prompt else ([], 0)
    found = {"prompt": begun} | {name: talk[place:] for name, talk in answers.items()}
    for name, talk in found.items():
        if not talk or (name != "prompt" and talk[0]["role"] != "assistant"):
            what = "with the same turns, which then are the prompt" if prompt is None else "with it, or with the answer"
            raise DataError(f"`chosen` and `rejected` are talks that do not both begin {what}; mend or remove the row")
    return found


def pair(row: dict, columns: Mapping[str, str], where: object) -> dict[str, Any]:
    """A row as prompt, chosen and rejected: all three texts, or all three lists of turns.

    `columns` is our name to the file's. Where one is a list of turns, a text beside it becomes a turn: the prompt the
    user's, an answer the assistant's. Answers may be whole talks: of these the prompt is taken off, or, where the row
    has none, found, as what both begin with. Raises DataError naming `where` and the column.
    """
    found = {}
    talks = all(isinstance(row.get(columns.get(name, name)), list) for name in PARTS[1:])
    for name in PARTS:
        column = columns.get(name, name)
        if name == column == "prompt" and talks and row.get(column) is None:
            continue
        if column not in row:
            raise DataError(f"{where}: no `{column}`; {contents(row)} (columns says)")
        found[name] = row[column]
    try:
        if any(isinstance(value, list) for value in found.values()):
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            found = {name: _turns(value, roles[name], columns.get(name, name)) for name, value in found.items()}
            for name in ("chosen", "rejected"):
                if not found[name] or found[name][-1]["role"] != "assistant":
                    raise DataError(f"`{columns.get(name, name)}` does not end with a turn of the assistant")
            if found["chosen"] != found["rejected"]:
                found = _parted(found.pop("prompt", None), found)
        for name, value in found.items():
            if not isinstance(value, list) and not _text(value):
                raise DataError(f"`{columns.get(name, name)}` is no text, or an empty one")
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if found["chosen"] == found["rejected"]:
        raise DataError(f"{where}: the chosen answer is the rejected one; remove the row")
    return found


def encoded(row: dict[str, Any], tokenizer: Tokenizer) -> tuple[Ids, Ids]:
    """The chosen and the rejected text of a pair with their prompt: ids, and a mask of 1 over the answer's.

    Texts stand as they are, the prompt by itself and the answer by itself, closed by the id that ends documents.
    Turns are laid out as talks are, each of the assistant's in the answer learned.
    """
    if isinstance(row["prompt"], str):
        end = [] if tokenizer.eos is None else [tokenizer.eos]
        first = tokenizer.encode(row["prompt"])
        answers = [[*tokenizer.encode(row[name]), *end] for name in PARTS[1:]]
        both = [([*first, *answer], [0] * len(first) + [1] * len(answer)) for answer in answers]
    else:
        first = chat.render(row["prompt"], tokenizer)[0]
        answers = [chat.render(row[name], tokenizer) for name in PARTS[1:]]
        both = [([*first, *ids], [0] * len(first) + mask) for ids, mask in answers]
    return both[0], both[1]
