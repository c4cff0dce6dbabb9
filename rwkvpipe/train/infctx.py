"""Infinite context: rows are read chunk by chunk, the state carried on, so that memory does not grow with their length.

The sum over the chunks is the loss of the whole row: the last position of a chunk has the next chunk's first token as
its target, and every target has its part of what the step's targets weigh, whichever chunk it is in.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.data.batches import Batch
from rwkvpipe.model.layers import State
from rwkvpipe.train.dist import ALONE, Rank
from rwkvpipe.train.loss import Losses, Share, device_of, language_loss, share_of
from rwkvpipe.train.precision import arithmetic
from rwkvpipe.weights.lora import row_dropout

KEPT = 64  # states of a row that are kept at a time, and as many more as there are chunks between two of them
CHUNKS = 2**32  # more than a row has: chunks of a row draw their dropout apart from each other


@dataclass(frozen=True)
class _Rows:
    """The rows of one micro batch, of which `first` is the first in the step."""

    ids: Tensor
    targets: Tensor
    mask: Tensor | None
    starts: Tensor | None
    first: int

    def chunk(self, number: int, size: int) -> "_Rows":
        """A part of each row."""
        part = slice(number * size, (number + 1) * size)
        mask, starts = (None if each is None else each[:, part] for each in (self.mask, self.starts))
        return _Rows(self.ids[:, part], self.targets[:, part], mask, starts, self.first + CHUNKS * number)


def _flat(state: State) -> list[Tensor]:
    return [*state.att_x, *state.wkv, *state.ffn_x]


def _leaves(state: State) -> State:
    """The same numbers as inputs of their own, which gather a gradient."""
    for value in _flat(state):
        value.requires_grad_()
    return state


def _read(model: nn.Module, part: _Rows, state: State | None, step: Share, counts: bool) -> tuple[Tensor | None, State]:
    """The share of a chunk in the loss, None unless it counts, and the state after it."""
    config, device = step.config, device_of(model)
    with arithmetic(config.precision, device), row_dropout(model, part.first):
        starts = None if part.starts is None else part.starts.to(device)
        features, state = model.features(part.ids.to(device), state, starts=starts)
        if not counts:
            return None, state
        mask = None if part.mask is None else part.mask.to(device)
        return language_loss(model, features, part.targets.to(device), mask, step), state


def _truncated(model: nn.Module, rows: _Rows, counts: list[bool], step: Share) -> Iterator[Tensor]:
    """Losses whose gradient ends where their chunk begins."""
    state = None
    for number, counting in enumerate(counts):
        part = rows.chunk(number, step.config.chunk)
        with torch.set_grad_enabled(counting):
            loss, state = _read(model, part, state, step, counting)
        state = state.detach()
        if loss is not None:
            with row_dropout(model, part.first):  # blocks that are computed again drop the same
                yield loss


def _states(
    model: nn.Module, rows: _Rows, numbers: range, state: State | None, step: Share, every: int = 1
) -> list[State | None]:
    """The state before some chunks, and that after every first, second, ... of them."""
    found = [state]
    with torch.no_grad():
        for number in numbers:
            # copies: a last input is a view that would keep all the chunk's
            state = _read(model, rows.chunk(number, step.config.chunk), state, step, False)[1].repeat(1)
            if (number + 1 - numbers.start) % every == 0:
                found.append(state)
    return found


class _Handed(torch.autograd.Function):
    """A loss as it is, whose backward hands values gradients that are known already.

    They are handed on as they are: what losses of fp16 are multiplied by is in them since the backward they come from.
    """

    @staticmethod
    def forward(ctx, loss, grads, *values):
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, None, *ctx.grads


def _whole(model: nn.Module, rows: _Rows, counts: list[bool], step: Share) -> Iterator[Tensor]:
    """Losses whose gradients add up to that of the whole rows, from the last chunk to the first.

    Chunks are read once to know the state before each, and once more to have their gradient; what later chunks ask of
    a state is handed on beside the loss. Of more chunks than KEPT only every second state, or third, is kept, and those
    between are found once more.
    """
    size, chunks = step.config.chunk, len(counts)
    stretch = -(-chunks // KEPT)
    borders = _states(model, rows, range((chunks - 1) // stretch * stretch), None, step, stretch)
    before: list[State | None] = []
    wanted: list[Tensor | None] = []
    for number in reversed(range(chunks)):
        if not before:
            first = number // stretch * stretch
            before = _states(model, rows, range(first, number), borders.pop(), step)
        start = before.pop()
        start = start if start is None else _leaves(start)  # the first of all is the model's to make, and to learn
        part = rows.chunk(number, size)
        loss, after = _read(model, part, start, step, counts[number])
        total = after.wkv[0].new_zeros(()) if loss is None else loss
        handed = [pair for pair in zip(_flat(after), wanted, strict=False) if pair[0].requires_grad]
        handed = [(value, grad) for value, grad in handed if grad is not None]
        if handed:
            values, grads = zip(*handed, strict=True)
            total = _Handed.apply(total, grads, *values)
        del after, loss
        with row_dropout(model, part.first):
            yield total
        wanted = [] if start is None else [value.grad for value in _flat(start)]


def chunked_lm_losses(micro_batch: int, config: TrainConfig, rank: Rank = ALONE) -> Losses:
    """Next-token loss in chunks of `config.chunk` tokens, `micro_batch` rows at a time.

    `bptt: full` gives the gradient of `lm_losses` on whole rows; `truncated` lets no gradient across a chunk's begin.
    Each scalar needs its backward before the next is asked for. Chunks behind the last target are not read. In lockstep
    all processes read as many, and have a gradient where one of them has, whatever counts in their own rows.
    """

    def losses(model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        real = batch.targets >= 0
        chosen = real if batch.mask is None else (batch.mask != 0) & real
        step = share_of(batch, config)
        gradient = _whole if config.bptt == "full" else _truncated
        for part, common in rank.shares(len(batch.ids), micro_batch):
            used = (real if config.l2_wrap else chosen)[common].any(0)
            if not used.any():
                continue
            width = int(used.nonzero().max()) + 1
            counts = [bool(some.any()) for some in used[:width].split(config.chunk)]
            idle = part.start == part.stop
            part = slice(0, 1) if idle else part
            mask, starts = (None if each is None else each[part, :width] for each in (batch.mask, batch.starts))
            targets = batch.targets[part, :width]
            targets = torch.full_like(targets, -1) if idle else targets
            yield from gradient(model, _Rows(batch.ids[part, :width], targets, mask, starts, part.start), counts, step)

    return losses
