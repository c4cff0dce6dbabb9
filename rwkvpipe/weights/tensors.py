"""Tensors by name that stay on disk until they are asked for, and safetensors files read and written one by one."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from rwkvpipe.base.errors import WeightsError
from rwkvpipe.base.files import atomic, write_json
from rwkvpipe.base.pace import Pace

DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}  # as the format spells them
CODES = {code: dtype for dtype, code in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """How a tensor comes from others: their names, and what is done with them (shapes are tried on device meta)."""

    sources: tuple[str, ...]
    change: Callable[..., Tensor] = lambda value: value


@dataclass(frozen=True)
class Tensors(Mapping[str, Tensor]):
    """Tensors by name: `like` has their shapes and dtypes (on device meta), asking for one reads its data."""

    like: dict[str, Tensor]
    load: Callable[[str], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.like:
            raise KeyError(name)
        return self.load(name)

    def __contains__(self, name: object) -> bool:  # else asked by reading it
        return name in self.like

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)

    def made(self, plan: Mapping[str, Piece]) -> "Tensors":
        """Other tensors made of these, each when it is asked for."""
        like = {name: piece.change(*(self.like[source] for source in piece.sources)) for name, piece in plan.items()}

        def load(name: str) -> Tensor:
            piece = plan[name]
            return piece.change(*(self.load(source) for source in piece.sources))

        return Tensors({name: value.to("meta") for name, value in like.items()}, load)


def held(tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors that are in memory, in the same clothes."""
    like = {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}
    return Tensors(like, lambda name: tensors[name].detach())


def from_bytes(data: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor over these bytes."""
    return data.view(dtype).reshape(shape)


def to_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor, first element first."""
    return memoryview(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def said(error: Exception) -> str:
    """The first sentence of what a library says."""
    text = (str(error).splitlines() or ["it is empty"])[0].partition(". ")[0]
    return text if len(text) <= 160 else f"{text[:160]}..."


def piece_of(path: Path, start: int, length: int) -> Tensor:
    """Bytes of a file (length,). Raises WeightsError when it has become shorter."""
    data = torch.empty(length, dtype=torch.uint8)
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        view = memoryview(data.numpy())
        while view:
            count = file.readinto(view)
            if not count:
                raise WeightsError(f"{path}: cut short while it was read; fetch it again")
            view = view[count:]
    return data


def _begins(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a header, below 2^56, and its brace."""
    with open(path, "rb") as file:
        return file.read(9)[7:] == b"\0{"


def open_safetensors(path: str | Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a safetensors file, its data unread. Raises WeightsError when it is damaged.

    The library judges the file; the bytes are read here, so that no mapped pages add up in memory.
    """
    path = Path(path)
    if path.exists() and (not path.is_file() or (path.suffix != ".safetensors" and not _begins(path))):
        raise WeightsError(f"{path}: is no safetensors file, as one is wanted here; name one")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path}: damaged or cut short ({said(error)}); fetch it again") from None
    size = int.from_bytes(to_bytes(piece_of(path, 0, 8)), "little")
    header = json.loads(bytes(to_bytes(piece_of(path, 8, size))))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in CODES:
            raise WeightsError(f"{path}: {name} has numbers of {entry['dtype']}; give weights that are not quantised")
    like = {name: torch.empty(e["shape"], dtype=CODES[e["dtype"]], device="meta") for name, e in header.items()}

    def load(name: str) -> Tensor:
        start, end = header[name]["data_offsets"]
        return from_bytes(piece_of(path, 8 + size + start, end - start), like[name].dtype, tuple(like[name].shape))

    return Tensors(like, load), metadata


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises WeightsError when it is damaged."""
    tensors, metadata = open_safetensors(path)
    return dict(tensors), metadata


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all; dtype and bits are kept, equal weights are equal files.

    One tensor after the other is asked for. Not through the library: its order of metadata is random, it needs all at
    once, and what it writes beside the file outlives a kill.
    """
    text, ends = _laid(str(path), tensors, metadata or {})
    with atomic(path) as part, open(part, "wb") as file:
        file.write(text)
        pace, done = Pace(f"{path}: writing", max(ends.values(), default=0)), 0
        for name, end in ends.items():
            pace.at(done)
            file.write(to_bytes(tensors[name]))
            done = end


def digest_written(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 of the file that `write_tensors` would write. One tensor after the other is asked for."""
    text, names = _laid("a digest", tensors, metadata)
    found = hashlib.sha256(text)
    for name in names:
        found.update(to_bytes(tensors[name]))
    return found.hexdigest()


def _laid(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file begins with, and where its tensors end, in their order."""
    like = tensors.like if isinstance(tensors, Tensors) else tensors
    header: dict[str, dict] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    ends: dict[str, int] = {}
    end = 0
    for name in sorted(like, key=lambda name: (-like[name].element_size(), name)):  # wide first, so each is aligned
        value = like[name]
        if value.dtype not in DTYPES:
            raise WeightsError(f"{path}: {name} has numbers of {value.dtype}, which safetensors has no room for")
        start, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
        ends[name] = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ends


def write_sharded(folder: Path, tensors: Tensors, limit: int | None) -> None:
    """Write model.safetensors into a folder, or, if it has more than `limit` bytes, shards of no more and their index.

    A tensor larger than that has a shard of its own. What another such call left in the folder goes.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name, like in tensors.like.items():
        if limit is not None and size and size + like.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += like.nbytes
    named = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    named = named if len(groups) > 1 else ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    for file in {index, *folder.glob("model*.safetensors")} - {folder / name for name in named}:
        file.unlink(missing_ok=True)
    for file, names in zip(named, groups, strict=True):
        write_tensors(folder / file, Tensors({name: tensors.like[name] for name in names}, tensors.load))
    if len(groups) > 1:
        total = sum(like.nbytes for like in tensors.like.values())
        places = {name: file for file, names in zip(named, groups, strict=True) for name in names}
        write_json(index, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
