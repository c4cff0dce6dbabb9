"""Products of matrices on the CPU: of numbers as they are, or rounded to 16 bits; sums are fp32 either way.

Those of fp32 are torch's or, where kernel/choice.py chose them, our own (`cuda/product_cpu.cpp`). Numbers rounded to
bf16 are multiplied in fp32: where the processor has no product of bf16, what torch does instead takes three times as
long, and one with AVX-512 BF16 alone may take twice as long, too. Where kernel/choice.py found the processor's own
product to be faster it computes: by way of torch, which rounds results as well, or in our kernel, which rounds numbers
as it reads them and leaves sums in fp32.

Or, where that is fastest, what may be rounded to bf16 is rounded to whole numbers instead, which many a processor
multiplies twice as fast as fp32 (VNNI). BLOCK numbers along what is added up share a factor that makes the largest of
them MOST, about 12 bits. So the RMS of a product's error beside its own is at most sqrt(BLOCK / 12) / MOST = 1.6e-3 for
each of the two that are rounded, where all but one number of a block are next to nothing, and about 3e-4 for normal
ones; bf16 makes it 1.7e-3. Sums of products of a block are exact.
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, wraps

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkvpipe.kernel import build

BLOCK, MOST = 256, 2895  # as cuda/fixed.h has them: BLOCK MOST^2 < 2^31
LEAST = 3.4e-34  # a smaller largest number counts as this
LARGEST = 8192.0  # what n numbers times the largest of x come to in fp16, which holds eight times as much
SPREAD = 128  # whole numbers: how many products of one save the time that rounding it takes
_chosen: list[str] = []  # the newest last


@cache
def has_bf16() -> bool:
    """Whether this processor multiplies bf16 by itself."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return build.supports("avx512_bf16") or build.supports("amx_tile")
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose(name: str) -> None:
    """Have products computed by `torch` or by our `own` kernel, or those of bf16 by the processor's as torch or we
    (`bf16+own`) have them, or of `whole` numbers instead, from now on."""
    _chosen[:] = [name]


def chosen() -> str | None:
    """Whose products compute: `torch`, `own`, `bf16`, `bf16+own`, `whole`, or `whole+own`, where our own compute what
    is not worth rounding to whole numbers; None is torch's of fp32, as nothing else was said."""
    return _chosen[-1] if _chosen else None


def _is_chosen(name: str) -> bool:
    return name in (chosen() or "").split("+")


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch computes on one thread: what it multiplies and factors on more has other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Products:
    """How matrices are multiplied."""

    dtype: torch.dtype | None = None
    """What numbers are rounded to; None is as they are."""
    narrow: bool = True
    """Whether they are multiplied in it, too; else in fp32."""
    own: bool = False
    """Whether products are our own, which have the same bits at any number of threads; torch promises none."""
    whole: bool = False
    """Whether what may be rounded becomes whole numbers, where they are worth it; nothing is rounded else."""

    @classmethod
    def of(cls, dtype: torch.dtype | None, device: torch.device) -> "Products":
        """The fastest on a device."""
        if device.type == "cpu" and dtype == torch.bfloat16:
            return cls.by(chosen(), dtype)
        return cls(dtype, own=device.type == "cpu" and _is_chosen("own"))

    @classmethod
    def by(cls, name: str | None, dtype: torch.dtype | None) -> "Products":
        """Those of the processor that `choose` names so."""
        return cls(dtype, *(each in (name or "").split("+") for each in ("bf16", "own", "whole")))

    @property
    def late(self) -> bool:
        """Whether our own products round numbers as they read them, not `take` before."""
        return self.whole or (self.own and self.narrow and self.dtype == torch.bfloat16)

    @property
    def of_steps(self) -> "Products":
        """Those of the gradients of logits, most of them tiny beside one: a block of whole numbers would lose them."""
        return replace(self, dtype=None, whole=False) if self.whole else self

    def take(self, x: Tensor) -> Tensor:
        """Numbers as `mm` multiplies them."""
        if self.dtype is None:
            return x
        if self.late:
            return x.float()
        rounded = x.to(self.dtype)
        return rounded if self.narrow else rounded.float()

    def mm(self, a: Tensor, b: Tensor) -> Tensor:
        """The product (..., n, m) of what `take` gave, (..., n, k) and (k, m), in fp32."""
        way = self._way(a, b)
        if way is not None:
            return self._multiplied(a.new_empty(*a.shape[:-1], b.shape[1]), a, b, way)
        found = a @ b
        return found.float() if found.dtype == self.dtype else found

    def summed(self, steps: Tensor, x: Tensor) -> Tensor:
        """The product (V, D) of gradients of logits (n, V), turned, and x (n, D), as `take` gave both, in fp32.

        For fp16 x is made smaller before, by a power of two: a sum over positions may be more than it holds.
        """
        if self.dtype != torch.float16:
            return self.mm(steps.mT, x)
        most = (len(x) * x.abs().amax().float()).clamp(min=LARGEST)
        by = torch.exp2(torch.floor(torch.log2(LARGEST / most)))
        return self.mm(steps.mT, x * by.to(x.dtype)) / by

    def put(self, into: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
        """The product (n, m) of (n, k) and (k, m) written where it is to be, or added to what is there."""
        way = self._way(a, b) if into.is_contiguous() else None
        if way is not None:
            self._multiplied(into, a, b, way, add=add)
        elif a.dtype == into.dtype:
            torch.addmm(into, a, b, beta=float(add), out=into)
        elif add:
            into += a @ b
        else:
            into.copy_(a @ b)

    def _way(self, a: Tensor, b: Tensor) -> str | None:
        """How we multiply these: numbers as they are (`plain`), or rounded to `bf16` or `whole` ones; None is torch."""
        if not (self.own or self.whole) or b.dim() != 2 or a.dtype != torch.float32 or not a.numel() * b.shape[1]:
            return None
        if self.whole:
            n, (k, m) = a.numel() // a.shape[-1], b.shape
            if n * m >= SPREAD * (n + m) and 2 * k >= SPREAD:  # it is worth it
                return "whole"
        elif self.late:
            return "bf16"
        return "plain" if self.own and build.native(a, b) else None

    def _multiplied(self, into: Tensor, a: Tensor, b: Tensor, way: str, *, add: bool = False) -> Tensor:
        library = build.native(a, b)
        if way == "whole" and not library:
            a, b, way = evened(a, -1), evened(b, 0), "plain"
        elif way == "bf16" and not (library and library.multiply_bf16()):
            a, b, way = paired(a.to(self.dtype), -1).float(), paired(b.to(self.dtype), 0).float(), "plain"
        if library:
            return _multiply(a, b, into, add, way)
        return into.add_(a @ b) if add else into.copy_(a @ b)


def evened(x: Tensor, dim: int) -> Tensor:
    """Numbers as whole ones stand for them, BLOCK of them along `dim`: the plain form of what native code rounds."""
    found = x.movedim(dim, -1)
    parts = []
    for part in found.split(BLOCK, -1):
        by = part.abs().amax(-1, keepdim=True).clamp(min=LEAST) / MOST  # NaN stays, and infinity becomes it
        parts.append((part / by).round() * by)
    return torch.cat(parts, -1).movedim(-1, dim) if parts else x


def paired(x: Tensor, dim: int) -> Tensor:
    """Numbers in the order, along `dim`, in which the processor's product of bf16 adds up theirs: two by two, of which
    the second comes first. Their products are exact in fp32, so in this order sums have the same bits."""
    found = x.movedim(dim, -1)
    found = nn.functional.pad(found, (0, found.shape[-1] % 2))
    return found.unflatten(-1, (-1, 2)).flip(-1).flatten(-2).movedim(-1, dim)


def _multiply(a: Tensor, b: Tensor, into: Tensor, add: bool, way: str) -> Tensor:
    """The product of (..., n, k) and (k, m), of which both may be seen turned, where it is to be."""
    (x, x_turned), (matrix, turned) = _as_it_lies(a), _as_it_lies(b)
    sizes = (a.numel() // a.shape[-1], *b.shape, x_turned, turned, add, ("plain", "whole", "bf16").index(way))
    build.call("multiply", sizes, x, matrix, into)
    return into


def _as_it_lies(x: Tensor) -> tuple[Tensor, bool]:
    """What lies in memory without gaps, and whether that is x turned."""
    if not x.is_contiguous() and x.dim() == 2 and x.mT.is_contiguous():
        return x.mT, True
    return x.contiguous(), False


def asked() -> Products:
    """How products of fp32 on the CPU are to be computed: as torch's autocast says, and as was chosen."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return Products.of(dtype, torch.device("cpu"))


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
    """x (..., k) times a matrix (k, m): on the CPU rounded where autocast asks for it, and as was chosen."""
    how = asked()
    if (how.dtype is None and not how.own) or x.device.type != "cpu" or matrix.dtype == torch.float64:
        return x @ matrix
    return _Linear.apply(how, x, matrix)


def through(layer: nn.Module, x: Tensor) -> Tensor:
    """The same with the matrix of a layer; one that is more than a matrix sees to it itself."""
    plain = type(layer) is nn.Linear and layer.bias is None
    plain = plain and (torch.is_autocast_enabled("cpu") or _is_chosen("own"))
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
