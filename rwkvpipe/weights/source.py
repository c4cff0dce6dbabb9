"""Checkpoint files of any kind opened: what they are, their tensors by name, the data unread until it is asked for."""

import ctypes
import mmap
import pickle
import re
import struct
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvpipe.base.errors import DataError, WeightsError
from rwkvpipe.base.files import read_json
from rwkvpipe.weights.gguf import open_gguf
from rwkvpipe.weights.tensors import Tensors, held, open_safetensors, said

# what a folder may hold, the first that is there counts
NAMES = ("model.safetensors", "model.safetensors.index.json", "model.pth", "pytorch_model.pth")
NAMES += ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf")
SUFFIXES = (".safetensors", ".pth", ".gguf")
WRAPPERS = ("state_dict", "model_state_dict", "module", "model")  # of Lightning, DeepSpeed and others
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
BLOCK = 1 << 24  # bytes copied at once
HEAD = 512  # bytes that tell what a file is
PRINTED = {*b"\t\n\r", *range(32, 127)}
# what torch raises on half a file: its reader of pickles trusts them to be whole
HALF_A_FILE = (
    *(RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(ArithmeticError, struct.error),
)
# how files begin that are no checkpoints, though they are often given as such
OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file it points to; fetch the file itself (git lfs pull)",
    b"<": "a web page, which a server sent instead of the file; check the address and fetch it again",
    b"\x1f\x8b": "packed with gzip; unpack it first",
    b"7z\xbc\xaf": "packed with 7-Zip; unpack it first",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it first",
    b"fmgg": "a file of rwkv.cpp; give the weights that it was made from",
    b"lmgg": "a file of an old ggml; give the weights that it was made from",
    b"\x93NUMPY": "a single numpy array; give a .pth or .safetensors file",
    b"\x89HDF": "an HDF5 file; give a .pth or .safetensors file",
    b"BZh": "packed with bzip2; unpack it first",
    b"\xfd7zXZ": "packed with xz; unpack it first",
    b"Rar!": "packed with RAR; unpack it first",
}


@dataclass(frozen=True)
class Source:
    """A checkpoint as it lies on disk: its files, the way they are written, tensors under their own names."""

    path: Path
    files: tuple[Path, ...]
    format: str
    tensors: Tensors
    metadata: dict[str, str]


def find(path: str | Path) -> Path:
    """The file that stands for a checkpoint: itself, or the one inside a folder (for shards: their index)."""
    path = Path(path)
    if path.is_dir():
        if found := [path / name for name in NAMES if (path / name).is_file()]:
            return found[0]
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and not SHARD.search(file.name))
        if not found and (shards := sorted(file.name for file in path.iterdir() if SHARD.search(file.name))):
            raise WeightsError(f"{path}: holds shards ({shards[0]}, ...) and no index of them; fetch *.index.json too")
        if len(found) != 1:
            names = [file.name for file in found[:3]] + ["..."] * (len(found) > 3)
            some = f" ({', '.join(names)})" if names else ""
            raise WeightsError(f"{path}: holds {len(found)} checkpoints{some}; name the file")
        return found[0]
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    index = [file for file in path.parent.glob("*.index.json") if SHARD.sub(".", path.name) in file.name]
    if SHARD.search(path.name) and index:
        raise WeightsError(f"{path}: one of several shards; give the folder, or {index[0].name}")
    return path


def open_source(path: str | Path) -> Source:
    """Open a checkpoint: a file, an index of shards, or a folder. Raises WeightsError saying what else it is."""
    path = find(path)
    if path.name.endswith(".index.json"):
        return _shards(path)
    kind = _kind(path)
    if kind == "gguf":
        tensors, metadata = open_gguf(path)
    elif kind == "safetensors":
        tensors, metadata = open_safetensors(path)
    else:
        tensors, metadata = _pickled(path, kind), {}
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors by name")
    return Source(path, (path,), kind, tensors, metadata)


def _kind(path: Path) -> str:
    """`safetensors`, `pth` (zipped), `old pth` (before torch 1.6) or `gguf`, by what the file begins with."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head:
        raise WeightsError(f"{path}: is empty; fetch it again")
    if head[:4] == b"GGUF":
        return "gguf"
    if head[:2] == b"PK":
        return "pth"
    if head[8:9] == b"{" and head[7] == 0:
        return "safetensors"
    if head[:1] == b"\x80":
        return "old pth"
    if what := next((text for start, text in OTHERS.items() if head.lstrip()[: len(start)] == start), None):
        raise WeightsError(f"{path}: no checkpoint: {what}")
    if head[257:262] == b"ustar":
        raise WeightsError(f"{path}: no checkpoint: a tar archive; unpack it first")
    if not any(head) and len(head) > 8:
        raise WeightsError(f"{path}: no checkpoint: it begins with zeros, as if never fetched whole; fetch it again")
    if len(head) > 8 and all(byte in PRINTED for byte in head):
        raise WeightsError(f"{path}: no checkpoint: a text; give a .pth, .safetensors or .gguf file")
    if path.suffix == ".safetensors":
        return "safetensors"
    raise WeightsError(f"{path}: no checkpoint; give a .pth, .safetensors or .gguf file, or a folder that holds one")


def _shards(index: Path) -> Source:
    """A checkpoint in several files, of which an index says what lies where."""
    try:
        described = read_json(index)
        places = dict(described["weight_map"])
    except (DataError, KeyError, TypeError, ValueError) as error:
        text = str(error) if isinstance(error, DataError) else f"{index}: no index of shards (weight_map is missing)"
        raise WeightsError(text) from None
    if not places or not all(isinstance(name, str) and Path(name).name == name for name in places.values()):
        raise WeightsError(f"{index}: no index of shards: weight_map does not map tensors to files of this folder")
    files = tuple(index.parent / name for name in dict.fromkeys(places.values()))
    for number, file in enumerate(files, 1):
        if not file.is_file():
            raise WeightsError(f"{file}: is missing (shard {number} of {len(files)}); fetch it too")
    shards = {file.name: open_source_file(file) for file in files}
    for name, file in places.items():
        if name not in shards[file].tensors:
            raise WeightsError(f"{index.with_name(file)}: {name} is missing, unlike {index.name} says; fetch it again")
    tensors = Tensors({n: shards[f].tensors.like[n] for n, f in places.items()}, lambda n: shards[places[n]].tensors[n])
    kind = next(iter(shards.values())).format
    metadata = {key: value for shard in shards.values() for key, value in shard.metadata.items()}
    return Source(index, files, f"{kind} in {len(files)} shards", tensors, metadata)


def open_source_file(path: Path) -> Source:
    """A single shard."""
    kind = _kind(path)
    tensors, metadata = open_safetensors(path) if kind == "safetensors" else (_pickled(path, kind), {})
    return Source(path, (path,), kind, tensors, metadata)


def _pickled(path: Path, kind: str) -> Tensors:
    """Tensors of a file of torch; nothing in it is run."""
    # zipped: the file is mapped and its data stays on disk; torch judges a path by its suffix, which may lie
    mapped = kind == "pth" and path.suffix != ".safetensors"
    found = _unpickled(path, kind, mapped)
    if isinstance(found, dict):
        inner = next((found[key] for key in WRAPPERS if isinstance(found.get(key), dict)), None)
        found = found if inner is None else inner
    if not isinstance(found, dict) or not found:
        raise WeightsError(f"{path}: holds no tensors by name")
    for name, value in found.items():
        if not isinstance(name, str):
            raise WeightsError(f"{path}: holds no tensors by name, but by {type(name).__name__}")
        if not isinstance(value, Tensor):
            raise WeightsError(f"{path}: {name} is a {type(value).__name__}, not a tensor; save the flat weights alone")
        if value.layout != torch.strided or value.is_quantized:
            raise WeightsError(f"{path}: {name} is sparse or quantised; give plain weights")
    tensors = held(found)
    return Tensors(tensors.like, lambda name: _own(found[name])) if mapped else tensors


def _unpickled(path: Path, kind: str, mapped: bool) -> Any:
    """What a file of torch holds. Raises WeightsError for what is damaged, or would have to be run."""
    records = _zipped(path) if kind == "pth" else None
    needed: Counter[int] = Counter()

    def place(storage: torch.UntypedStorage, _: str) -> torch.UntypedStorage:
        needed[storage.nbytes()] += 1
        return storage

    try:
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            found = torch.load(path if mapped else file, map_location=place, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if name := re.search(r"(?:unsupported |: )GLOBAL ([\w.]+)|unrecognized function <?([\w. ]+)", str(error)):
            what = f"holds Python objects ({name[1] or name[2]}), which are not run; save its tensors alone"
            raise WeightsError(f"{path}: {what}") from None
        what = "not a checkpoint, or damaged (nothing in it was run)"
        raise WeightsError(f"{path}: {what}; fetch it again") from None
    except HALF_A_FILE as error:
        raise WeightsError(f"{path}: damaged or cut short ({said(error)}); fetch it again") from None
    # torch maps as many bytes as the names ask for: behind a record that is too short it goes on into the next
    if records is not None and any(needed - records):
        raise WeightsError(f"{path}: damaged or cut short (a record is shorter than its tensor); fetch it again")
    return found


def _zipped(path: Path) -> Counter[int]:
    """How many records there are of each length. Raises WeightsError for a zip file that torch did not write."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, struct.error) as error:
        raise WeightsError(f"{path}: damaged or cut short ({said(error)}); fetch it again") from None
    names = [entry.filename for entry in entries]
    if not any(name.endswith("data.pkl") for name in names):
        what = "an archive of numpy arrays" if any(name.endswith(".npy") for name in names) else "an ordinary zip file"
        raise WeightsError(f"{path}: no checkpoint: {what}; give a .pth or .safetensors file")
    if any(name.endswith("constants.pkl") for name in names):
        raise WeightsError(f"{path}: a TorchScript program, which is not run; save its tensors alone")
    # what is packed may be a thousand times as large in memory, and cannot be mapped
    if packed := next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None):
        what = f"packed anew by a zip program ({packed.filename}), which torch never does"
        raise WeightsError(f"{path}: {what}; fetch the file as it was, or unpack it and use zip -0")
    return Counter(entry.file_size for entry in entries if "/data/" in entry.filename)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _own(value: Tensor) -> Tensor:
    """A copy of a tensor that lies in a mapped file; the pages that were read for it are given back."""
    if not value.is_contiguous():
        return value.detach().clone()
    copied = torch.empty(value.shape, dtype=value.dtype)
    # numbers of no bytes at all have no address
    flat = value.detach().reshape(-1).view(torch.uint8) if value.numel() else torch.empty(0, dtype=torch.uint8)
    target = copied.reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        target[start : start + BLOCK] = block
        # only whole pages, which nobody else reads just now
        first = -(-block.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (block.data_ptr() + len(block)) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
    return copied
