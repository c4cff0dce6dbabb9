"""What surrounds the recurrence of RWKV-7, element by element: natively in one pass each, or in PyTorch.

Each function gives the same either way. The native forms (`cuda/blend_cpu.cpp`) keep only their inputs for the backward
and compute the rest again; they take fp32 on the CPU. NVIDIA's cards have forms of their own, for bf16 too, which is
what the products of a card in mixed precision give (kernel/passes.py). Tensors are (B, T, D), rows that all tokens
share (1, 1, D).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpipe.kernel import build, passes

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
    on_card = passes.fit(k, w, a, *rows, width=k.shape[-1] // heads)
    if on_card or (k.numel() and build.native(k, w, a, *rows)):
        found = (passes.Prepare if on_card else _Prepare).apply(heads, k, w, a, *rows)
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
        return _Lean.apply(v, first, part, v0)
    return torch.lerp(v, first, torch.sigmoid(v0 + part).to(v.dtype))


def finish(y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, rows: Sequence[Tensor], eps: float) -> Tensor:
    """Each head of y normalised, a bonus of the token for itself added, all times the gate: (B, T, D).

    y, r, k, v (B, T, H, N), gate (B, T, D); rows: r_k (H, N), and the norm's weight and bias (D).
    """
    y, r, k, v, gate = widened(rows[0], y, r, k, v, gate)
    if passes.fit(y, r, k, v, gate, *rows, width=y.shape[-1]):
        return passes.Finish.apply(eps, y, r, k, v, gate, *rows)
    if y.numel() and build.native(y, r, k, v, gate, *rows):
        return _Finish.apply(eps, y, r, k, v, gate, *rows)
    r_k, weight, bias = rows
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    normed = F.layer_norm(y.to(weight.dtype), y.shape[-1:], eps=eps)
    return ((torch.addcmul(bias, normed.flatten(-2), weight) + bonus.flatten(-2)) * gate).to(gate.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    if passes.fit(x):
        return passes.Square.apply(x)
    if x.numel() and build.native(x):
        return _Square.apply(x)
    return x.relu().square()


def widened(row: Tensor, *inputs: Tensor) -> list[Tensor]:
    """On the CPU, what products rounded goes on in fp32, as the weights beside it are, and as native forms take it."""
    wide = row.dtype == torch.float32 and row.device.type == "cpu"
    return [x.float() for x in inputs] if wide else list(inputs)


def without_gaps(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers, as native code takes them."""
    return [x.contiguous() for x in tensors]


def sums_of(tokens: int, *rows: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the sums of each task, one row after the other, and for those of all."""
    width = sum(row.numel() for row in rows)
    like = rows[0]
    return like.new_empty(build.extension().blend_tasks(build.whole(tokens)), width), like.new_empty(width)


def apart(total: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """The sums of each row out of those of all."""
    parts = total.split([row.numel() for row in rows])
    return [part.view_as(row) for part, row in zip(parts, rows, strict=True)]


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
        dx, dlast, sums = torch.empty_like(x), torch.empty_like(last), sums_of(x.shape[0] * x.shape[1], *shares)
        build.call("mix_backward", (*x.shape, len(shares)), x, last, shares, without_gaps(grads), dx, dlast, *sums)
        return dx, dlast, *apart(sums[1], shares)


class _Prepare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, heads, *inputs):
        inputs = without_gaps(inputs)
        ctx.save_for_backward(*inputs)
        k = inputs[0]
        ctx.sizes = (k.shape[0] * k.shape[1], heads, k.shape[2] // heads)
        out = tuple(torch.empty_like(k) for _ in range(4))
        build.call("prepare_forward", ctx.sizes, *inputs, *out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        inputs = ctx.saved_tensors
        found, sums = [torch.empty_like(x) for x in inputs[:3]], sums_of(ctx.sizes[0], *inputs[3:])
        build.call("prepare_backward", ctx.sizes, *inputs, *without_gaps(grads), *found, *sums)
        return None, *found, *apart(sums[1], inputs[3:])


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        inputs = without_gaps(inputs)
        ctx.save_for_backward(*inputs)
        v = inputs[0]
        ctx.sizes, out = (v.shape[0] * v.shape[1], v.shape[2]), torch.empty_like(v)
        build.call("lean_forward", ctx.sizes, *inputs, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        found, sums = [torch.empty_like(x) for x in inputs[:3]], sums_of(ctx.sizes[0], inputs[3])
        build.call("lean_backward", ctx.sizes, *inputs, grad.contiguous(), *found, *sums)
        return *found, *apart(sums[1], inputs[3:])


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, eps, *inputs):
        inputs = without_gaps(inputs)
        ctx.save_for_backward(*inputs)
        y, gate = inputs[0], inputs[4]
        ctx.sizes, ctx.eps, out = (y.shape[0] * y.shape[1], *y.shape[2:]), eps, torch.empty_like(gate)
        build.call("finish_forward", ctx.sizes, *inputs, eps, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        found, sums = [torch.empty_like(x) for x in inputs[:5]], sums_of(ctx.sizes[0], *inputs[5:])
        build.call("finish_backward", ctx.sizes, *inputs, ctx.eps, grad.contiguous(), *found, *sums)
        return None, *found, *apart(sums[1], inputs[5:])


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        build.call("square_forward", (x.numel(),), x, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        found = torch.empty_like(x)
        build.call("square_backward", (x.numel(),), x, grad.contiguous(), found)
        return found
