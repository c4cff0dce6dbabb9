"""A class of the user's as tokenizer: the one place where code of the user's own is run.

It is named in the config (`import_path: module:Class`), found as Python finds modules (the folder of the call
counts), and must have `size`, `encode(text)` and `decode(ids)`; `eos`, `decode_bytes(ids)` and `owns(id)` are used
where it has them.
"""

import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkvpipe.base import files
from rwkvpipe.base.errors import DataError
from rwkvpipe.tokenizer.byte import unknown


def _found(import_path: str) -> type:
    """The class itself. Raises DataError where there is none, or one that is no tokenizer."""
    module, _, name = import_path.partition(":")
    if not all(word.isidentifier() for word in (*module.split("."), name)):
        raise DataError(f"import_path: {import_path!r} is not module:Class, such as my_tokenizers:Letters")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name):
            raise  # the user's module is there and lacks one of its own
        raise DataError(
            f"import_path: there is no module {module}; put it in the folder where the command is called, or install it"
        ) from None
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
        self._inner = kind(**self.options)
        self.size = self._number("size", least=1)
        self.eos = None if getattr(self._inner, "eos", None) is None else self._number("eos", least=0)

    def _number(self, name: str, least: int) -> int:
        value = getattr(self._inner, name, None)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DataError(f"{self.import_path}: {name} must be a whole number from {least}, it is {value!r}")
        return value

    def source(self) -> str | None:
        """sha256 of the file that the class stands in; None if it stands in none."""
        path = inspect.getsourcefile(type(self._inner))
        return files.digest(path) if path and Path(path).is_file() else None

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text. Raises DataError for ids outside the vocabulary."""
        found = [int(number) for number in self._inner.encode(text)]
        for number in found:
            if not 0 <= number < self.size:
                raise DataError(f"{self.import_path}: encode gives id {number}, size is {self.size}; mend the class")
        return found

    def pieces(self, text: str | bytes) -> Iterator[list[int]]:
        """The same ids in one list."""
        yield self.encode(text)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        """Ids without ends of documents. Raises DataError for those that stand for nothing."""
        found = [number for number in map(int, ids) if number != self.eos]
        for number in found:
            if not self.owns(number):
                raise unknown(number, self.size)
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        return self._inner.decode(self._checked(ids))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The same as bytes."""
        own = getattr(self._inner, "decode_bytes", None)
        return own(self._checked(ids)) if own else self.decode(ids).encode("utf-8")

    def owns(self, number: int) -> bool:
        """Whether an id stands for something; without a word of the class, all do but `eos`."""
        if number == self.eos or not 0 <= number < self.size:
            return False
        own = getattr(self._inner, "owns", None)
        return bool(own(number)) if own else True
