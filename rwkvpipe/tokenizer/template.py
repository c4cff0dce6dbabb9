"""Talks laid out by a Jinja template, as folders of hubs bring one; it runs in jinja2's immutable sandbox."""

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import read_json
from rwkvpipe.tokenizer.load import Tokenizer

WIDENING = ("center", "ljust", "rjust", "zfill", "expandtabs")
LONGEST = 1 << 22  # characters that a template may write, or make of one text by repeating it
FILES = ("chat_template.jinja", "tokenizer_config.json")


def _bearable(*values: Any) -> Any:
    """The last value. Raises TemplateError where one is a number or a text that makes others endless."""
    for value in values:
        large = isinstance(value, int) and abs(value) > LONGEST**2
        if large or (isinstance(value, str | list | tuple) and len(value) > LONGEST):
            raise TemplateError("something is too large")
    return values[-1] if values else None


def _narrow(text: str) -> None:
    """Raise TemplateError for a format with a large width, or one that comes from elsewhere."""
    if re.search(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{", text):
        raise TemplateError("formats of such widths are not allowed")


def _bounded(name: str, use: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that makes nothing too large."""

    @wraps(use)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, int) and value > LONGEST for value in (*args[1:], *kwargs.values())):
            raise TemplateError(f"{name} makes something too large")
        if name == "format" and args:
            _narrow(str(args[0]))
        return _bearable(use(*args, **kwargs))

    return bounded


class _Code(CodeGenerator):
    """Has the sandbox look at `~` as at other operators."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.call_binop(context, '~', " * (len(node.nodes) - 1))
        self.visit(node.nodes[0], frame)
        for following in node.nodes[1:]:
            self.write(", ")
            self.visit(following, frame)
            self.write(")")


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, in which nothing grows without bounds either."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self, **more: Any):
        super().__init__(**more)
        self.code_generator_class = _Code
        self.filters = {name: _bounded(name, use) for name, use in self.filters.items()}

    def call(self, context, obj, /, *args: Any, **kwargs: Any) -> Any:
        """Calls, but none with or of something too large."""
        _bearable(*args, *kwargs.values())
        text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        words = [word for word in args if isinstance(word, str)]
        large = name == "replace" and len(words) > 1 and text.count(words[0]) * len(words[1]) > LONGEST
        if isinstance(text, str) and (large or (name == "join" and len(text) > LONGEST >> 12)):
            raise TemplateError(f"{name} makes something too large")
        return _bearable(super().call(context, obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also not what widens a text to any size."""
        return attr not in WIDENING and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """The methods `format` of a text, of bearable widths."""
        found = super().wrap_str_format(value)
        if found is not None:
            _narrow(value.__self__)
        return found

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        """`*` and `**`, but of small things; `%`, but not to any width."""
        if operator == "%" and isinstance(left, str) and re.search(r"\*|\d{4}", left):
            raise TemplateError("% with such widths is not allowed")
        sized = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        numbers = [side for side in (left, right) if isinstance(side, int)]
        if (sized and numbers and sized[0] * abs(numbers[0]) > LONGEST) or (operator == "**" and max(numbers) > 64):
            raise TemplateError(f"{operator} makes something too large")
        if operator == "~":
            return _bearable(f"{left}{right}")
        return _bearable(super().call_binop(context, operator, left, right))


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
        except (RecursionError, MemoryError):
            raise DataError(f"{where}: no Jinja template: brackets too deep to be read; flatten it") from None

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
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
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
            try:
                return ChatTemplate(place.read_text(encoding="utf-8"), words, place)
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 at byte {error.start}; give a Jinja file") from None
    found = described.get("chat_template")
    if isinstance(found, list):  # several by name; the one that is called default
        found = next((e.get("template") for e in found if isinstance(e, dict) and e.get("name") == "default"), None)
    if config in places and isinstance(found, str):
        return ChatTemplate(found, words, config)
    raise DataError(f"{path}: no chat template there; give a Jinja file, or a folder with {' or '.join(FILES)}")
