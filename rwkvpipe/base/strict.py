"""What all settings share: kinds of numbers, a strict base, and errors in one line that name the key."""

import contextlib
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import parse_json

M = TypeVar("M", bound=BaseModel)
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME)]
Place = Annotated[str, Field(min_length=1)]  # a path or an address; an empty one would be the folder of the call
MOST = 1_000_000  # values of a YAML file, those of aliases counted wherever they stand
MERGE = "tag:yaml.org,2002:merge"


def _number(value: Any) -> Any:
    # YAML 1.1 reads 6e-4 as text, because it has no dot
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value.strip()):
        return float(value)
    return value


Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]
Fading = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
Part = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)]
# what logits, fp32, are changed by: beyond some 1e38 they would be no numbers
Penalty = Annotated[float, BeforeValidator(_number), Field(ge=-1e6, le=1e6)]
Factor = Annotated[float, BeforeValidator(_number), Field(ge=1e-6, le=1e6)]
Count = Annotated[int, Field(ge=1, lt=2**48, strict=True)]
Whole = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class Strict(BaseModel):
    """Base of all settings: frozen, no unknown keys, documented by their attribute docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _known(model: type[BaseModel], path: tuple) -> list[str]:
    """The keys that would have been known at a place inside a model."""
    schema = model.model_json_schema()
    node = schema
    for part in path:
        while "$ref" in node or "anyOf" in node:
            options = [node] if "$ref" in node else node["anyOf"]
            refs = [o["$ref"].rsplit("/", 1)[-1] for o in options if "$ref" in o]
            node = schema["$defs"][refs[0]] if refs else options[0]
        if isinstance(part, int):
            node = node.get("items", {})
        else:
            node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
            node = node if isinstance(node, dict) else {}
    while "$ref" in node or "anyOf" in node:
        options = [node] if "$ref" in node else node["anyOf"]
        refs = [o["$ref"].rsplit("/", 1)[-1] for o in options if "$ref" in o]
        node = schema["$defs"][refs[0]] if refs else {}
    return list(node.get("properties", {}))


def _line(model: type[BaseModel], value: Any, problem: dict) -> str:
    """One pydantic problem as `key: what is wrong`."""
    parts = [str(p) for p in problem["loc"] if not str(p).startswith("(")]  # tags of forms stand in brackets
    if len(problem["loc"]) > 1 and problem["loc"][0] == "stages" and isinstance(problem["loc"][1], int):
        with contextlib.suppress(KeyError, TypeError, IndexError):  # name the stage rather than count it
            parts[1] = str(value["stages"][problem["loc"][1]]["name"])
    for place in (0, 2):
        if parts[place : place + 1] in (["data"], ["path"], ["valid_path"]):
            parts[place + 1 : place + 2] = []  # which of its two forms was meant
    key = ".".join(parts)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(parts[-1], known := _known(model, problem["loc"][:-1]), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: no such key; {hint}"
    message = _wanted(problem)
    given = problem.get("input")
    shown = f" (got {_short(given)})" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{key}: {message}{shown}" if key else message


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 200 else "a number of many digits"
    return text if len(text) < 80 else f"{text[:60]}..."


def _wanted(problem: dict) -> str:
    """What pydantic asks for, in words of a config."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "string_pattern_mismatch" and context.get("pattern") == NAME:
        return "a name is made of letters, digits, dots, dashes and underscores and begins with a letter or digit"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"a mapping of keys is needed, this is {type(problem['input']).__name__}"
    if kind in ("tuple_type", "list_type"):
        return f"a list is needed, this is {type(problem['input']).__name__}"
    return problem["msg"].removeprefix("Value error, ")


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, text) of all texts of a plain value beyond ASCII, keys among them."""
    if isinstance(value, str) and not value.isascii():
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(name, key)
            yield from _texts(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{key}.{number}")


def check(model: type[M], value: Any, where: str | Path) -> M:
    """Validate a plain value. Raises ConfigError in one line: file, key, problem; nothing is filled by guess."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: a mapping of keys is needed, this is {type(value).__name__}")
    for key, text in _texts(value, ""):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ConfigError(f"{where}: {key.lstrip('.')}: {text[:40]!r} has half a surrogate pair; remove it")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        # a misspelt key is why another one is missing
        problems = sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{where}: {_line(model, value, problems[0])}{more}") from None


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, and aliases that stand for more than anybody writes."""

    def __init__(self, text: str, name: str):
        super().__init__(text)
        self.name = name
        self._seen: set[int] = set()
        self._sizes: dict[int, int] = {}

    def construct_document(self, node):
        """As YAML, once it is known that what its aliases stand for is finite."""
        self._size(node)
        return super().construct_document(node)

    def _size(self, node: yaml.Node) -> int:
        """How many values a node holds, those of its aliases counted wherever they stand."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in self._sizes:
            self._sizes[id(node)] = MOST + 1  # what is met again inside itself has no end
            pairs = isinstance(node, yaml.MappingNode)
            inner = (each for pair in node.value for each in pair) if pairs else node.value
            self._sizes[id(node)] = 1 + sum(map(self._size, inner))
        if self._sizes[id(node)] > MOST:
            line = f"{self.name}:{node.start_mark.line + 1}"
            raise ConfigError(f"{line}: the aliases (*) stand for more than {MOST:,} values; write out what is meant")
        return self._sizes[id(node)]

    def construct_object(self, node, deep=False):
        """As YAML, but what looks like a date or a number and is none is an error of its line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError):
            shown = f"{node.value!s:.40}"
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown} is no value that can be read; put quotes around a text", node.start_mark
            ) from None

    def flatten_mapping(self, node):
        """As YAML, merge keys (`<<: *name`) included, whose keys the mapping's own ones replace; each stays once."""
        if id(node) in self._seen:  # merged into another one before: its keys are one by one already
            return
        self._seen.add(id(node))
        merged, names = False, set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in names:
                line = f"{self.name}:{key.start_mark.line + 1}"
                raise ConfigError(f"{line}: the key {name[1]} stands twice; remove one")
            names.add(name)
            merged = merged or key.tag == MERGE
        super().flatten_mapping(node)
        if merged:
            node.value = list({(key.tag, str(key.value)): (key, value) for key, value in node.value}.values())


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file. Raises ConfigError naming the line of broken YAML or of a doubled key."""
    data = Path(path).read_bytes()
    try:
        return yaml.load(str(data, "utf-8-sig"), lambda text: _Loader(text, str(path)))  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not YAML: {error.problem}; mend it") from None
    except yaml.reader.ReaderError as error:
        line = data.decode()[: error.position].count("\n") + 1
        raise ConfigError(f"{path}:{line}: not YAML: the character {error.character:#x} may not stand there") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 at byte {error.start + 1} of the file; save it as UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{path}: brackets too deep to be read; flatten it") from None


def given_json(text: str, where: str | Path) -> Any:
    """The value of JSON text, as it stands on a command line. Raises ConfigError in one line."""
    try:
        return parse_json(text, where, lines=False)
    except DataError as error:
        raise ConfigError(str(error)) from None


def check_json(model: type[M], text: str, where: str | Path) -> M:
    """Validate JSON text, as it stands on a command line. Raises ConfigError in one line."""
    return check(model, given_json(text, where), where)
