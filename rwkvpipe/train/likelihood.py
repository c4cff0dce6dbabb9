"""Log-probabilities of tokens, and entropies where they stand, some at a time: all logits are never held at once.

What a part's logits were is computed again in its backward, which holds as few of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rwkvpipe.kernel.loss import at_once, parts
from rwkvpipe.kernel.product import Products
from rwkvpipe.train.precision import NARROW, arithmetic


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `ids`: (..., T) fp32 from logits (..., T, V) of any dtype, ids (..., T)."""
    wide = _wide(logits)
    if temperature != 1.0:
        wide = wide / temperature
    return wide.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)


class _Entropy(torch.autograd.Function):
    """Keeps the logits alone for the backward, which are kept anyway."""

    @staticmethod
    def forward(ctx, logits: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.temperature = temperature
        found = (_wide(logits) / temperature).log_softmax(-1)
        return -(found.exp() * found).sum(-1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        found = (_wide(logits) / ctx.temperature).log_softmax(-1)
        share = found.exp()
        entropy = -(share * found).sum(-1, keepdim=True)
        # dH / dz = -p (log p + H)
        return (-share * (found + entropy) * (grad / ctx.temperature).unsqueeze(-1)).to(logits.dtype), None


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats: (..., T) from logits (..., T, V)."""
    return _Entropy.apply(logits, temperature)


@dataclass(frozen=True)
class _Asked:
    """At which temperature, by which products, and whether entropies are wanted, too."""

    temperature: float
    dtype: torch.dtype | None
    uncertain: bool


def _chances(x: Tensor, weight: Tensor, asked: _Asked) -> Iterator[tuple[slice, Products, Tensor]]:
    """Some positions at a time: log softmax (n, V) of x (n, D) times weight (V, D)."""
    how = Products.of(asked.dtype, x.device)
    rows, matrix = how.take(x), how.take(weight).mT
    for part in parts(x, weight):
        logits = how.mm(rows[part], matrix)
        if asked.temperature != 1.0:
            logits.div_(asked.temperature)
        yield part, how, logits.sub_(logits.logsumexp(-1, keepdim=True))


class _Likelihood(torch.autograd.Function):
    """Keeps the stream alone for the backward."""

    @staticmethod
    def forward(ctx, x, weight, ids, asked):
        ctx.asked = asked
        ctx.save_for_backward(x, weight, ids)
        found, entropy = x.new_empty(len(x)), x.new_empty(len(x) if asked.uncertain else 0)
        with torch.autocast(x.device.type, enabled=False):
            for part, _, chances in _chances(x, weight, asked):
                found[part] = chances.gather(1, ids[part, None])[:, 0]
                if asked.uncertain:
                    entropy[part] = -(chances.exp() * chances).sum(-1)
        return found, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, pull):
        (x, weight, ids), asked = ctx.saved_tensors, ctx.asked
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        # what narrow products round is around 1, whatever the tokens weigh
        steps = (grad, pull) if asked.uncertain else (grad,)  # equal rewards leave the entropies' alone
        size = 1.0 if asked.dtype is None else max(1e-30, *(float(each.abs().max()) for each in steps))
        scale = 1 / (size * asked.temperature)
        with torch.autocast(x.device.type, enabled=False):
            for part, how, chances in _chances(x, weight, asked):
                share, weighed = chances.exp(), (grad[part] * scale)[:, None]
                if asked.uncertain:  # dH / dz = -p (log p + H)
                    entropy = -(share * chances).sum(-1, keepdim=True)
                    steps = chances.add_(entropy).mul_((pull[part] * -scale)[:, None]).sub_(weighed).mul_(share)
                else:
                    steps = share.mul_(-weighed)
                how = how.of_steps
                steps = how.take(steps.scatter_add_(1, ids[part, None], weighed))
                if dx is not None:
                    dx[part] = how.mm(steps, how.take(weight)) * size
                if dw is not None and asked.dtype is None:
                    how.put(dw, steps.mT, x[part], add=True)
                elif dw is not None:
                    dw.add_(how.summed(steps, how.take(x[part])), alpha=size)
        return dx, dw, None, None


def likelihood(
    model: nn.Module,
    features: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    precision: str = "fp32",
    uncertain: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (n,) of `ids` (n,) where the stream before the head is `features` (n, D), with gradient.

    And, if asked, entropies (n,). fp32 (fp64 for fp64 models).
    """
    if type(model.head) is nn.Linear:
        asked = _Asked(temperature, NARROW.get(precision), uncertain)
        found, entropy = _Likelihood.apply(model.ln_out(features), model.head.weight, ids, asked)
        return found, entropy if uncertain else None

    def told(x: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        with arithmetic(precision, x.device):
            logits = model.logits(x)
        found = token_logprobs(logits, tokens, temperature)
        return (found, token_entropy(logits, temperature)) if uncertain else (found,)

    # an adapter beside the matrix, which draws from no common stream
    size, again = at_once(features, model.config.vocab_size), {"use_reentrant": False, "preserve_rng_state": False}
    several = [checkpoint(told, *part, **again) for part in zip(features.split(size), ids.split(size), strict=True)]
    logprobs, *entropies = (torch.cat(each) for each in zip(*several, strict=True))
    return logprobs, entropies[0] if entropies else None


def scattered(values: Tensor, where: Tensor) -> Tensor:
    """Values (n,) in their places: like `where` (R, C) bool, which has n that are true; 0 elsewhere."""
    return values.new_zeros(where.shape).masked_scatter(where, values)
