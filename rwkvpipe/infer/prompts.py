"""Prompts out of a file."""

from pathlib import Path

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import read_jsonl
from rwkvpipe.data.talk import equipped, turns
from rwkvpipe.infer.layout import Layout
from rwkvpipe.tokenizer.byte import utf8


def read_prompts(path: str | Path, layout: Layout) -> list[str]:
    """What a model is to read: the rows of a JSONL file, `prompt` or `messages` of a talk, or the lines of a text.

    Talks, and `tools` beside them, are checked and laid out as those that are learned from. Empty lines of a text are
    passed over. Raises DataError naming the line that does not do.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".json"):
        try:
            found = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 at byte {error.start + 1} of the file; save it as UTF-8") from None
    else:
        found = [_asked(row, f"{path}:{number}", layout) for number, row in enumerate(read_jsonl(path), 1)]
    if not found:
        raise DataError(f"{path}: no prompts in it")
    return found


def _asked(row: dict, where: str, layout: Layout) -> str:
    prompt, messages = row.get("prompt"), row.get("messages")
    if isinstance(prompt, str) and messages:
        raise DataError(f"{where}: `prompt` and `messages`; remove one")
    if not isinstance(prompt, str) and not isinstance(messages, list):
        raise DataError(f"{where}: no text under `prompt`, and no turns under `messages`")
    if isinstance(prompt, str):
        return _written(prompt, where)
    found = turns(messages, "messages", where)
    return layout.text(equipped(found, row, where, layout.template and layout.template.where))


def _written(prompt: str, where: str) -> str:
    try:
        utf8(prompt)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return prompt
