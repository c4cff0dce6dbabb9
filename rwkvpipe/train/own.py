"""Functions in a Python file of the user's: found by name, and what goes wrong in them told in one line."""

import importlib.util
import inspect
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from rwkvpipe.base.compiler import short_digest
from rwkvpipe.base.errors import ConfigError, DataError


@contextmanager
def theirs(key: str, name: str) -> Iterator[None]:
    """Code of the user's runs: whatever it raises becomes a DataError that names its place, and `key` of the config."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a stranger's code may raise anything
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        frames = [frame for frame in frames if not frame.filename.startswith("<frozen ")]
        where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        if isinstance(error, SyntaxError) and error.filename:
            where = f" at {error.filename}:{error.lineno}"
        said = " ".join(str(error).split()) or "without a word"
        raise DataError(f"{key}: {name} raises {type(error).__name__}{where}: {said}; mend it") from None


def function(key: str, name: str) -> Callable:
    """The function `file.py:function`. Raises ConfigError or DataError, naming `key` of the config, for none."""
    path, _, wanted = name.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"{key}: there is no file {path}; paths count from the folder of the call")
    own = getattr(_module(key, name, path), wanted, None)
    if not callable(own):
        raise ConfigError(f"{key}: {path} has no function {wanted}; name one that it has")
    return own


def _module(key: str, name: str, path: str) -> ModuleType:
    """The file as a module that is known by a name of its own, once for all functions in it: dataclasses ask for it
    there, and processes that are handed a function do."""
    known = f"own_{short_digest(Path(path).resolve().as_posix(), Path(path).read_bytes())}"
    if known not in sys.modules:
        found = importlib.util.spec_from_file_location(known, path)
        sys.modules[known] = importlib.util.module_from_spec(found)
        try:
            with theirs(key, name):
                found.loader.exec_module(sys.modules[known])
        except BaseException:
            del sys.modules[known]
            raise
    return sys.modules[known]


def draw_from(seed: int) -> None:
    """What functions draw by `random`, `numpy.random` and torch comes from this seed: whoever goes on from a resume
    point draws what was drawn without a stop."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def taken(key: str, name: str, own: Callable, every: dict) -> dict:
    """The arguments that a function takes, of those there are. Raises DataError where it needs another."""
    with theirs(key, name):
        wanted = inspect.signature(own).parameters.values()
    named = {each.name for each in wanted if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    loose = [each for each in wanted if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    lacking = [each.name for each in loose if each.default is each.empty and each.name not in named & every.keys()]
    if lacking:
        raise DataError(f"{key}: {name} asks for `{lacking[0]}`; what it can be told by name is {', '.join(every)}")
    if any(each.kind is each.VAR_KEYWORD for each in wanted):
        return every
    return {each.name: every[each.name] for each in wanted if each.name in every}


def columns(rows: list[dict]) -> dict[str, list]:
    """A list for each column that one of the rows has."""
    return {column: [row.get(column) for row in rows] for column in dict.fromkeys(key for row in rows for key in row)}
