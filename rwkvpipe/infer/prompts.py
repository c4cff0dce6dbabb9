"""Prompts out of a file."""

from pathlib import Path

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import read_jsonl
from rwkvpipe.infer.layout import Layout
from rwkvpipe.tokenizer.chat import ROLES


def read_prompts(path: str | Path, layout: Layout) -> list[str]:
    """What a model is to read: the rows of a JSONL file, `prompt` or `messages` of a talk, or the lines of a text.

    Empty lines of a text are passed over. Raises DataError naming the line that does not do.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".json"):
        try:
            found = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 at byte {error.start + 1} of the file; save it as UTF-8") from None
    else:
        found = [_asked(row, f"{path}:{number}", layout) for number, row in enumerate(read_jsonl(path), 1)]
    if not found:
        raise DataError(f"{path}: no prompts in it")
    return found


def _asked(row: dict, where: str, layout: Layout) -> str:
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: no text under `prompt`, and no turns under `messages`")
    for turn in messages:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise DataError(f"{where}: a turn has a role ({', '.join(ROLES)}) and a text under `content`")
    return layout.text(messages)
