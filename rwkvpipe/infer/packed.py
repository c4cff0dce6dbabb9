"""Matrices in panels and fewer bits, for all that a model computes: reading and writing see the same numbers.

In bf16 and int8 a matrix takes half or a quarter of the memory; no copy of it as it was stays, in fp32 neither.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpipe.base.errors import ConfigError
from rwkvpipe.kernel import build
from rwkvpipe.kernel.panels import PART, Panels, Shelf, pack, times, unpack
from rwkvpipe.kernel.rounding import from_int8, to_int8

# matrices of low rank, which stand the other way round, as parameters of a time mix: small, their rounded values stay
LOW = re.compile(r"blocks\.\d+\.att\.(time_decay_)?[wavg][12]")


class Packed(nn.Module):
    """A matrix (out, in) in panels, in the place of the layer that it was."""

    def __init__(self, panels: Panels):
        super().__init__()
        self.panels = panels

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in fp32."""
        return times(x, self.panels)


class Narrow(nn.Module):
    """A matrix (out, in) in bf16 on a card, whose products take it as it is; what goes in is rounded as well."""

    def __init__(self, data: Tensor):
        super().__init__()
        self.register_buffer("data", data)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), as wide as what goes in."""
        return F.linear(x.to(self.data.dtype), self.data).to(x.dtype)


class Bytes(nn.Module):
    """A matrix (out, in) in int8 on a card, and the scale of each row: opened for each product, a part at a time."""

    def __init__(self, data: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in fp32."""
        step = max(1, PART // self.data.shape[1])
        parts = zip(self.data.split(step), self.scale.split(step), strict=True)
        return torch.cat([F.linear(x, from_int8(*part)) for part in parts], -1)


def on_card(weight: Tensor) -> bool:
    """Whether products are a card's, which reads matrices a row after the other."""
    return weight.is_cuda


def matrix(layer: nn.Module) -> Tensor:
    """The matrix (out, in) of a layer, its adapter in it."""
    return layer.weight if type(layer) is nn.Linear else layer(torch.eye(layer.weight.shape[1]).to(layer.weight)).mT


def kind_of(model: nn.Module) -> str | None:
    """What a model's matrices are kept in; None if they lie as PyTorch has them."""
    return getattr(model, "kind", None)


@torch.no_grad()
def keep(model: nn.Module, kind: str) -> None:
    """Keep the matrices of a model in panels from now on, adapters merged in; the embedding stays as it is.

    `model.packed` then holds them by name, on a card those of low rank. In fp32 they stay as they are where nothing
    native would read them. Raises ConfigError for a model that is in other bits already.
    """
    if kind_of(model) == kind or (kind == "fp32" and build.native(*model.parameters()) is None):
        return
    if kind_of(model) is not None:
        raise ConfigError(f"weights: this model's are kept in {kind_of(model)} already; load it anew for {kind}")
    model.kind, model.packed = kind, {}
    names = [name for name, layer in model.named_modules() if _is_matrix(layer)]
    low = [(name, value) for name, value in model.named_parameters() if LOW.fullmatch(name)]
    sizes = [tuple(model.get_submodule(name).weight.shape) for name in names]
    sizes += [tuple(value.mT.shape) for _, value in low]
    shelf = Shelf(sizes, kind) if next(model.parameters()).device.type == "cpu" else None
    for name in names:  # as each takes its place, the matrix that it was goes
        layer = model.get_submodule(name)
        if on_card(layer.weight):
            packed = Narrow(matrix(layer).bfloat16()) if kind == "bf16" else Bytes(*to_int8(matrix(layer).float()))
        else:
            model.packed[name] = pack(matrix(layer).float(), kind, shelf)
            packed = Packed(model.packed[name])
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, packed.train(layer.training))
        del layer
    for name, value in low:
        model.packed[name] = pack(value.mT, kind, shelf)
        value.copy_(unpack(model.packed[name]).mT)


def _is_matrix(layer: nn.Module) -> bool:
    """Whether it is a layer of a matrix, with an adapter or without."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(layer, nn.Embedding)
