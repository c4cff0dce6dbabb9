"""How a talk is laid out for a model to answer: in the form of released models, or by a chat template of a hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from rwkvpipe.base.errors import ConfigError
from rwkvpipe.base.files import read_json
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.template import FILES, ChatTemplate, load_template

OWN = "rwkv"  # the name of the form of released models
ANSWER = "an answer"
TEMPLATE = (
    f"a Jinja template for talks, or a folder with one; left out, the model's or vocabulary's, if any; {OWN}: none"
)


class Layout:
    """The form of released models in a mode, or a template, which knows itself how answers begin and end."""

    def __init__(self, mode: str = "plain", template: ChatTemplate | None = None):
        if template and mode != "plain":
            raise ConfigError(
                f"--mode {mode}: {template.where} lays talks out, and has no modes; give --template {OWN}"
            )
        self.mode, self.template = mode, template

    def text(self, messages: Sequence[dict]) -> str:
        """What the model reads before it answers. Raises DataError for what a template refuses."""
        return self.template.text(messages, prompt=True) if self.template else chat.prompt(messages, self.mode)

    def stops(self) -> tuple[str, ...]:
        """What comes after an answer, and so ends it."""
        if self.template is None:
            return (chat.TURN_END,)
        said = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": ANSWER}]
        after = self.template.text(said).rpartition(ANSWER)[2]
        return tuple(filter(None, [after.strip() or after]))

    def special(self) -> dict[str, int]:
        """Words that a template may write which are one id each, whatever the vocabulary makes of their letters."""
        added = _described(Path(self.template.where).parent).get("added_tokens_decoder") if self.template else None
        found = added.items() if isinstance(added, dict) else ()
        words = {word.get("content"): number for number, word in found if isinstance(word, dict)}
        return {w: int(n) for w, n in words.items() if w and isinstance(w, str) and re.fullmatch("[0-9]{1,9}", n)}


def carried(path: str | Path) -> ChatTemplate | None:
    """The chat template that lies beside weights or a vocabulary, if one does. Raises DataError for a broken one."""
    if not Path(path).exists():  # the name of a vocabulary
        return None
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    described = _described(folder)
    return load_template(folder) if (folder / FILES[0]).is_file() or described.get("chat_template") else None


def _described(folder: Path) -> dict:
    found = read_json(folder / FILES[1]) if (folder / FILES[1]).is_file() else {}
    return found if isinstance(found, dict) else {}


def find_layout(mode: str, template: str | None, *places: str) -> Layout:
    """The layout that was asked for by name or path; else by the template of the first place that carries one."""
    if template == OWN or (template is None and mode != "plain"):
        return Layout(mode)
    if template is not None:
        return Layout(mode, load_template(template))
    return Layout(mode, next(filter(None, map(carried, places)), None))
