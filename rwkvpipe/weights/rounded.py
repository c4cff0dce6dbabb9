"""Frozen matrices in few bits, for training adapters beside them: opened for each product, never kept open.

bf16: what most weights are released in, so that nothing is lost. int8: each number a whole multiple of a 127th of its
row's largest. nf4 (Dettmers et al. 2023, arXiv 2305.14314): each 64 numbers in a row of memory divided by the largest
and rounded to 16 levels between -1 and 1 that are evenly likely for normally distributed numbers; two in a byte.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkvpipe.kernel.product import asked
from rwkvpipe.kernel.rounding import from_int8, to_int8

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
PART = 1 << 22  # numbers that are rounded at a time


@dataclass(frozen=True)
class Rounded:
    """A matrix of a shape (out, in) in few bits: its numbers as `data`, what they are multiplied by as `scale`."""

    kind: str
    shape: tuple[int, int]
    data: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.data.nbytes + self.scale.nbytes

    def moved(self, change) -> "Rounded":
        """The same on another device: `change` of each tensor."""
        return replace(self, data=change(self.data), scale=change(self.scale))

    def open(self) -> Tensor:
        """The matrix, in fp32."""
        if self.kind == "bf16":
            return self.data.float()
        if self.kind == "int8":
            return from_int8(self.data, self.scale)
        levels = torch.tensor(LEVELS, device=self.data.device)
        pairs = torch.stack((self.data >> 4, self.data & 15), -1)  # (bytes, 2)
        blocks = levels[pairs.flatten().int()].view(-1, BLOCK) * self.scale[:, None]
        return blocks.flatten()[: self.shape[0] * self.shape[1]].view(self.shape)


def in_few_bits(model: nn.Module) -> list[Rounded]:
    """Matrices of a model that are kept in few bits, and so are no parameters of it."""
    return [module.rounded for module in model.modules() if getattr(module, "rounded", None) is not None]


def numbers(model: nn.Module) -> int:
    """How many numbers a model has, those that are rounded too."""
    return sum(value.numel() for value in model.parameters()) + sum(math.prod(few.shape) for few in in_few_bits(model))


def rounded(matrix: Tensor, kind: str) -> Rounded:
    """A matrix (out, in) in few bits: `bf16`, `int8` or `nf4`."""
    if kind == "bf16":
        return Rounded(kind, tuple(matrix.shape), matrix.bfloat16(), matrix.new_empty(0))
    if kind == "int8":
        return Rounded(kind, tuple(matrix.shape), *to_int8(matrix))
    levels = torch.tensor(LEVELS, device=matrix.device)
    numbers = matrix.flatten()
    parts = [_nf4(part, levels) for part in numbers.split(PART)]
    data, scale = (torch.cat(found) for found in zip(*parts, strict=True))
    return Rounded(kind, tuple(matrix.shape), data, scale)


def _nf4(numbers: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes and scales of some numbers in a row; what is missing in the last block is zeros."""
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1).clamp(min=1e-30)
    borders = (levels[1:] + levels[:-1]) / 2
    places = torch.bucketize(blocks / scale[:, None], borders, out_int32=True).to(torch.uint8).view(-1, 2)
    return (places[:, 0] << 4) | places[:, 1], scale


def product(x: Tensor, matrix: Rounded) -> Tensor:
    """(..., in) to (..., out): what `linear` gives with the matrix opened, which the backward opens again."""
    return _Product.apply(x, matrix)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, matrix):
        kind = x.device.type
        ctx.matrix, ctx.given = matrix, x.dtype
        ctx.how = asked() if kind == "cpu" and x.dtype != torch.float64 else None
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            return _times(x, matrix.open().mT, ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return _times(grad, ctx.matrix.open(), ctx).to(ctx.given), None


def _times(x: Tensor, matrix: Tensor, ctx) -> Tensor:
    if ctx.how is not None:
        return ctx.how.mm(ctx.how.take(x), ctx.how.take(matrix))
    return x.to(ctx.dtype) @ matrix.to(ctx.dtype)
