"""The matrix to logits and the loss of these in one, a few positions at a time: all logits are never held at once.

The gradient of a position's logits is known as soon as they are, so it takes their place, natively
(`cuda/loss_cpu.cpp`; on a card `cuda/loss.cu`, in bf16 too) or in PyTorch, and is multiplied out in the forward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpipe.kernel import build, gpu, passes
from rwkvpipe.kernel.product import Products

NUMBERS = 1 << 20  # logits held at once
ON_CARD = 1 << 27  # the same on a card
FEWEST, MOST = 64, 8192  # positions held at once


@dataclass(frozen=True)
class Wanted:
    """What positions are to say: `chosen` (n,) ids, below 0 where there is no loss; a loss of `scale` -log p each,
    times its own one of `weights` (n,), if there are some.

    Where `real` (n,) is not 0, the largest logit is drawn to 0 by a gradient of `pull` times it (RWKV-LM's L2Wrap);
    on ties the first has it.
    """

    chosen: Tensor
    real: Tensor
    scale: float
    pull: float = 0.0
    dtype: torch.dtype | None = None
    """To which the inputs of matrix products are rounded; sums are fp32 all the same. None is as they are."""
    weights: Tensor | None = None


def head_loss(x: Tensor, weight: Tensor, wanted: Wanted) -> Tensor:
    """The sum of the losses of logits x weight^T: a scalar. x (n, D), weight (V, D), both fp32 or fp64.

    Raises IndexError where an id is chosen that there is no logit of; on a card, whose work would have to be waited
    for, the loss is NaN then.
    """
    if not x.is_cuda and len(wanted.chosen) and (top := int(wanted.chosen.max())) >= len(weight):
        raise IndexError(f"id {top} is to be said by a model of {len(weight)}")
    return _HeadLoss.apply(x, weight, wanted)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, wanted):
        with torch.autocast(x.device.type, enabled=False):
            found = _narrow if wanted.dtype is not None else _plain
            total, dx, dw = found(x, weight, wanted, ctx.needs_input_grad)
        ctx.save_for_backward(dx, dw)
        return (total * wanted.scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        whole = float(grad) == 1.0  # nearly always: then nothing is to be multiplied
        return *(x if x is None or whole else x * grad for x in ctx.saved_tensors), None


def at_once(x: Tensor, vocabulary: int) -> int:
    """How many positions' logits are held at once where `x` is."""
    return min(max(FEWEST, (ON_CARD if x.is_cuda else NUMBERS) // vocabulary), MOST)


def parts(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """The positions of x (n, D) whose logits are held at once, part after part; weight (V, D)."""
    size = at_once(x, len(weight))
    for first in range(0, len(x), size):
        yield slice(first, first + size)


def _plain(x: Tensor, weight: Tensor, wanted: Wanted, needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """Sum of -log p, and gradients of `x` and `weight` as they are needed."""
    dx = torch.empty_like(x) if needed[0] else None
    dw = torch.zeros_like(weight) if needed[1] else None
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    how = Products.of(None, x.device)
    for part in parts(x, weight):
        logits = how.mm(x[part], weight.mT)
        total += _gradients(logits, wanted, part).double().sum()
        if dx is not None:
            how.put(dx[part], logits, weight)
        if dw is not None:
            how.put(dw, logits.mT, x[part], add=True)
    return total, dx, dw


def _narrow(x: Tensor, weight: Tensor, wanted: Wanted, needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """The same with rounded inputs. What is rounded of the gradient is that of -log p, which is no tiny number."""
    dx = torch.empty_like(x) if needed[0] else None
    dw = torch.zeros_like(weight) if needed[1] else None
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    how = Products.of(wanted.dtype, x.device)
    back = how.of_steps
    rows, matrix = how.take(x), how.take(weight)
    plain = replace(wanted, scale=1.0, pull=wanted.pull / wanted.scale)
    for part in parts(x, weight):
        logits = rows[part] @ matrix.mT if how.narrow and not how.late else how.mm(rows[part], matrix.mT)
        logits = logits if passes.fit(logits) else logits.to(x.dtype)
        total += _gradients(logits, plain, part).double().sum()
        steps = back.take(logits)
        if dx is not None:
            dx[part] = back.mm(steps, matrix).to(x.dtype).mul_(wanted.scale)
        if dw is not None:
            dw += back.summed(steps, rows[part]).to(x.dtype).mul_(wanted.scale)
    return total, dx, dw


def _gradients(logits: Tensor, wanted: Wanted, part: slice) -> Tensor:
    """-log p of each position (n,), by its weight; the logits (n, V) become their gradient."""
    if wanted.weights is None:
        return _alike(logits, wanted, part)
    # the pull is nobody's weight: it is added to what has been weighed
    wide = torch.promote_types(logits.dtype, torch.float32)  # what is rounded is the product, not its factors
    weights, (top, at) = wanted.weights[part].to(wide), logits.max(-1, keepdim=True)
    pull = (wanted.pull * wanted.real[part, None] * top.to(wide)).to(logits.dtype)
    losses = _alike(logits, replace(wanted, pull=0.0), part)
    logits.mul_(weights[:, None]).scatter_add_(1, at, pull)
    return losses * weights


def _alike(logits: Tensor, wanted: Wanted, part: slice) -> Tensor:
    """The same, where each position counts as any other."""
    chosen, real = wanted.chosen[part].contiguous(), wanted.real[part].long().contiguous()
    if passes.fit(logits):
        losses = torch.empty(len(logits), device=logits.device)
        sizes = (*logits.shape, gpu.halves(logits))
        gpu.call("loss_rows", sizes, logits, chosen, real, wanted.scale, wanted.pull, losses)
        return losses
    if build.native(logits):
        losses = torch.empty(len(logits))
        build.call("loss_rows", logits.shape, logits, chosen, real, wanted.scale, wanted.pull, losses)
        return losses
    top, at = logits.max(-1, keepdim=True)
    sums, counts = logits.logsumexp(-1, keepdim=True), chosen[:, None] >= 0
    place = chosen.clamp(min=0)[:, None]
    losses = torch.where(counts, sums - logits.gather(1, place), 0.0)[:, 0]
    share = counts.to(logits.dtype) * wanted.scale
    logits.sub_(sums).exp_().mul_(share).scatter_add_(1, place, -share)
    logits.scatter_add_(1, at, real[:, None] * wanted.pull * top)
    return losses
