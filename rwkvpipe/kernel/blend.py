"""What surrounds the recurrence of RWKV-7, element by element: natively in one pass each, or in PyTorch.

Each function gives the same either way. The native forms (`cuda/blend_cpu.cpp`) keep only their inputs for the backward
and compute the rest again; they take fp32 on the CPU. NVIDIA's cards have forms of their own, for bf16 too, which is
what the products of a card in mixed precision give (kernel/passes.py). Tensors are (B, T, D), rows that all tokens
share (1, 1, D).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpipe.kernel import build, passes
from rwkvpipe.kernel.passes import without_gaps

COUNTS = (1, 2, 4, 5, 6)  # of mixes that native code makes at a time
Places = tuple[Tensor, ...]
"""Indices of tokens: of their rows, and of their places within."""


def mix(x: Tensor, last: Tensor, shares: Sequence[Tensor], alone: Places | None = None) -> list[Tensor]:
    """x + (before - x) share for each share (1, 1, D); `before` is x a token earlier, and last (B, D) for the first.

    To tokens at the places `alone` it is 0: there documents begin.
    """
    if passes.alike(x, *shares):
        found = list(passes.Mix.apply(passes.to_products(x), x, last.to(x.dtype), *shares))
    elif x.numel() and len(shares) in COUNTS and build.native(x, last, *shares):
        found = list(_Mix.apply(x, last, *shares))
    else:
        dx = torch.cat((last.to(x.dtype)[:, None], x[:, :-1]), 1) - x
        found = [torch.addcmul(x, dx, share) for share in shares]
    return found if alone is None else unmixed(found, x, [share[0] for share in shares], alone)


def unmixed(found: Sequence[Tensor], x: Tensor, shares: Sequence[Tensor], places: Places) -> list[Tensor]:
    """The same, but x (1 - share) at some places; shares (D) or (places, D)."""
    here = x[places]
    return [y.index_put_(places, (here - here * share).to(y.dtype)) for y, share in zip(found, shares, strict=True)]


def prepare(k: Tensor, w: Tensor, a: Tensor, rows: Sequence[Tensor], heads: int) -> tuple[Tensor, ...]:
    """w, k, a and b of the recurrence, (B, T, H, N), from keys and what low ranks say of decay and rate.

    rows: w0, a0, k_k, k_a. The soft clamp: w <= -0.5, so that no decay is below 0.545.
    """
    k, w, a = widened(rows[0], k, w, a)
    width = k.shape[-1] // heads
    on_card = passes.fit(k, w, a, *rows, width=width)
    if on_card or (k.numel() and build.native(k, w, a, *rows)):
        natively = Pass("prepare", (k.shape[:2].numel(), heads, width), rows=4, results=4)
        found = passes.Prepare.apply(heads, k, w, a, *rows) if on_card else natively(k, w, a, *rows)
        return tuple(y.unflatten(-1, (heads, -1)) for y in found)
    kind, (w0, a0, k_k, k_a) = k.dtype, rows
    w, rate = F.logsigmoid(w0 + w) - 0.5, torch.sigmoid(a0 + a)
    kk = F.normalize((k * k_k).unflatten(-1, (heads, -1)), dim=-1)
    k, w, rate = ((x.unflatten(-1, (heads, -1))) for x in (k * (1 + (rate - 1) * k_a), w, rate))
    return w, *(x.to(kind) for x in (k, -kk, kk * rate))


def lean(v: Tensor, first: Tensor, part: Tensor, v0: Tensor) -> Tensor:
    """v, moved towards `first` by the share sigmoid(v0 + part)."""
    v, first, part = widened(v0, v, first, part)
    if passes.fit(v, first, part, v0):
        return passes.Lean.apply(v, first, part, v0)
    if v.numel() and build.native(v, first, part, v0):
        return Pass("lean", (v.shape[:2].numel(), v.shape[2]), rows=1)(v, first, part, v0)
    return torch.lerp(v, first, torch.sigmoid(v0 + part).to(v.dtype))


def finish(y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, rows: Sequence[Tensor], eps: float) -> Tensor:
    """Each head of y normalised, a bonus of the token for itself added, all times the gate: (B, T, D).

    y, r, k, v (B, T, H, N), gate (B, T, D); rows: r_k (H, N), and the norm's weight and bias (D).
    """
    y, r, k, v, gate = widened(rows[0], y, r, k, v, gate)
    if passes.fit(y, r, k, v, gate, *rows, width=y.shape[-1]):
        return passes.Finish.apply(eps, y, r, k, v, gate, *rows)
    if y.numel() and build.native(y, r, k, v, gate, *rows):
        sizes = (y.shape[:2].numel(), *y.shape[2:])
        return Pass("finish", sizes, rows=3, numbers=(eps,))(y, r, k, v, gate, *rows)
    r_k, weight, bias = rows
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    normed = F.layer_norm(y.to(weight.dtype), y.shape[-1:], eps=eps)
    return ((torch.addcmul(bias, normed.flatten(-2), weight) + bonus.flatten(-2)) * gate).to(gate.dtype)


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Each token of x (..., D) normalised, times weight (D), plus bias (D)."""
    if x.numel() and build.native(x, weight, bias):
        width = x.shape[-1]
        return Pass("norm", (x.numel() // width, width), rows=2, numbers=(eps,))(x, weight, bias)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    if passes.fit(x):
        return passes.Square.apply(x)
    if x.numel() and build.native(x):
        return Pass("square", (x.numel(),))(x)
    return x.relu().square()


def widened(row: Tensor, *inputs: Tensor) -> list[Tensor]:
    """On the CPU, what products rounded goes on in fp32, as the weights beside it are, and as native forms take it."""
    wide = row.dtype == torch.float32 and row.device.type == "cpu"
    return [x.float() for x in inputs] if wide else list(inputs)


def sums_of(tokens: int, *rows: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the sums of each task, one row after the other, and for those of all."""
    width = sum(row.numel() for row in rows)
    like = rows[0]
    return like.new_empty(build.extension().blend_tasks(build.whole(tokens)), width), like.new_empty(width)


def apart(total: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """The sums of each row out of those of all."""
    parts = total.split([row.numel() for row in rows])
    return [part.view_as(row) for part, row in zip(parts, rows, strict=True)]


def mix_gradients(x: Tensor, last: Tensor, shares: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of x, last and shares, natively, from the gradients of their mixes."""
    dx, dlast, sums = torch.empty_like(x), torch.empty_like(last), sums_of(x.shape[:2].numel(), *shares)
    build.call("mix_backward", (*x.shape, len(shares)), x, last, shares, grads, dx, dlast, *sums)
    return dx, dlast, *apart(sums[1], shares)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, last, *shares):
        x, last, *shares = without_gaps((x, last, *shares))
        ctx.save_for_backward(x, last, *shares)
        out = [torch.empty_like(x) for _ in shares]
        build.call("mix_forward", (*x.shape, len(shares)), x, last, shares, out)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, last, *shares = ctx.saved_tensors
        return mix_gradients(x, last, shares, without_gaps(grads))


@dataclass(frozen=True)
class Pass:
    """A native function over all tokens, called with its inputs; only these are kept for the backward, another one."""

    name: str
    sizes: Sequence[int]
    """As both functions take them: how many tokens (without rows, numbers) there are, and how wide these are."""
    rows: int = 0
    """How many of the inputs, the last ones, all tokens share."""
    numbers: Sequence[float] = ()
    """What is given behind the inputs."""
    results: int = 1
    """How many there are, each like the last input that is not shared."""

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The results; a single one as it is."""
        found = _Pass.apply(self, *inputs)
        return found if self.results > 1 else found[0]


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, way, *inputs):
        inputs = without_gaps(inputs)
        ctx.save_for_backward(*inputs)
        ctx.way, like = way, inputs[-1 - way.rows]
        out = tuple(torch.empty_like(like) for _ in range(way.results))
        build.call(f"{way.name}_forward", way.sizes, *inputs, *way.numbers, *out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        inputs, way = ctx.saved_tensors, ctx.way
        count = len(inputs) - way.rows
        found, rows = [torch.empty_like(x) for x in inputs[:count]], inputs[count:]
        sums = sums_of(way.sizes[0], *rows) if rows else ()
        build.call(f"{way.name}_backward", way.sizes, *inputs, *way.numbers, *without_gaps(grads), *found, *sums)
        return None, *found, *(apart(sums[1], rows) if rows else ())
