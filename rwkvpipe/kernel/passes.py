"""What surrounds the recurrence on NVIDIA cards, one pass each (`cuda/blend.cu`); blend.py says what is computed."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpipe.kernel import gpu


def fit(*inputs: Tensor) -> bool:
    """Whether our kernels take these: on one card that has them, all in fp32 or all in bf16."""
    first = inputs[0]
    if first.numel() == 0 or first.dtype not in gpu.KINDS or gpu.at_hand(first.device)[0] is None:
        return False
    return all(x.device == first.device and x.dtype == first.dtype for x in inputs)


def _sizes(x: Tensor, *sizes: int) -> list[int]:
    return [*sizes, int(x.dtype == torch.bfloat16)]


class Mix(torch.autograd.Function):
    """`blend.mix` of x (B, T, D), last (B, D) and up to six shares (1, 1, D)."""

    @staticmethod
    def forward(ctx, x, last, *shares):
        x, last, *shares = (each.contiguous() for each in (x, last, *shares))
        ctx.save_for_backward(x, last, *shares)
        out = [torch.empty_like(x) for _ in shares]
        gpu.call("mix_forward", _sizes(x, *x.shape, len(shares)), x, last, shares, out)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, last, *shares = ctx.saved_tensors
        sizes, dx, dlast = _sizes(x, *x.shape, len(shares)), torch.empty_like(x), torch.empty_like(last)
        sums = gpu.floats("mix_sums", sizes, x)
        gpu.call("mix_backward", sizes, x, last, shares, [each.contiguous() for each in grads], dx, dlast, sums)
        found = sums.view(-1, len(shares), x.shape[-1]).sum(0)
        return dx, dlast, *(one.view_as(share).to(share.dtype) for one, share in zip(found, shares, strict=True))


class Square(torch.autograd.Function):
    """max(x, 0)^2."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        gpu.call("square", _sizes(x, x.numel()), x, None, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        found = torch.empty_like(x)
        gpu.call("square", _sizes(x, x.numel()), x, grad.contiguous(), found)
        return found


def mix(x: Tensor, last: Tensor, shares: Sequence[Tensor]) -> list[Tensor]:
    """As `blend.mix`."""
    return list(Mix.apply(x, last, *shares))
