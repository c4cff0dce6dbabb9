"""What surrounds the recurrences on NVIDIA cards, one pass each (`cuda/blend.cu`, `prepare.cu`, `finish.cu`).

blend.py and gate.py say what is computed. Of each tensor fp32 or bf16 is taken, and gradients are like what they are
of; all in between is fp32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpipe.kernel import gpu


def fit(*inputs: Tensor, width: int = 1) -> bool:
    """Whether our kernels take these, and heads so wide: on one card that has them, in fp32 or bf16. A line says so."""
    first = inputs[0]
    if first.numel() == 0 or first.dtype not in gpu.KINDS or gpu.at_hand(first.device)[0] is None:
        return False
    if width > gpu.WIDEST or any(x.device != first.device or x.dtype not in gpu.KINDS for x in inputs):
        return False
    gpu.announce("what surrounds the recurrence", first.device)
    return True


def alike(*inputs: Tensor) -> bool:
    """Whether all are of one kind, and `fit`."""
    return all(x.dtype == inputs[0].dtype for x in inputs) and fit(*inputs)


def to_products(x: Tensor) -> torch.dtype:
    """What products of matrices round x to: then a pass before them may write no more than that."""
    device = x.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return kind if kind in gpu.KINDS else x.dtype


def without_gaps(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same numbers, as kernels and native code take them."""
    return [x if x is None else x.contiguous() for x in tensors]


def apart(sums: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of rows that all tokens share, out of the sums of some tokens each."""
    found = sums.view(-1, len(rows), rows[0].numel()).sum(0)
    return [one.view_as(row).to(row.dtype) for one, row in zip(found, rows, strict=True)]


class Mix(torch.autograd.Function):
    """`blend.mix` of x (B, T, D), last (B, D) and up to six shares (1, 1, D), all of one kind, into another."""

    @staticmethod
    def forward(ctx, kind, x, last, *shares):
        x, last, *shares = without_gaps((x, last, *shares))
        ctx.save_for_backward(x, last, *shares)
        ctx.sizes = (*x.shape, len(shares), gpu.halves(x), int(kind == torch.bfloat16))
        out = [torch.empty_like(x, dtype=kind) for _ in shares]
        gpu.call("mix_forward", ctx.sizes, x, last, shares, out)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, last, *shares = ctx.saved_tensors
        dx, dlast, sums = torch.empty_like(x), torch.empty_like(last), gpu.floats("mix_sums", ctx.sizes, x)
        gpu.call("mix_backward", ctx.sizes, x, last, shares, without_gaps(grads), dx, dlast, sums)
        return None, dx, dlast, *apart(sums, shares)


class Square(torch.autograd.Function):
    """max(x, 0)^2."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        gpu.call("square", (x.numel(), gpu.halves(x)), x, None, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        found = torch.empty_like(x)
        gpu.call("square", (x.numel(), gpu.halves(x)), x, grad.contiguous(), found)
        return found


class Lean(torch.autograd.Function):
    """`blend.lean` of v, first and part (B, T, D) and v0 (1, 1, D); what comes out is of the kind of v."""

    @staticmethod
    def forward(ctx, *inputs):
        inputs = without_gaps(inputs)
        ctx.save_for_backward(*inputs)
        v = inputs[0]
        ctx.sizes, out = (v.shape[0] * v.shape[1], v.shape[2], gpu.halves(*inputs)), torch.empty_like(v)
        gpu.call("lean_forward", ctx.sizes, *inputs, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        found, sums = [torch.empty_like(x) for x in inputs[:3]], gpu.floats("lean_sums", ctx.sizes, grad)
        gpu.call("lean_backward", ctx.sizes, *inputs, grad.contiguous(), *found, sums)
        return *found, *apart(sums, inputs[3:])


class Prepare(torch.autograd.Function):
    """`blend.prepare` with its tensors one by one: the decay as wide as rows are, the rest of the kind of k."""

    @staticmethod
    def forward(ctx, heads, *inputs):
        inputs = without_gaps(inputs)
        k, zw, _, w0 = inputs[:4]
        B, T, D = k.shape
        out = [torch.empty_like(k) for _ in range(4)]
        out[0] = torch.empty_like(k, dtype=torch.promote_types(zw.dtype, w0.dtype))
        ctx.sizes = (B * T, heads, D // heads, gpu.halves(*inputs, *out[:2]))
        norms = torch.empty((B * T, heads), device=k.device) if any(ctx.needs_input_grad) else None
        gpu.call("prepare_forward", ctx.sizes, *inputs, *out, norms)
        ctx.save_for_backward(*inputs, norms)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        *inputs, norms = ctx.saved_tensors
        found, rows = [torch.empty_like(x) for x in inputs[:3]], inputs[3:]
        sums = gpu.floats("heads_sums", (*ctx.sizes, len(rows)), norms)
        gpu.call("prepare_backward", ctx.sizes, *inputs, norms, *without_gaps(grads), *found, sums)
        return None, *found, *apart(sums, rows)


class Finish(torch.autograd.Function):
    """`blend.finish` with its tensors one by one, as wide as the gate; without r, k, v and r_k it is `gate.gate`."""

    @staticmethod
    def forward(ctx, eps, *inputs):
        inputs = without_gaps(inputs)
        y, out = inputs[0], torch.empty_like(inputs[4])
        B, T, H, N = y.shape
        ctx.sizes, ctx.eps = (B * T, H, N, gpu.halves(*inputs)), eps
        found = torch.empty((B * T, H, 3), device=y.device) if any(ctx.needs_input_grad) else None
        gpu.call("finish_forward", ctx.sizes, *inputs, eps, out, found)
        ctx.save_for_backward(*inputs, found)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *inputs, of = ctx.saved_tensors
        found, rows = [None if x is None else torch.empty_like(x) for x in inputs[:5]], inputs[5:]
        sums = gpu.floats("heads_sums", (*ctx.sizes, len(rows)), of)
        gpu.call("finish_backward", ctx.sizes, *inputs, ctx.eps, of, grad.contiguous(), *found, sums)
        if rows[0] is None:
            return None, *found, None, *apart(sums, [rows[1], *rows[1:]])[1:]
        return None, *found, *apart(sums, rows)
