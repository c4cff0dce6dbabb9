"""Checkpoints of any kind as models: sizes from shapes, tensors under RWKV-LM's names, nothing missing or left over."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.base.files import canonical, digest, read_json, write_json
from rwkvpipe.base.sizes import title
from rwkvpipe.model.family import build, detect
from rwkvpipe.model.layers import HEAD_EPS
from rwkvpipe.weights.layouts import DEAD, HF7, official
from rwkvpipe.weights.source import Source, find, open_source
from rwkvpipe.weights.tensors import Piece, Tensors, digest_written, read_tensors, write_tensors

__all__ = ["Checkpoint", "find", "load_model", "mark", "open_model", "read", "read_tensors", "sizes", "write"]
__all__ += ["describe", "mark_written", "model_of", "tensors_of", "write_tensors"]


log = logging.getLogger("rwkvpipe")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its sizes, its tensors under the official names and in their shapes, and how it lies there.

    `tensors` are those of the model, and layer 0's `v0 v1 v2` if the file has them, which no model reads.
    """

    config: RwkvConfig
    tensors: Tensors
    source: Source
    layout: str

    @property
    def unread(self) -> list[str]:
        """Names of layer 0's tensors that no model reads."""
        return [name for name in DEAD if name in self.tensors]


def open_model(path: str | Path) -> Checkpoint:
    """Open a checkpoint of any naming: a file (`.pth`, `.safetensors`), an index of shards, or a folder with one.

    Sizes come from the tensors' shapes, dtypes stay as stored, data is read when a tensor is asked for. Raises
    WeightsError, naming file and tensor, for what is damaged, holds code, misses a tensor or has one too many.
    """
    source = open_source(path)
    tensors, layout = official(str(source.path), source.tensors)
    config, tensors = _square(source, tensors)
    if layout == HF7:
        _same_norms(source.path, config)
    return Checkpoint(config, tensors, source, layout)


def read(path: str | Path) -> tuple[RwkvConfig, dict[str, Tensor]]:
    """Sizes and tensors of a checkpoint, in memory, exactly those of the model; errors as `open_model`."""
    return tensors_of(open_model(path))


def tensors_of(found: Checkpoint) -> tuple[RwkvConfig, dict[str, Tensor]]:
    """The same of a checkpoint that is open."""
    with torch.device("meta"):
        wanted = build(found.config).state_dict()
    return found.config, {name: found.tensors[name] for name in wanted}


def describe(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Names, shapes and dtypes (tensors on device meta) and metadata as a file has them, its data unread."""
    source = open_source(path)
    return source.tensors.like, source.metadata


def sizes(path: str | Path) -> RwkvConfig:
    """Sizes of a checkpoint, without its data."""
    return open_model(path).config


def mark(path: str | Path) -> str:
    """What tells a checkpoint's bytes from others: the sha256 of its file, or of those of its shards."""
    path = find(path)
    if not path.name.endswith(".index.json"):
        return digest(path)
    return hashlib.sha256(" ".join(map(digest, open_source(path).files)).encode()).hexdigest()


def write(path: str | Path, config: RwkvConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a model as safetensors with its sizes in the metadata, and config.json beside it."""
    write_tensors(path, tensors, _metadata(config))
    write_json(Path(path).with_name("config.json"), config.model_dump())


def mark_written(found: Checkpoint) -> str:
    """The mark of the file that `write` makes of a checkpoint, without writing it."""
    return digest_written(found.tensors, _metadata(found.config))


def _metadata(config: RwkvConfig) -> dict[str, str]:
    return {"config": canonical(config.model_dump())}


def load_model(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """A model with the weights of a checkpoint, in fp32, ready to compute (eval mode); one tensor after the other is
    read, so that no more is held than the model."""
    return model_of(open_model(path), device)


def model_of(found: Checkpoint, device: str | torch.device = "cpu") -> nn.Module:
    """The same of a checkpoint that is open."""
    with torch.device("meta"):
        model = build(found.config)
    weights = {}
    for name, like in model.state_dict().items():
        value = found.tensors[name]
        if not _finite(value):
            raise WeightsError(f"{found.source.path}: {name} holds NaN or infinity; fetch or train these weights again")
        weights[name] = torch.empty(like.shape).copy_(value)  # so that no file is behind it, and bf16 becomes fp32
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval()


def _finite(value: Tensor) -> bool:
    """Whether all numbers are; a sum that is shows it in a tenth of the time."""
    return bool(value.sum(dtype=torch.float32).isfinite()) or bool(value.isfinite().all())


def _head_size(source: Source, width: int) -> int:
    """Width of a head where the shapes do not tell: what the file or the config.json beside it says; else 64."""
    if "config" in source.metadata:
        try:
            size = int(json.loads(source.metadata["config"])["head_size"])
            if size < 1:
                raise ValueError(size)
            return size
        except (ValueError, TypeError, KeyError, OverflowError):
            raise WeightsError(f"{source.path}: damaged: its metadata names no head_size; fetch it again") from None
    beside = source.path.with_name("config.json")
    given = read_json(beside) if beside.is_file() else {}  # a stranger's file: read leniently
    if not isinstance(given, dict):
        return 64
    heads = given.get("num_heads") or given.get("num_attention_heads")
    size = given.get("head_size") or given.get("head_size_a") or given.get("head_dim")
    if size is None and isinstance(heads, int) and heads > 0:
        size = width // heads
    return size if isinstance(size, int) and size > 0 else 64


def _same_norms(path: Path, config: RwkvConfig) -> None:
    """Say so where the programs of Hugging Face's layout norm otherwise: their epsilon goes with the head size."""
    beside = path.with_name("config.json")
    given = read_json(beside) if beside.is_file() else {}
    eps = given.get("norm_eps", 1e-5) if isinstance(given, dict) else 1e-5
    theirs = eps * config.head_size if isinstance(eps, int | float) else HEAD_EPS
    if not math.isclose(theirs, HEAD_EPS):
        log.warning("%s: trained with epsilon %.3g in the norm of heads, here it is %.3g", path, theirs, HEAD_EPS)


def _folded(source: Source, tensors: Tensors) -> Tensors:
    """The same with every r_k as (heads, head_size); some writers lay the heads one after the other."""
    plan = {name: Piece((name,)) for name in tensors}
    for name, value in tensors.like.items():
        if name.endswith("att.r_k") and value.dim() != 2:
            size = _head_size(source, value.numel())
            if value.numel() % size:
                raise WeightsError(
                    f"{source.path}: {name} has {value.numel()} values, no multiple of head size {size}; put a"
                    ' config.json with {"head_size": ...} beside it'
                )
            plan[name] = Piece((name,), lambda value, size=size: value.reshape(-1, size))
    return tensors.made(plan)


def _first(names: list[str], what: str) -> str:
    """The first of names that are something, and how many there are besides."""
    return f"{names[0]} is {what}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _square(source: Source, tensors: Tensors) -> tuple[RwkvConfig, Tensors]:
    """Sizes of the model, and its tensors in the official shapes. Strict: nothing is missing, nothing is left over."""
    path, tensors = source.path, _folded(source, tensors)
    try:
        config = detect(tensors.like)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    if "blocks.0.ln0.weight" not in tensors and "blocks.0.ln0.bias" not in tensors:
        config = config.model_copy(update={"ln0": False})
    with torch.device("meta"):
        wanted = build(config).state_dict()
    dead = [name for name in DEAD if name in tensors and name not in wanted]
    if extra := [name for name in tensors if name not in wanted and name not in dead]:
        raise WeightsError(f"{path}: {_first(extra, 'unknown')}; merge adapters first")
    if missing := [name for name in wanted if name not in tensors]:
        whole = f"not a whole {title(config.family)} model"
        raise WeightsError(f"{path}: {_first(missing, 'missing')}; {whole}")
    plan = {}
    for name, like in wanted.items():
        value = tensors.like[name]
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise WeightsError(f"{path}: {name} has numbers of {kind}; give weights that are not quantised")
        # writers squeeze (1, 1, D) to (D,): only ones may differ
        if [n for n in value.shape if n != 1] != [n for n in like.shape if n != 1]:
            raise WeightsError(f"{path}: {name} is {tuple(value.shape)}, needed is {tuple(like.shape)}")
        plan[name] = Piece((name,), lambda value, shape=like.shape: value.reshape(shape))
    for name in dead:
        shape = (1, 1, -1) if name.endswith("v0") else tensors.like[name].shape
        plan[name] = Piece((name,), lambda value, shape=shape: value.reshape(shape))
    return config, tensors.made(plan)
