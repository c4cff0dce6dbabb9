"""Which weights an adapter or initial states were trained beside: told in their file, compared where they are used.

Weights are known by their tensors as the model has them (names, shapes, dtypes, numbers), whatever file holds them.
Older adapters tell the sha256 of a file alone: they belong to it, and to tensors of which `store.write` makes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkvpipe.base.errors import WeightsError
from rwkvpipe.base.files import canonical
from rwkvpipe.weights import store
from rwkvpipe.weights.peft import is_peft
from rwkvpipe.weights.tensors import Piece, Tensors, to_bytes

SHOWN = 16  # letters of a digest that a message has


@dataclass(frozen=True)
class Base:
    """The weights that something was trained beside, as its file tells them; what is not told is empty."""

    file: str = ""
    """sha256 of their file."""
    tensors: str = ""
    """Digest of their tensors."""
    dtype: str = ""
    name: str = ""
    """Their file and its folder."""

    @classmethod
    def told(cls, metadata: dict[str, str]) -> "Base":
        """What a file's metadata tells."""
        keys = ("base", "base_tensors", "base_dtype", "base_name")
        return cls(*(metadata.get(key, "") for key in keys))

    def metadata(self) -> dict[str, str]:
        """The same to be written into a file."""
        found = {"base_tensors": self.tensors, "base_dtype": self.dtype, "base_name": self.name}
        return {"base": self.file} | {key: value for key, value in found.items() if value}

    def __str__(self) -> str:
        facts = [self.dtype] * bool(self.dtype) + [f"sha256 {self.file[:SHOWN]}..."] * bool(self.file)
        return f"{self.name or 'a file'} ({', '.join(facts)})"


class Watched:
    """A checkpoint whose tensors are marked while they are read, so that nothing is read twice to know them."""

    def __init__(self, found: store.Checkpoint):
        self._marks: dict[str, list] = {}
        self._tensors, self._dead = found.tensors, found.unread
        self.found = replace(found, tensors=Tensors(found.tensors.like, self._load))

    def _load(self, name: str) -> Tensor:
        value = self._tensors[name]
        self._marks[name] = [_named(value.dtype), list(value.shape), sha256(to_bytes(value)).hexdigest()]
        return value

    def digest(self) -> str:
        """What tells the model's tensors from others; those that nobody has read yet are read now."""
        for name in self._tensors:
            if name not in self._marks and name not in self._dead:
                self._load(name)
        marks = {name: mark for name, mark in self._marks.items() if name not in self._dead}
        return sha256(canonical(marks).encode()).hexdigest()


class Beside:
    """A model opened for what was trained beside weights: read `found`, then `check` that they are these.

    Its tensors are marked only where the adapter tells what their marks should be.
    """

    def __init__(self, model: str | Path, adapter: str | Path):
        self.model, self.adapter = model, adapter
        self.base = Base() if is_peft(adapter) else Base.told(store.describe(adapter)[1])
        found = store.open_model(model)
        self._watched = Watched(found) if self.base.tensors else None
        self.found = found if self._watched is None else self._watched.found

    def check(self) -> None:
        """Raise WeightsError, telling what is known of the right ones, where the weights are others."""
        if self._belongs():
            return
        dtype, those = _dtypes(self.found), self.base.dtype
        why = f", which are in {dtype}" if those and those != dtype else ""
        also = ", or another file of the same tensors and dtypes" if self.base.tensors else ""
        told = f"was trained beside other weights than {self.model}{why}: beside {self.base}"
        raise WeightsError(f"{self.adapter}: {told}; give those{also}")

    def _belongs(self) -> bool:
        if self._watched is not None:
            return self._watched.digest() == self.base.tensors
        return not self.base.file or self.base.file in _files(self.model, self.found)


def load_base(path: str | Path, device: str | torch.device, *, apart: bool) -> tuple[nn.Module, Base]:
    """A model to be trained, and what weights it has; with `apart`, whatever is trained will be told them in full."""
    file, found = store.mark(path), store.open_model(path)
    if not apart:
        return store.model_of(found, device), Base(file)
    watched = Watched(found)
    model = store.model_of(watched.found, device)
    name = "/".join(part for part in found.source.path.parts[-2:] if part not in ("/", ".."))
    return model, Base(file, watched.digest(), _dtypes(found), name)


def _files(model: str | Path, found: store.Checkpoint) -> Iterator[str]:
    """The digests that an older adapter may know these weights by, each computed when it is asked for."""
    yield store.mark(model)
    yield store.mark_written(found)
    if found.unread:  # which .pth files have for other programs' sake
        plan = {name: Piece((name,)) for name in found.tensors if name not in found.unread}
        yield store.mark_written(replace(found, tensors=found.tensors.made(plan)))


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(found: store.Checkpoint) -> str:
    dead = found.unread
    return ", ".join(sorted({_named(value.dtype) for name, value in found.tensors.like.items() if name not in dead}))
