"""The losses of language models: cross-entropy over chosen positions, with RWKV's L2Wrap."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.data.batches import Batch
from rwkvpipe.kernel.loss import Wanted, at_once, head_loss
from rwkvpipe.train.dist import ALONE, Rank
from rwkvpipe.train.precision import NARROW, arithmetic
from rwkvpipe.weights.lora import row_dropout

Losses = Callable[[nn.Module, Batch], Iterator[Tensor]]
"""Cuts a batch into scalars, each ready for one backward and already weighted by its share of the step."""


def device_of(model: nn.Module) -> torch.device:
    """The device a model's weights are on."""
    return next(model.parameters()).device


def masked_cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor | None = None, *, total=None) -> Tensor:
    """Sum of -log p(target), each times its number in the mask, divided by `total`: a scalar.

    logits (B, T, V), targets (B, T) long, below 0 where there is none, mask (B, T) of numbers from 0 up or None for
    1. `total` is by default the sum of these; where that is 0 the loss is, too, not NaN.
    """
    left_out = targets < 0 if mask is None else (targets < 0) | (mask == 0)
    chosen = targets.masked_fill(left_out, -100)  # the one value that cross_entropy never reads
    if total is None:
        total = weight_of(targets, mask)
    logits = logits.flatten(0, 1)  # (B T, V)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if not uneven(mask):
        return F.cross_entropy(wide, chosen.flatten(), ignore_index=-100, reduction="sum") / (total or 1)
    losses = F.cross_entropy(wide, chosen.flatten(), ignore_index=-100, reduction="none")
    return (losses * mask.flatten().to(losses.dtype)).sum() / (total or 1)


def weight_of(targets: Tensor, mask: Tensor | None) -> float:
    """The sum of what targets (B, T) weigh, those below 0 left out, with mask (B, T) of weights or None for 1."""
    real = targets >= 0
    return float(real.sum()) if mask is None else float((mask.double() * real).sum())


def uneven(mask: Tensor | None) -> bool:
    """Whether there is a mask that is not of 0 and 1 alone."""
    return mask is not None and bool(((mask != 0) & (mask != 1)).any())


def l2_wrap(logits: Tensor, pull: float = 1e-4, *, total=None, mask: Tensor | None = None) -> Tensor:
    """Zero, whose gradient draws the largest logit of each position towards 0: pull / total x that logit.

    logits (B, T, V). It is the gradient of pull / 2 x the mean square of the largest logits (RWKV-LM's L2Wrap);
    on ties the first index has it. Being a part of the loss it is multiplied by whatever the loss is.
    """
    top = logits.max(-1).values  # (B, T); max over a dimension gives its gradient to the first index only
    if mask is not None:
        top = top * mask
    square = top.square().sum() * (pull / (2 * max(top.numel() if total is None else total, 1)))
    return square - square.detach()


def lm_losses(micro_batch: int, config: TrainConfig, rank: Rank = ALONE) -> Losses:
    """Next-token loss of this process's rows, `micro_batch` at a time; the sum over all depends on neither.

    The sum over the target tokens of the whole step, each by its weight, is divided by the sum of the weights: twice
    the weights are the same loss. L2Wrap covers every position that has a next token (targets >= 0), masked out of the
    loss or not, whatever its weight.
    """

    def losses(model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        device = device_of(model)
        real = batch.targets >= 0  # (B, T): below 0 is padding
        step = share_of(batch, config)
        for part in rank.mine(len(batch.ids), micro_batch):
            width = int(real[part].any(0).sum())  # rows are padded on the right: what no row uses is not computed
            idle = width == 0
            if idle and not rank.lockstep:
                continue
            part, width = (slice(0, 1), 1) if idle else (part, width)
            targets = batch.targets[part, :width].to(device)
            targets = torch.full_like(targets, -1) if idle else targets
            mask = None if batch.mask is None else batch.mask[part, :width].to(device)
            with arithmetic(config.precision, device), row_dropout(model, part.start):
                starts = None if batch.starts is None else batch.starts[part, :width].to(device)
                features, _ = model.features(batch.ids[part, :width].to(device), starts=starts)
                yield language_loss(model, features, targets, mask, step)

    return losses


@dataclass(frozen=True)
class Share:
    """What the losses of an optimizer step are divided by: what its targets weigh, and how many positions it has."""

    config: TrainConfig
    targets: float
    positions: int
    level: float | None = None
    """What brings the mean weight of those that weigh something to 1; None where all weigh 1."""


def share_of(batch: Batch, config: TrainConfig) -> Share:
    """That of the step that a batch is."""
    real, whole = batch.targets >= 0, weight_of(batch.targets, batch.mask)
    level = int((real & (batch.mask != 0)).sum()) / (whole or 1) if uneven(batch.mask) else None
    return Share(config, whole, int(real.sum()), level)


def language_loss(model: nn.Module, features: Tensor, targets: Tensor, mask: Tensor | None, share: Share) -> Tensor:
    """The share of some positions in a step's loss, L2Wrap with it: a scalar.

    features (B, T, D) of the model, targets (B, T) long, below 0 where there is none, mask (B, T) of weights or None.
    """
    pull = share.config.l2_wrap
    if type(model.head) is not nn.Linear:  # an adapter beside the matrix
        logits = model.logits(features)
        loss = masked_cross_entropy(logits, targets, mask, total=share.targets)
        return loss + l2_wrap(logits, pull, total=share.positions, mask=targets >= 0) if pull else loss
    chosen = targets if mask is None else targets.masked_fill(mask == 0, -100)
    # weights around 1, so that what narrow products round is neither tiny nor too much
    weights = None if share.level is None else (mask.double() * share.level).flatten()
    scales = (1 / (share.targets * (share.level or 1) or 1), pull / max(share.positions, 1))
    wanted = Wanted(chosen.flatten(), (targets >= 0).flatten(), *scales, NARROW.get(share.config.precision), weights)
    return head_loss(model.ln_out(features).flatten(0, 1), model.head.weight, wanted)


def _mine(batches: Iterator[Batch], rank: Rank) -> Iterator[Batch]:
    """Every count-th batch; in lockstep as wide as the others', without targets where others still have one."""
    if not rank.lockstep:
        yield from islice(batches, rank.index, None, rank.count)
        return
    while some := list(islice(batches, rank.count)):
        idle = replace(some[0], targets=torch.full_like(some[0].targets, -1))
        own, width = some[rank.index] if rank.index < len(some) else idle, max(each.ids.shape[1] for each in some)
        more = (0, width - own.ids.shape[1])
        mask = None if own.mask is None else F.pad(own.mask, more)
        yield replace(own, ids=F.pad(own.ids, more), targets=F.pad(own.targets, more, value=-1), mask=mask)


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    batches: Iterator[Batch],
    micro_batch: int,
    precision: str,
    chunk: int | None = None,
    rank: Rank = ALONE,
) -> float:
    """Mean cross-entropy over the target tokens of all batches, by their weights, in nats; the model's mode stays.

    Rows are read `chunk` tokens at a time, the state carried on; left out, whole. Processes share the batches. All
    logits are never held at once.
    """
    device, training = device_of(model), model.training
    model.eval()
    total, count = 0.0, 0
    for batch in _mine(batches, rank):
        for first in range(0, len(batch.ids), micro_batch):
            part = slice(first, first + micro_batch)
            ids, targets = batch.ids[part].to(device), batch.targets[part].to(device)
            mask = None if batch.mask is None else batch.mask[part].to(device)
            state, size = None, chunk or ids.shape[1]
            for first_token in range(0, ids.shape[1], size):
                some = slice(first_token, first_token + size)
                with arithmetic(precision, device):
                    features, state = model.features(ids[:, some], state)
                few = max(1, at_once(features, model.config.vocab_size) // len(ids))
                for place in range(first_token, min(first_token + size, ids.shape[1]), few):
                    part = slice(place, min(place + few, first_token + size))
                    with arithmetic(precision, device):
                        logits = model.logits(features[:, part.start - first_token : part.stop - first_token])
                    weights = None if mask is None else mask[:, part]
                    total += float(masked_cross_entropy(logits, targets[:, part], weights, total=1))
            count += weight_of(targets, mask)
    model.train(training)
    total, count = rank.total(total, count)
    return total / (count or 1)
