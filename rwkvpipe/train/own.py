"""Functions in a Python file of the user's: found by name, and what goes wrong in them told in one line."""

import importlib.util
import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
    found = importlib.util.spec_from_file_location(f"own_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(found)
    with theirs(key, name):
        found.loader.exec_module(module)
    own = getattr(module, wanted, None)
    if not callable(own):
        raise ConfigError(f"{key}: {path} has no function {wanted}; name one that it has")
    return own


def taken(own: Callable, every: dict) -> dict:
    """The arguments that a function takes, of those there are."""
    wanted = inspect.signature(own).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in wanted):
        return every
    return {each.name: every[each.name] for each in wanted if each.name in every}


def columns(rows: list[dict]) -> dict[str, list]:
    """A list for each column that one of the rows has."""
    return {column: [row.get(column) for row in rows] for column in dict.fromkeys(key for row in rows for key in row)}
