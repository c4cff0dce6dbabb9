"""Files that `torch.load` reads, written tensor by tensor: torch's own writer needs all of them in memory.

Such a file is a zip archive, nothing in it packed: data.pkl has names, shapes and the numbers of the records, data/0,
data/1, ... are the tensors' bytes, each beginning at a multiple of 64 bytes so that it can be mapped.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from rwkvpipe.base.errors import WeightsError
from rwkvpipe.base.files import atomic
from rwkvpipe.weights.tensors import Tensors, to_bytes

HOME = "archive"
ALIGNED = 64
LARGE = 1 << 30  # bytes from which a record's lengths are written in their long form
STORAGES = {
    **{torch.float64: "DoubleStorage", torch.float32: "FloatStorage", torch.float16: "HalfStorage"},
    **{torch.bfloat16: "BFloat16Storage", torch.int64: "LongStorage", torch.int32: "IntStorage"},
    **{torch.int16: "ShortStorage", torch.int8: "CharStorage", torch.uint8: "ByteStorage", torch.bool: "BoolStorage"},
}


class _Storage:
    """Stands for a tensor's record while the names are pickled."""

    def __init__(self, number: int, like: Tensor):
        self.described = ("storage", getattr(torch, STORAGES[like.dtype]), str(number), "cpu", like.numel())


class _Record:
    """Stands for a tensor: pickled, it is the call by which torch makes one out of its record."""

    def __init__(self, number: int, like: Tensor):
        self.storage, self.shape = _Storage(number, like), tuple(like.shape)
        self.steps = torch.empty(like.shape, device="meta").stride()

    def __reduce__(self):
        made = (self.storage, 0, self.shape, self.steps, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, made


class _Names(pickle.Pickler):
    """Pickles names and shapes; records are named, not written."""

    def persistent_id(self, obj):
        return obj.described if isinstance(obj, _Storage) else None


def write_pth(path: str | Path, tensors: Tensors) -> None:
    """Write tensors as torch.save would, whole or not at all; equal tensors are equal files."""
    for name, like in tensors.like.items():
        if like.dtype not in STORAGES:
            raise WeightsError(f"{path}: {name} has numbers of {like.dtype}, which .pth files have no room for")
    names = io.BytesIO()
    # protocol 2, as torch has it: strings and numbers are told from objects by no memo of ours
    _Names(names, protocol=2).dump({name: _Record(n, like) for n, (name, like) in enumerate(tensors.like.items())})
    with atomic(path) as part, open(part, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, f"{HOME}/data.pkl", names.getbuffer())
        _add(archive, f"{HOME}/byteorder", memoryview(b"little"))
        for number, name in enumerate(tensors):
            _add(archive, f"{HOME}/data/{number}", to_bytes(tensors[name]))
        _add(archive, f"{HOME}/version", memoryview(b"3\n"))


def _add(archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    """A record whose bytes begin at a multiple of 64: what is missing is filled into its header."""
    record = zipfile.ZipInfo(name)  # of the year 1980, so that equal tensors are equal files
    record.file_size = len(data) if len(data) < LARGE else 0
    large = len(data) >= LARGE
    header = 30 + len(name.encode()) + (20 if large else 0) + 4  # fixed fields, name, long lengths, our own field
    padding = -(archive.fp.tell() + header) % ALIGNED
    record.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
    with archive.open(record, "w", force_zip64=large) as file:
        file.write(data)
