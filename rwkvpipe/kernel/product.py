"""Products of matrices in training on the CPU: of numbers as they are, or rounded to 16 bits; sums are fp32 either way.

Where the processor has no product of bf16, numbers are rounded to it and multiplied in fp32: what torch does there
instead takes three times as long as fp32, and this takes as long. Where it has one, results are rounded, too.
"""

import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

log = logging.getLogger("rwkvpipe")


@cache
def has_bf16() -> bool:
    """Whether this processor multiplies bf16 by itself."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        asked = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        return any(each() for each in asked if each is not None)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def announce() -> None:
    """Say once what bf16 means here."""
    if has_bf16():
        log.info("products: bf16 by this processor, sums in fp32")
    else:
        log.info("products: rounded to bf16, and fp32: this processor has no product of bf16, so it saves no time here")


@dataclass(frozen=True)
class Products:
    """How matrices are multiplied."""

    dtype: torch.dtype | None = None
    """What numbers are rounded to; None is as they are."""
    narrow: bool = True
    """Whether they are multiplied in it, too; else in fp32."""

    @classmethod
    def of(cls, dtype: torch.dtype | None, device: torch.device) -> "Products":
        """The fastest on a device."""
        return cls(dtype, device.type != "cpu" or dtype != torch.bfloat16 or has_bf16())

    def take(self, x: Tensor) -> Tensor:
        """Numbers as `mm` multiplies them."""
        if self.dtype is None:
            return x
        rounded = x.to(self.dtype)
        return rounded if self.narrow else rounded.float()

    def mm(self, a: Tensor, b: Tensor) -> Tensor:
        """The product (..., n, m) of what `take` gave, (..., n, k) and (k, m), in fp32."""
        found = a @ b
        return found.float() if found.dtype == self.dtype else found

    def put(self, into: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
        """The product (n, m) of (n, k) and (k, m) written where it is to be, or added to what is there."""
        if a.dtype == into.dtype:
            torch.addmm(into, a, b, beta=float(add), out=into)
        elif add:
            into += a @ b
        else:
            into.copy_(a @ b)


def asked() -> Products:
    """How products of fp32 on the CPU are to be computed: as torch's autocast says."""
    if not torch.is_autocast_enabled("cpu"):
        return Products()
    announce()
    return Products.of(torch.get_autocast_dtype("cpu"), torch.device("cpu"))


def exactly(function: Callable) -> Callable:
    """What computes as it says, inside autocast too."""

    @wraps(function)
    def plain(*words):
        if not torch.is_autocast_enabled("cpu"):
            return function(*words)
        with torch.autocast("cpu", enabled=False):
            return function(*words)

    return plain


def linear(x: Tensor, matrix: Tensor) -> Tensor:
    """x (..., k) times a matrix (k, m): rounded, on the CPU, where autocast asks for it."""
    how = asked()
    if how.dtype is None or x.device.type != "cpu" or matrix.dtype == torch.float64:
        return x @ matrix
    return _Linear.apply(how, x, matrix)


def through(layer: nn.Module, x: Tensor) -> Tensor:
    """The same with the matrix of a layer; one that is more than a matrix sees to it itself."""
    plain = type(layer) is nn.Linear and layer.bias is None and torch.is_autocast_enabled("cpu")
    return linear(x, layer.weight.mT) if plain else layer(x)


class _Linear(torch.autograd.Function):
    @staticmethod
    @exactly
    def forward(ctx, how, x, matrix):
        ctx.how = how
        ctx.save_for_backward(x, matrix)
        return how.mm(how.take(x), how.take(matrix))

    @staticmethod
    @once_differentiable
    @exactly
    def backward(ctx, grad):
        (x, matrix), how, grad = ctx.saved_tensors, ctx.how, ctx.how.take(grad)
        dx = how.mm(grad, how.take(matrix).mT) if ctx.needs_input_grad[1] else None
        dmatrix = how.mm(how.take(x).flatten(0, -2).mT, grad.flatten(0, -2)) if ctx.needs_input_grad[2] else None
        return None, dx, dmatrix
