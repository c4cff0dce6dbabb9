"""Rows as talks, told by their keys, and talks as ids of which some are learned.

A talk is a list of turns (role, content), of which those with `train: false` are read and not learned, and those with a
`weight` count so much. What is laid out by its author already has turns of roles that no row can name: `raw`, texts as
they stand, and `ids`, tokens.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from rwkvpipe.base.errors import DataError
from rwkvpipe.data.document import Document
from rwkvpipe.data.question import contents, question, words
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.chat import ROLES
from rwkvpipe.tokenizer.load import Tokenizer

SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SHAREGPT |= {"tool": "tool", "gpt_ignore": "assistant"}
UNLEARNED = -100  # a label that says so
# what rows of talks may be called without `columns`
KEYS = {"messages", "conversations", "input_ids", "labels", "prompt", "completion", "instruction", "input", "output"}
KEYS |= {"query", "response", "question", "answer", "options", "label", "text", "tools", "system", "history"}
NAMES = ("name", "tool_call_id")  # what the turn of a tool says of itself
LAID_OUT = ("tool_calls", "reasoning_content")  # what only a template knows how to write
MOST = 1e6  # weights are fp32 once they are packed


class Choices(Protocol):
    """Settings that say what of a talk is learned."""

    replies: Literal["all", "last"]
    labels: Literal["auto", "internal", "preshifted"]
    eod: bool
    template: str | None


def _content(turn: dict, column: str, place: object) -> str:
    """What is said in a turn: a text, or a list of texts as some chats keep it."""
    value = turn.get(column)
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        return "".join(words(part, "text", place) for part in value)
    return words(turn, column, place)


def _counted(turn: dict, role: str, place: object) -> dict:
    """What is to be kept of a turn's `train` and `weight`: nothing, where it counts as any other."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{place}: train is {train!r}; true and false are known")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < MOST
    ):
        raise DataError(f"{place}: weight is {weight!r}; it is a number from 0 up, below {MOST:,.0f}")
    if train is not None and weight is not None and train != bool(weight):
        raise DataError(f"{place}: train is {train} and weight {weight}; remove one")
    if role == "gpt_ignore" or train is False or weight == 0:
        return {"train": False}
    return {} if weight in (None, 1) else {"weight": float(weight)}


def _listed(value: Any, column: str, where: object) -> list[dict]:
    """Objects, as a list or as the JSON of one; none where there is nothing. Raises DataError for anything else."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{where}: `{column}` is a text that is no JSON; give a list of objects") from None
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{where}: `{column}` must be a list of objects; mend the row")
    return value


def equipped(found: Sequence[dict], row: dict, where: object, template: str | None) -> Sequence[dict]:
    """The turns with the row's tools: named by the system, or, where a template lays the talk out, given to it."""
    if found[0]["role"] not in ROLES:
        return found
    tools = _listed(row.get("tools"), "tools", where)
    for number, turn in enumerate(found, 1):
        name = next((name for name in LAID_OUT if name in turn), None)
        if template is None and name is not None:
            raise DataError(f"{where}: turn {number}: only a `template` can write `{name}`; name one, or give the text")
    if not tools:
        return found
    if template is None:
        return chat.with_tools(found, tools)
    return [{**found[0], "tools": tools}, *found[1:]]


def turns(value: Any, column: str, where: object) -> tuple[dict, ...]:
    """Messages, or the conversations of ShareGPT, checked. Raises DataError naming the turn."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: `{column}` must be a list of turns, each with role and content")
    found = []
    for number, turn in enumerate(value, 1):
        place = f"{where}: turn {number}"
        if not isinstance(turn, dict):
            raise DataError(f"{place} of `{column}` is no object with role and content")
        foreign = "from" in turn and "role" not in turn
        given = turn.get("from" if foreign else "role")
        role = SHAREGPT.get(given) if foreign and isinstance(given, str) else given
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"{place}: role is {given!r}; known: {', '.join(SHAREGPT if foreign else ROLES)}")
        key = "value" if foreign else "content"
        calls = _listed(turn.get("tool_calls"), "tool_calls", place)
        said = {"role": role, "content": "" if calls and not turn.get(key) else _content(turn, key, place)}
        said |= {"tool_calls": calls} if calls else {}
        said |= {"reasoning_content": thought} if isinstance(thought := turn.get(LAID_OUT[1]), str) and thought else {}
        said |= {name: turn[name] for name in NAMES if role == "tool" and isinstance(turn.get(name), str)}
        found.append(said | _counted(turn, given, place))
    return tuple(found)


def _completion(row: dict, where: object) -> tuple[dict, ...]:
    """A prompt with its completion: texts as they stand, or turns, of which those of the completion are learned."""
    if not isinstance(row["prompt"], list) and not isinstance(row["completion"], list):
        asked = {"role": "raw", "content": words(row, "prompt", where, least=0), "train": False}
        return asked, {"role": "raw", "content": words(row, "completion", where)}
    both = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[column]
        listed = value if isinstance(value, list) else [{"role": role, "content": words(row, column, where)}]
        both.append(turns(listed, column, where))
    return (*({**turn, "train": False} for turn in both[0]), *both[1])


def whole_numbers(value: Any, column: str, where: object, *, least: int = 0) -> list[int]:
    """A list of whole numbers from `least` up, not empty. Raises DataError for anything else."""
    whole = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    if not whole or not value or min(value) < least:
        raise DataError(f"{where}: `{column}` must be a list of whole numbers from {least} up; mend the row")
    return value


def _tokens(row: dict, where: object, shift: str) -> tuple[dict, ...]:
    """Ids with labels: each label that of its own position, or of the one after it (preshifted)."""
    ids, labels = row["input_ids"], row.get("labels")
    whole_numbers(ids, "input_ids", where)
    whole_numbers(labels, "labels", where, least=UNLEARNED)
    if len(ids) != len(labels):
        raise DataError(f"{where}: {len(ids)} `input_ids` with {len(labels)} `labels`; mend the row")
    wanted = [place for place, label in enumerate(labels) if label != UNLEARNED]
    own = all(labels[place] == ids[place] for place in wanted)
    next_ = all(labels[place] == ids[place + 1] for place in wanted if place + 1 < len(ids))
    if (shift == "internal" and not own) or (shift == "preshifted" and not next_) or not (own or next_):
        raise DataError(
            f"{where}: `labels` are neither those of the same positions nor of the next ones of `input_ids`"
            f" (labels: {shift}); a label is an id that is learned, or {UNLEARNED}"
        )
    if shift == "internal" or (shift == "auto" and own):
        marks = [int(label != UNLEARNED) for label in labels]
    else:
        marks, ids = [0, *(int(label != UNLEARNED) for label in labels)], [*ids, labels[-1]]
        if labels[-1] == UNLEARNED:
            marks, ids = marks[:-1], ids[:-1]
    return ({"role": "ids", "content": "", "ids": ids, "marks": marks},)


def _instruction(row: dict, where: object) -> tuple[dict, ...]:
    task = words(row, "instruction", where)
    if row.get("input"):
        task += "\n" + words(row, "input", where)
    said = [name for name in ("output", "response") if row.get(name) is not None]
    if len({str(row[name]) for name in said}) > 1:
        raise DataError(f"{where}: `output` and `response` say different things; remove one")
    return (*_history(row, where), *_asked(task, words(row, (said or ["output"])[0], where)))


def _query(row: dict, where: object) -> tuple[dict, ...]:
    return (*_history(row, where), *_asked(words(row, "query", where), words(row, "response", where)))


def _asked(asked: str, said: str) -> tuple[dict, ...]:
    return {"role": "user", "content": asked}, {"role": "assistant", "content": said}


def _history(row: dict, where: object) -> tuple[dict, ...]:
    """What was said before an Alpaca row: pairs of what was asked and what was answered."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text for text in pair)
        for pair in pairs
    ):
        raise DataError(f"{where}: `history` must be a list of pairs of texts, asked and answered; mend the row")
    return tuple(turn for pair in pairs for turn in _asked(*pair))


def _led(found: Sequence[dict], row: dict, where: object) -> Sequence[dict]:
    """The turns with what the row says under `system` before them."""
    if row.get("system") in (None, ""):
        return found
    first = {"role": "system", "content": words(row, "system", where)}
    if found[0]["role"] not in ROLES:
        raise DataError(f"{where}: `system` cannot stand before what is laid out already; write it there, or remove it")
    if found[0]["role"] == "system":
        if found[0]["content"] != first["content"]:
            raise DataError(f"{where}: `system` and the first turn say different things; remove one")
        return found
    return [first, *found]


def _forms(row: dict, where: object, shift: str) -> dict[str, Callable[[], tuple[dict, ...]]]:
    """What a row may be read as, by the keys that it has, whole forms only; if it has none, what it has a part of."""
    # a table has all columns in every row, some of them null
    has = {name for name, value in row.items() if value is not None}
    whole = {
        "messages": lambda: turns(row["messages"], "messages", where),
        "conversations": lambda: turns(row["conversations"], "conversations", where),
        "input_ids, labels": lambda: _tokens(row, where, shift),
        "prompt, completion": lambda: _completion(row, where),
        "instruction, output": lambda: _instruction(row, where),
        "instruction, response": lambda: _instruction(row, where),
        "query, response": lambda: _query(row, where),
    }
    found = {name: make for name, make in whole.items() if set(name.split(", ")) <= has}
    if {"instruction, output", "instruction, response"} <= set(found):
        found.pop("instruction, response")
    if "input_ids" in has:
        found = found or {"input_ids": whole["input_ids, labels"]}
    return found or ({"instruction": whole["instruction, output"]} if "instruction" in has else {})


def _one(row: dict, where: object, shift: str) -> tuple[dict, ...] | None:
    """The talk that a row is, None if its keys tell of none. Raises DataError where they tell of different ones."""
    forms = _forms(row, where, shift)
    if not forms:
        return None
    first, *others = (make() for make in forms.values())
    if any(other != first for other in others):
        raise DataError(
            f"{where}: {' and '.join(f'`{name}`' for name in forms)} make different talks; remove one, or say under"
            " `columns` what is meant"
        )
    return first


def recognised(row: dict, columns: Mapping[str, str], where: object, shift: str = "auto") -> Sequence[dict]:
    """The turns of a row, by the keys that it has; what `columns` names goes before what is recognised."""
    column = columns.get("messages", "messages")
    asked = "question" in columns or "answer" in columns
    if columns and column in row and row[column] is not None and not asked:
        return turns(row[column], column, where)
    if not columns:
        found = _one(row, where, shift)
        if found is not None:
            return _led(found, row, where)
        if row.get("text") is not None and all(row.get(name) is None for name in ("question", "answer")):
            return ({"role": "raw", "content": words(row, "text", where)},)
    if not asked and columns.get("question", "question") not in row:
        raise DataError(f"{where}: no `{column}`, `question` or other keys of a talk; {contents(row)}")
    found = question(row, columns, where).talk()
    return found if columns else _led(found, row, where)


def talk(row: dict, columns: Mapping[str, str], where: object, choices: Choices | None = None) -> Document:
    """A row as a talk, by its keys, or by `columns` (our name to the file's).

    Known are `messages`; ShareGPT's `conversations`; `input_ids` with `labels`; `prompt` with `completion`, texts or
    turns; Alpaca's `instruction`, `input` and `output`; `query` with `response`; a question with its answer; `text`.
    `tools` of a row, objects or their JSON, are named in the talk; its `system` is the first turn, and the pairs of an
    Alpaca row's `history` stand before what it asks.
    Raises DataError naming `where`.
    """
    found = recognised(row, columns, where, choices.labels if choices else "auto")
    found = equipped(found, row, where, choices.template if choices else None)
    if choices and choices.replies == "last":
        last = max((n for n, turn in enumerate(found) if turn["role"] == "assistant"), default=-1)
        kept = ("assistant", "raw", "ids")
        found = [
            turn if n == last or turn["role"] in kept[1:] or turn["role"] not in kept else {**turn, "train": False}
            for n, turn in enumerate(found)
        ]
    return Document(messages=tuple(found), origin=where)


class Layout:
    """Talks as ids (n,) with marks (n,), 1 or a weight over what is learned: as released models, or by a template."""

    def __init__(self, choices: Choices):
        self.render: Callable = chat.render
        if choices.template:
            from rwkvpipe.tokenizer.template import load_template  # only now: workers that need none hold less

            self.render = load_template(choices.template).render
        self.eod = choices.eod

    def __call__(self, messages: Sequence[dict], tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
        """Ids and marks of a talk. What its author laid out, and with `eod` every talk, ends with the end of texts."""
        if messages[0]["role"] == "ids":
            for number in set(messages[0]["ids"]):
                if number != tokenizer.eos and not tokenizer.owns(number):
                    raise DataError(
                        f"`input_ids` holds the id {number}, which stands for nothing in the vocabulary of"
                        f" {tokenizer.size}; name the tokenizer that made the row"
                    )
            return messages[0]["ids"], messages[0]["marks"]
        raw = messages[0]["role"] == "raw"
        ids, mask = (chat.render if raw else self.render)(messages, tokenizer)
        if (raw or self.eod) and tokenizer.eos is not None:
            return [*ids, tokenizer.eos], [*mask, 1]
        return ids, mask
