"""Weights on disk: safetensors, and `.pth` files read without running what is in them."""

import json
import pickle
import struct
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.base.files import atomic, canonical, read_json, write_json
from rwkvpipe.model.family import build, detect

PREFIXES = ("_forward_module.", "model.")  # of DeepSpeed and RWKV-PEFT
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}  # as the format spells them
# what torch raises on one: its reader of pickles trusts them to be whole
HALF_A_FILE = (
    *(RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(ArithmeticError, struct.error),
)
DEAD = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")  # layer 0 has no value residual; never read


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all; dtype and bits are kept, equal weights are equal files.

    Not through the library: its order of metadata is random, and what it writes beside the file outlives a kill.
    """
    header: dict[str, dict] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
    names, end = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)), 0
    for name in names:  # wide dtypes first, so that each tensor is aligned
        value = tensors[name]
        if value.dtype not in DTYPES:
            raise WeightsError(f"{path}: {name} has numbers of {value.dtype}, which safetensors has no room for")
        start, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _said(error: Exception) -> str:
    """The first sentence of what a library says."""
    text = (str(error).splitlines() or ["it is empty"])[0].partition(". ")[0]
    return text if len(text) <= 160 else f"{text[:160]}..."


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises WeightsError when it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path}: damaged or cut short ({_said(error)}); fetch it again") from None


def _read_pth(path: Path, device: str) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "Unsupported" in str(error):
            raise WeightsError(f"{path}: holds Python objects, which are not run; save its tensors alone") from None
        raise WeightsError(f"{path}: not a checkpoint, or damaged; fetch it again") from None
    except HALF_A_FILE as error:
        raise WeightsError(f"{path}: damaged or cut short ({_said(error)}); fetch it again") from None
    return found


def find(path: str | Path) -> Path:
    """The checkpoint itself: a file, or the one inside a folder."""
    path = Path(path)
    if path.is_dir():
        names = ("model.safetensors", "model.pth", "pytorch_model.pth")
        found = [path / name for name in names if (path / name).is_file()] or sorted(path.glob("*.pth"))
        if len(found) != 1 and not (found and found[0].name in names):
            raise WeightsError(f"{path}: holds {len(found)} checkpoints; name the file")
        return found[0]
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    return path


def _raw(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a file of either kind, prefixes taken off; on device `meta` only their shapes."""
    with open(path, "rb") as file:
        head = file.read(9)
    pickled = head[:2] in (b"PK", b"\x80\x02") or path.suffix in (".pth", ".pt", ".bin")
    if pickled:
        found, metadata = _read_pth(path, device), {}
    elif device == "meta":
        found, metadata = _shapes(path)
    else:
        found, metadata = read_tensors(path)
    if not isinstance(found, dict) or not found:
        raise WeightsError(f"{path}: holds no tensors by name")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{path}: {name} is a {type(value).__name__}, not a tensor; save the flat weights alone")
    return _without_prefix(path, found), metadata


def _shapes(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read_tensors`, but empty tensors on device meta: the data is not read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118
                piece = file.get_slice(name)
                # a zero-length cut has the dtype and costs nothing
                kind = piece[:0].dtype if piece.get_shape() else file.get_tensor(name).dtype
                found[name] = torch.empty(piece.get_shape(), dtype=kind, device="meta")
            return found, dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path}: damaged or cut short ({_said(error)}); fetch it again") from None


def _without_prefix(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DeepSpeed and RWKV-PEFT put in front of them (never in the middle)."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        plain = name
        while (prefix := next((p for p in PREFIXES if plain.startswith(p)), None)) is not None:
            plain = plain.removeprefix(prefix)
        if plain in found:
            raise WeightsError(f"{path}: {plain} stands twice, with and without a prefix")
        found[plain] = value
    return found


def _head_size(path: Path, metadata: dict[str, str]) -> int:
    """Width of a head as the file or the config.json beside it says; 64 as in every released model otherwise."""
    if "config" in metadata:
        try:
            return int(json.loads(metadata["config"])["head_size"])
        except (ValueError, TypeError, KeyError):
            raise WeightsError(f"{path}: damaged: its metadata names no head_size; fetch it again") from None
    beside = path.with_name("config.json")
    given = read_json(beside) if beside.is_file() else {}  # a stranger's file: read leniently
    return int(given.get("head_size") or given.get("head_size_a") or 64) if isinstance(given, dict) else 64


def _square(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[RwkvConfig, dict[str, Tensor]]:
    """Sizes of the model, and its tensors in the official shapes. Strict: nothing is missing, nothing is left over."""
    tensors = dict(tensors)
    for name, value in list(tensors.items()):
        if name.endswith("att.r_k") and value.dim() != 2:  # flat: the heads one after the other
            size = _head_size(path, metadata)
            if value.numel() % size:
                raise WeightsError(f"{path}: {name} has {value.numel()} values, no multiple of head size {size}")
            tensors[name] = value.reshape(-1, size)
    try:
        config = detect(tensors)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    if "blocks.0.ln0.weight" not in tensors:
        raise WeightsError(f"{path}: blocks.0.ln0.weight is missing; weights with ln0 folded into emb cannot be used")
    with torch.device("meta"):
        wanted = build(config).state_dict()
    for name in DEAD:
        if name not in wanted:
            tensors.pop(name, None)
        elif name not in tensors:
            tensors[name] = torch.zeros_like(wanted[name], device="cpu", dtype=tensors["emb.weight"].dtype)
    if missing := [name for name in wanted if name not in tensors]:
        raise WeightsError(f"{path}: {missing[0]} is missing (and {len(missing) - 1} more); not a whole RWKV-7 model")
    if extra := [name for name in tensors if name not in wanted]:
        raise WeightsError(f"{path}: {extra[0]} is unknown (and {len(extra) - 1} more); merge adapters first")
    result = {}
    for name, like in wanted.items():
        value = tensors[name]
        # writers squeeze (1, 1, D) to (D,): only ones may differ
        if [n for n in value.shape if n != 1] != [n for n in like.shape if n != 1]:
            raise WeightsError(f"{path}: {name} is {tuple(value.shape)}, needed is {tuple(like.shape)}")
        result[name] = value.reshape(like.shape)
    return config, result


def read(path: str | Path) -> tuple[RwkvConfig, dict[str, Tensor]]:
    """Sizes and tensors of a checkpoint of any naming: a `.safetensors` or `.pth` file, or a folder that holds one.

    Sizes come from the tensors' shapes, dtypes stay as stored. Raises WeightsError, naming file and tensor, for
    what is damaged, holds code, misses a tensor or has one too many.
    """
    path = find(path)
    tensors, metadata = _raw(path)
    return _square(path, tensors, metadata)


def describe(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Names, shapes and dtypes (tensors on device meta) and metadata of a file, its data unread where it can be."""
    return _raw(find(path), "meta")


def sizes(path: str | Path) -> RwkvConfig:
    """Sizes of a checkpoint, without its data where that can be."""
    path = find(path)
    return _square(path, *_raw(path, "meta"))[0]


def write(path: str | Path, config: RwkvConfig, tensors: dict[str, Tensor]) -> None:
    """Write a model as safetensors with its sizes in the metadata, and config.json beside it."""
    described = config.model_dump()
    write_tensors(path, tensors, {"config": canonical(described)})
    write_json(Path(path).with_name("config.json"), described)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """A model with the weights of a checkpoint, in fp32, ready to compute (eval mode)."""
    config, tensors = read(path)
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise WeightsError(f"{path}: {name} holds NaN or infinity; fetch or train these weights again")
    model = build(config)
    model.load_state_dict(tensors)  # copies, so bf16 becomes fp32
    return model.to(device).eval()
