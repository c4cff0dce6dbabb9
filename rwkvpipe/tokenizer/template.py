"""Talks laid out by a Jinja template, as folders of hubs bring one; it runs in jinja2's immutable sandbox."""

import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import read_json
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.bounds import LONGEST, Sandbox
from rwkvpipe.tokenizer.load import Tokenizer

# what a template may raise while it runs, besides TemplateError what Python raises for values of the wrong kind
FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)

FILES = ("chat_template.jinja", "tokenizer_config.json")


class Said(str):
    """What a template writes between `generation` and `endgeneration`."""


class _Generation(Extension):
    """The tag by which a template says which words are the assistant's."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

    def said(self, caller: Callable[[], str]) -> Said:
        """What stands between the tags."""
        return Said(caller())


def _complain(message: str) -> NoReturn:
    raise TemplateError(message)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    # not jinja2's own, which writes for HTML; these are what transformers takes
    if indent is not None and not (isinstance(indent, int) and indent <= 64):
        raise TemplateError("tojson: indent is a number to 64")
    pair = None if separators is None else (str(separators[0]), str(separators[1]))
    if pair and max(map(len, pair)) > 64:
        raise TemplateError("tojson: separators are too large")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


def _environment() -> Sandbox:
    found = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    found.add_filter("tojson", _json)
    found.globals["raise_exception"] = _complain
    found.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return found


class ChatTemplate:
    """A template of a hub's folder. `words` are what it may name besides messages: bos_token, eos_token."""

    def __init__(self, source: str, words: Mapping[str, str] | None = None, where: str | Path = "the template"):
        self.words, self.where = dict(words or {}), where
        self._sandbox = _environment()
        try:
            self._template = self._sandbox.from_string(source)
        except (RecursionError, MemoryError, SyntaxError):  # SyntaxError: Python's own limits of what stands in what
            raise DataError(f"{where}: no Jinja template: what stands in it is nested too deep; flatten it") from None
        except (TemplateError, ValueError) as error:
            raise DataError(f"{where}: no Jinja template: {error}; mend it") from None

    def _parts(self, messages: Sequence[dict], prompt: bool, more: Mapping[str, Any]) -> list[str]:
        """What the template writes, piece after piece. Raises DataError."""
        parts, size = [], 0
        self._sandbox.begin()
        try:
            given = {**self.words, **more, "messages": list(messages), "add_generation_prompt": prompt}
            for part in self._template.generate(**given):
                parts.append(part)
                size += len(part)
                if size > LONGEST:
                    raise DataError(f"{self.where}: writes more than {LONGEST:,} characters; mend it")
        except (RecursionError, MemoryError):
            raise DataError(f"{self.where}: calls itself, or writes, without end; mend it") from None
        except FAILURES as error:
            raise DataError(f"{self.where}: cannot lay out the talk: {error}") from None
        return parts

    def text(self, messages: Sequence[dict], *, prompt: bool = False, **more: Any) -> str:
        """A talk as text; with `prompt`, up to where the assistant begins. `more` is what else it names: `tools`.

        Raises DataError for what the template refuses, and for one that has no bounds.
        """
        return "".join(self._parts(messages, prompt, more))

    def segments(self, messages: Sequence[dict]) -> Iterator[tuple[str, float]]:
        """(text, weight) parts of a talk, whose first turn may bring `tools` along.

        Where the template marks what is generated, that is the assistant's; else what stands between a prompt and the
        end of the turn.

        Raises DataError where an unmarked template changes what stood before, so that nobody can tell whose words
        are whose.
        """
        more = {"tools": messages[0]["tools"]} if messages and "tools" in messages[0] else {}
        parts = self._parts(messages, False, more)
        if any(isinstance(part, Said) for part in parts):
            yield from self._tagged(parts, [chat.weight(m) for m in messages if m["role"] == "assistant"])
            return
        done, whole = "", "".join(parts)
        for count, message in enumerate(messages, 1):
            if message["role"] != "assistant":
                continue
            for learned in (False, True):
                now = self.text(messages[: count if learned else count - 1], prompt=not learned, **more)
                if not now.startswith(done):
                    raise DataError(
                        f"{self.where}: turn {count} changes what stood before it, so what the assistant says cannot"
                        " be told from the rest; use a template that only adds, or one with generation tags"
                    )
                yield now[len(done) :], chat.weight(message) if learned else 0
                done = now
        if whole.startswith(done) and whole != done:
            yield whole[len(done) :], 0

    def _tagged(self, parts: list[str], wanted: list[float]) -> Iterator[tuple[str, float]]:
        """(text, weight) parts by generation tags, of which there is one a turn where not all turns weigh 1."""
        tagged = sum(isinstance(part, Said) for part in parts)
        if tagged != len(wanted) and any(weight != 1 for weight in wanted):
            raise DataError(
                f"{self.where}: {tagged} generation tags for {len(wanted)} replies, some of which are not"
                " to be learned, or weigh less or more; nobody can tell which"
            )
        learned = iter(wanted if tagged == len(wanted) else [1] * tagged)
        for said, run in groupby(parts, lambda part: isinstance(part, Said)):
            if said:
                yield from ((str(part), next(learned)) for part in run)
            else:
                yield "".join(run), 0

    def render(self, messages: Sequence[dict], tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
        """Ids of a talk, and a mask of equal length: 1, or the turn's weight, over the assistant's words."""
        return chat.laid(self.segments(messages), tokenizer)


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
