"""Matrices in fewer bits, for all that a model computes: what is read and what is written see the same rounded numbers.

A matrix takes half or a quarter of the memory, and no copy of it in fp32 stays.
"""

import re
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpipe.base.errors import ConfigError
from rwkvpipe.kernel.rounding import from_int8, to_int8

KINDS = ("fp32", "bf16", "int8")
PART = 1 << 24  # numbers that are in fp32 at a time
# matrices of low rank, which stand the other way round, as parameters of a time mix: small, their rounded values stay
LOW = re.compile(r"blocks\.\d+\.att\.(time_decay_)?[wavg][12]")


def pack(matrix: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """A matrix in fewer bits, and for int8 the scale of each row, whose largest number becomes 127."""
    if kind == "bf16":
        return matrix.bfloat16(), None
    if kind == "int8":
        return to_int8(matrix)
    return matrix, None


def unpack(data: Tensor, scale: Tensor | None) -> Tensor:
    """The rounded matrix, in fp32."""
    return data.float() if scale is None else from_int8(data, scale)


class Packed(nn.Module):
    """A matrix (out, in) in fewer bits, in the place of the layer that it was."""

    def __init__(self, data: Tensor, scale: Tensor | None):
        super().__init__()
        self.data, self.scale = data, scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in fp32."""
        step = max(1, PART // self.data.shape[1])
        scales = [None] if self.scale is None else self.scale.split(step)
        parts = zip(self.data.split(step), cycle(scales), strict=False)
        return torch.cat([F.linear(x, unpack(data, scale)) for data, scale in parts], -1)


def matrix(layer: nn.Module) -> Tensor:
    """The matrix (out, in) of a layer, its adapter in it."""
    return layer.weight if type(layer) is nn.Linear else layer(torch.eye(layer.weight.shape[1]).to(layer.weight)).mT


def kind_of(model: nn.Module) -> str:
    """What a model's matrices are kept in."""
    return getattr(model, "kind", "fp32")


@torch.no_grad()
def keep(model: nn.Module, kind: str) -> None:
    """Keep the matrices of a model in fewer bits from now on, adapters merged in; the embedding stays as it is.

    `model.packed` then holds them by name. Raises ConfigError for a model that is in other bits already.
    """
    if kind_of(model) == kind:
        return
    if kind_of(model) != "fp32":
        raise ConfigError(f"weights: this model's are kept in {kind_of(model)} already; load it anew for {kind}")
    model.kind, model.packed = kind, {}
    for name, layer in list(model.named_modules()):
        weight = getattr(layer, "weight", None)  # a layer's, with an adapter or without
        if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(layer, nn.Embedding):
            model.packed[name] = pack(matrix(layer).float(), kind)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Packed(*model.packed[name]))
    for name, value in model.named_parameters():
        if LOW.fullmatch(name):
            model.packed[name] = pack(value.mT, kind)
            value.copy_(unpack(*model.packed[name]).mT)
