"""A class of the user's as tokenizer: the one place where code of the user's own is run.

It is named in the config (`import_path: module:Class`), found as Python finds modules (the folder of the call
counts), and must have `size`, `encode(text)` and `decode(ids)`; `eos`, `decode_bytes(ids)` and `owns(id)` are used
where it has them.
"""

import importlib
import inspect
import operator
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rwkvpipe.base import files
from rwkvpipe.base.errors import DataError
from rwkvpipe.base.vocabulary import NO_CLASS, is_class
from rwkvpipe.tokenizer.byte import unknown, utf8


@contextmanager
def _theirs(import_path: str, what: str) -> Iterator[None]:
    """Code of the user's runs: whatever it raises becomes a DataError that names its place."""
    try:
        yield
    except DataError:
        raise
    except (Exception, SystemExit) as error:  # a stranger's code may raise anything
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        frames = [frame for frame in frames if not frame.filename.startswith("<frozen ")]
        if isinstance(error, SyntaxError) and error.filename:
            where = f" at {error.filename}:{error.lineno}"
        else:
            where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        said = " ".join(str(error).split()) or "without a word"
        raise DataError(f"{import_path}: {what} raises {type(error).__name__}{where}: {said}; mend the class") from None


def _found(import_path: str) -> type:
    """The class itself. Raises DataError where there is none, or one that is no tokenizer."""
    if not is_class(import_path):
        raise DataError(f"import_path: {import_path!r} {NO_CLASS}")
    module, _, name = import_path.partition(":")
    with _theirs(import_path, "its module"):
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(f"{error.name}.")):
                raise DataError(
                    f"import_path: there is no module {module}; put it in the folder where the command is called,"
                    " or install it"
                ) from None
            raise  # the user's module is there and lacks one of its own
        found = getattr(loaded, name, None)
    if not inspect.isclass(found) or not all(callable(getattr(found, part, None)) for part in ("encode", "decode")):
        raise DataError(f"import_path: {import_path} is no class with encode and decode; give one that has them")
    return found


class OwnTokenizer:
    """A user's class behind the interface of all tokenizers; what it gives is checked."""

    def __init__(self, import_path: str, options: Mapping[str, Any] | None = None):
        self.import_path, self.options = import_path, dict(options or {})
        kind = _found(import_path)
        try:
            inspect.signature(kind).bind(**self.options)
        except TypeError as error:
            raise DataError(f"options: {import_path} does not take them: {error}") from None
        with _theirs(import_path, "making one"):
            self._inner = kind(**self.options)
        self.size: int = self._number("size", least=1)
        self.eos = self._number("eos", least=0, most=self.size - 1, none=True)

    def _number(self, name: str, *, least: int, most: int | None = None, none: bool = False) -> Any:
        with _theirs(self.import_path, name):
            value = getattr(self._inner, name, None)
        if value is None and none:
            return None
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            span = f"from {least}" if most is None else f"from {least} to {most}"
            raise DataError(f"{self.import_path}: {name} must be a whole number {span}, it is {value!r}")
        return value

    def source(self) -> str | None:
        """sha256 of the file that the class stands in; None if it stands in none."""
        path = inspect.getsourcefile(type(self._inner))
        return files.digest(path) if path and Path(path).is_file() else None

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text; what is UTF-8 comes to the class as text. Raises DataError for ids outside the vocabulary."""
        given: str | bytes = utf8(text)
        with suppress(UnicodeDecodeError):
            given = given.decode("utf-8")
        with _theirs(self.import_path, "encode"):
            found = list(self._inner.encode(given))
        for place, number in enumerate(found):
            if isinstance(number, bool) or not hasattr(number, "__index__"):
                raise DataError(
                    f"{self.import_path}: encode gives {number!r}, which is no whole number; mend the class"
                )
            found[place] = operator.index(number)
            if not 0 <= found[place] < self.size:
                raise DataError(f"{self.import_path}: encode gives id {number}, size is {self.size}; mend the class")
        return found

    def stream(self, blocks: Iterable[bytes]) -> Iterator[list[int]]:
        """The same ids in one list: where a text could be cut is known to the class alone."""
        yield self.encode(b"".join(blocks).decode("utf-8"))

    def _checked(self, ids: Iterable[int]) -> list[int]:
        """Ids without ends of documents. Raises DataError for those that stand for nothing."""
        found = [number for number in map(int, ids) if number != self.eos]
        for number in found:
            if not self.owns(number):
                raise unknown(number, self.size)
        return found

    def _made(self, name: str, kind: type, ids: Iterable[int]) -> Any:
        """What the method `name` of the class makes of ids; of that kind, or a DataError is raised."""
        checked = self._checked(ids)
        with _theirs(self.import_path, name):
            found = getattr(self._inner, name)(checked)
        if not isinstance(found, kind):
            raise DataError(
                f"{self.import_path}: {name} gives {type(found).__name__}, {kind.__name__} is needed; mend the class"
            )
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        return self._made("decode", str, ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The same as bytes."""
        own = callable(getattr(self._inner, "decode_bytes", None))
        return self._made("decode_bytes", bytes, ids) if own else utf8(self.decode(ids))

    def owns(self, number: int) -> bool:
        """Whether an id stands for something; without a word of the class, all do but `eos`."""
        if number == self.eos or not 0 <= number < self.size:
            return False
        with _theirs(self.import_path, "owns"):
            own = getattr(self._inner, "owns", None)
            return bool(own(number)) if own else True
