"""Turns of talk as text and ids: `User: ...`, blank line, `Assistant: ...`, blank line.

The form in which released RWKV models were tuned. Each part is encoded by itself, so that the turn's end is the same
tokens whatever stands before it, and the space before an answer belongs to the answer.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rwkvpipe.base.errors import DataError
from rwkvpipe.tokenizer.load import Tokenizer

ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "User"}
TURN_END = "\n\n"
RESULT = "Function output:"  # how a user's turn begins that gives what a tool has found
CALL = "Return only a JSON function call."  # what the system says after it has listed the tools
# mode of a prompt: what is added to the last turn of the user, and what the answer begins with. The `>` that closes a
# tag is left to the model: `>` and what follows it are one token
MODES = {
    "plain": ("", ""),
    "think": ("", " <think"),
    "fake_think": ("", " <think></think"),
    "fake_think_newline": ("", " <think>\n</think"),
    "think_some": (" think", " <think"),
    "think_a_bit": (" think a bit", " <think"),
    "think_a_lot": (" think a lot", " <think"),
    "tools": ("", " ```json"),
}


def clean(text: str) -> str:
    """A user's or system's text as it may stand in a turn: no blank lines, which would end it, no outer space."""
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


def _said(message: Mapping) -> str:
    words = clean(message["content"])
    return f"{RESULT}\n{words}" if message["role"] == "tool" and not words.startswith(RESULT) else words


def weight(message: Mapping) -> float:
    """How much a turn counts in the loss: 0 with `train: false`, else its `weight`, which is 1 if it has none."""
    return message.get("weight", 1) if message.get("train", True) else 0


def segments(messages: Sequence[dict]) -> Iterator[tuple[str, float]]:
    """(text, weight) parts of a talk; of a role in ROLES each. What the assistant says stays as it is.

    A weight of 0 is not learned. A turn of the role raw is text that stands as it is.
    """
    for message in messages:
        learned = weight(message)
        if message["role"] in ("raw", "ids"):
            yield message["content"], learned
            continue
        name = ROLES[message["role"]]
        if message["role"] == "assistant":
            yield f"{name}:", 0
            yield f" {message['content']}", learned
            yield TURN_END, learned
        else:
            yield f"{name}: {_said(message)}", 0
            yield TURN_END, 0


def text(messages: Sequence[dict]) -> str:
    """A talk as one text."""
    return "".join(part for part, _ in segments(messages))


def with_tools(messages: Sequence[dict], tools: Sequence[Mapping]) -> list[dict]:
    """The talk with tools (JSON descriptions) named first, as models were taught to call them; ask in mode `tools`."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    own = [message["content"] for message in messages if message["role"] == "system"]
    system = {"role": "system", "content": "\n".join([*own, "Tools:", listed, CALL])}
    return [system, *(message for message in messages if message["role"] != "system")]


def instruction(asked: str, given: str = "") -> str:
    """The form of the World series: what is asked, what it is asked of, and room for the response."""
    parts = [f"Instruction: {clean(asked)}", *([f"Input: {clean(given)}"] if given.strip() else []), "Response:"]
    return TURN_END.join(parts)


def prompt(messages: Sequence[dict], mode: str = "plain") -> str:
    """What a model reads before it answers: the talk so far and `Assistant:`, without a space after it.

    `mode` is one of MODES: whether and how long it is to think, or that it is to call a tool. Raises DataError for
    another one.
    """
    if mode not in MODES:
        raise DataError(f"mode: {mode!r} is none of {', '.join(MODES)}")
    asked, begun = MODES[mode]
    messages = list(messages)
    if asked and messages and messages[-1]["role"] == "user":
        messages[-1] = {**messages[-1], "content": clean(messages[-1]["content"]) + asked}
    return text(messages) + "Assistant:" + begun


def laid(parts: Iterable[tuple[str, float]], tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Ids of (text, weight) parts one after another, and the weight of each id."""
    ids: list[int] = []
    mask: list[float] = []
    for part, learned in parts:
        found = tokenizer.encode(part)
        ids += found
        mask += [learned] * len(found)
    return ids, mask


def render(messages: Sequence[dict], tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Ids of a talk, and a mask of equal length: 1, or the turn's weight, over the assistant's words."""
    return laid(segments(messages), tokenizer)
