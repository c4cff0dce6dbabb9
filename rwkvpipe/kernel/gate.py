"""What surrounds the recurrences of RWKV-5 and RWKV-6, element by element: natively in one pass each, or in PyTorch.

As kernel/blend.py has it for RWKV-7: the native forms (`cuda/gate_cpu.cpp`) keep only their inputs for the backward.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpipe.kernel import build, passes
from rwkvpipe.kernel.blend import Pass, Places, apart, sums_of, unmixed, widened
from rwkvpipe.kernel.passes import without_gaps


def drift(
    x: Tensor, last: Tensor, shifts: Sequence[Tensor], shares: Sequence[Tensor], alone: Places | None = None
) -> list[Tensor]:
    """x + (before - x) (shift + share) for five shifts (B, T, D), of a token each, and shares (1, 1, D), of all.

    x (B, T, D); `before` is x a token earlier, and last (B, D) for the first; 0 at the places `alone`.
    """
    x, last, *shifts = widened(shares[0], x, last, *shifts)
    if x.numel() and build.native(x, last, *shifts, *shares):
        found = list(_Drift.apply(x, last, *shifts, *shares))
    else:
        dx = torch.cat((last.to(x.dtype)[:, None], x[:, :-1]), 1) - x
        found = [torch.addcmul(x, dx, shift + share) for shift, share in zip(shifts, shares, strict=True)]
    if alone is None:
        return found
    return unmixed(found, x, [shift[alone] + share[0] for shift, share in zip(shifts, shares, strict=True)], alone)


def gate(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Each head of y (B, T, H, N) normalised, scaled by weight and bias (D), times z sigmoid(z): (B, T, D)."""
    y, z = widened(weight, y, z)
    if passes.fit(y, z, weight, bias, width=y.shape[-1]):
        return passes.Finish.apply(eps, y, None, None, None, z, None, weight, bias)
    if y.numel() and build.native(y, z, weight, bias):
        return Pass("gate", (y.shape[:2].numel(), *y.shape[2:]), rows=2, numbers=(eps,))(y, z, weight, bias)
    normed = F.layer_norm(y.to(weight.dtype), y.shape[-1:], eps=eps)
    return (torch.addcmul(bias, normed.flatten(-2), weight) * F.silu(z)).to(z.dtype)


def sift(z: Tensor, v: Tensor) -> Tensor:
    """v sigmoid(z)."""
    if z.numel() and build.native(z, v):
        return Pass("sift", (z.numel(),))(z, v)
    return torch.sigmoid(z) * v


class _Drift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, last, *others):
        x, last, *others = without_gaps((x, last, *others))
        ctx.save_for_backward(x, last, *others)
        half = len(others) // 2
        out = [torch.empty_like(x) for _ in range(half)]
        build.call("drift_forward", x.shape, x, last, others[:half], others[half:], out)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, last, *others = ctx.saved_tensors
        shifts, shares = others[: len(grads)], others[len(grads) :]
        dx, dlast, found = torch.empty_like(x), torch.empty_like(last), [torch.empty_like(x) for _ in shifts]
        sums = sums_of(x.shape[0] * x.shape[1], *shares)
        build.call("drift_backward", x.shape, x, last, shifts, shares, without_gaps(grads), dx, dlast, found, *sums)
        return dx, dlast, *found, *apart(sums[1], shares)
