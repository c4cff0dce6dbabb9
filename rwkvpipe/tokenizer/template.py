"""Talks laid out by a Jinja template, as folders of hubs bring one; it runs in jinja2's immutable sandbox."""

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import read_json
from rwkvpipe.tokenizer.load import Tokenizer

WIDENING = ("center", "ljust", "rjust", "zfill", "expandtabs")
LONGEST = 1 << 22  # characters that a template may write, or make of one text by repeating it
FILES = ("chat_template.jinja", "tokenizer_config.json")


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, in which nothing grows without bounds either."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also not what widens a text to any size."""
        return attr not in WIDENING and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        """`*` and `**`, but of small things; `%`, but not to any width."""
        if operator == "%" and isinstance(left, str) and re.search(r"\*|\d{4}", left):
            raise TemplateError("% with such widths is not allowed")
        sized = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        numbers = [side for side in (left, right) if isinstance(side, int)]
        if (sized and numbers and sized[0] * abs(numbers[0]) > LONGEST) or (operator == "**" and max(numbers) > 64):
            raise TemplateError(f"{operator} makes something too large")
        return super().call_binop(context, operator, left, right)


def _complain(message: str) -> NoReturn:
    raise TemplateError(message)


def _json(value: Any, indent: int | None = None, **_: Any) -> str:
    # not jinja2's own, which writes for HTML
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _environment() -> _Sandbox:
    found = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    found.filters["tojson"] = _json
    found.globals["raise_exception"] = _complain
    found.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return found


class ChatTemplate:
    """A template of a hub's folder. `words` are what it may name besides messages: bos_token, eos_token."""

    def __init__(self, source: str, words: Mapping[str, str] | None = None, where: str | Path = "the template"):
        self.words, self.where = dict(words or {}), where
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise DataError(f"{where}: no Jinja template: {error}; mend it") from None

    def text(self, messages: Sequence[dict], *, prompt: bool = False, **more: Any) -> str:
        """A talk as text; with `prompt`, up to where the assistant begins. Raises DataError for what it refuses."""
        parts, size = [], 0
        try:
            given = {**self.words, **more, "messages": list(messages), "add_generation_prompt": prompt}
            for part in self._template.generate(**given):
                parts.append(part)
                size += len(part)
                if size > LONGEST:
                    raise DataError(f"{self.where}: writes without end; mend it")
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise DataError(f"{self.where}: cannot lay out the talk: {error}") from None
        except (RecursionError, MemoryError):
            raise DataError(f"{self.where}: calls itself, or writes, without end; mend it") from None
        return "".join(parts)

    def segments(self, messages: Sequence[dict]) -> Iterator[tuple[str, bool]]:
        """(text, learned) parts of a talk: what stands between a prompt and the end of the turn is the assistant's.

        Raises DataError where the template changes what stood before, so that nobody can tell whose words are whose.
        """
        done = ""
        for count, message in enumerate(messages, 1):
            if message["role"] != "assistant":
                continue
            for learned in (False, True):
                now = self.text(messages[:count]) if learned else self.text(messages[: count - 1], prompt=True)
                if not now.startswith(done):
                    raise DataError(
                        f"{self.where}: turn {count} changes what stood before it, so what the assistant says cannot"
                        " be told from the rest; use a template that only adds"
                    )
                yield now[len(done) :], learned
                done = now
        whole = self.text(messages)
        if whole.startswith(done) and whole != done:
            yield whole[len(done) :], False

    def render(self, messages: Sequence[dict], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Ids of a talk, and a mask of equal length: 1 over the assistant's words and what ends its turn."""
        ids: list[int] = []
        mask: list[int] = []
        for part, learned in self.segments(messages):
            found = tokenizer.encode(part)
            ids += found
            mask += [int(learned)] * len(found)
        return ids, mask


def _name(value: Any) -> str:
    return value if isinstance(value, str) else value.get("content", "") if isinstance(value, dict) else ""


def load_template(path: str | Path) -> ChatTemplate:
    """The chat template of a hub's folder, of its tokenizer_config.json, or a file of its own.

    Raises DataError when there is none.
    """
    path = Path(path)
    places = [path / name for name in FILES] if path.is_dir() else [path]
    config = path / FILES[1] if path.is_dir() else path.with_name(FILES[1])
    described = read_json(config) if config.is_file() else {}
    described = described if isinstance(described, dict) else {}
    words = {key: _name(value) for key, value in described.items() if key.endswith("_token")}
    for place in places:
        if place.is_file() and place.name != FILES[1]:
            return ChatTemplate(place.read_text(encoding="utf-8"), words, place)
    found = described.get("chat_template")
    if isinstance(found, list):  # several by name; the one that is called default
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    if config in places and isinstance(found, str):
        return ChatTemplate(found, words, config)
    raise DataError(f"{path}: no chat template there; give a Jinja file, or a folder with {' or '.join(FILES)}")
