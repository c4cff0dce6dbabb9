"""Turns of talk as text and ids: `User: ...`, blank line, `Assistant: ...`, blank line.

The form in which released RWKV models were tuned. Each part is encoded by itself, so that the turn's end is the same
tokens whatever stands before it, and the space before an answer belongs to the answer.
"""

import re
from collections.abc import Iterator, Sequence

from rwkvpipe.tokenizer.load import Tokenizer

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
TURN_END = "\n\n"


def clean(text: str) -> str:
    """A user's or system's text as it may stand in a turn: no blank lines, which would end it, no outer space."""
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


def segments(messages: Sequence[dict]) -> Iterator[tuple[str, bool]]:
    """(text, learned) parts of a talk; of a role in ROLES each. What the assistant says stays as it is."""
    for message in messages:
        name = ROLES[message["role"]]
        if message["role"] == "assistant":
            yield f"{name}:", False
            yield f" {message['content']}", True
            yield TURN_END, True
        else:
            yield f"{name}: {clean(message['content'])}", False
            yield TURN_END, False


def text(messages: Sequence[dict]) -> str:
    """A talk as one text."""
    return "".join(part for part, _ in segments(messages))


def prompt(messages: Sequence[dict]) -> str:
    """What a model reads before it answers: the talk so far and `Assistant:`, without a space after it."""
    return text(messages) + "Assistant:"


def render(messages: Sequence[dict], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of a talk, and a mask of equal length: 1 over the assistant's words and the end of its turn."""
    ids: list[int] = []
    mask: list[int] = []
    for part, learned in segments(messages):
        found = tokenizer.encode(part)
        ids += found
        mask += [int(learned)] * len(found)
    return ids, mask
