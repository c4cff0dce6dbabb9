"""The held-out loss: every token of the validation part, read once, in order."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

import numpy as np
import torch
from torch import nn

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.data.batches import Batch
from rwkvpipe.data.binidx import Binidx
from rwkvpipe.train.dist import ALONE, Rank
from rwkvpipe.train.loss import mean_loss


def _spans(data: Binidx, ctx_len: int, by_document: bool) -> Iterator[tuple[int, int]]:
    """(start, count) of windows of at most ctx_len + 1 tokens; neighbours share one, which the first only predicts."""
    pieces = [(int(start), int(end)) for start, end in data.documents] if by_document else [(0, len(data))]
    for start, end in pieces:
        for begin in range(start, end - 1, ctx_len):
            yield begin, min(ctx_len + 1, end - begin)


def windows(data: Binidx, ctx_len: int, rows: int, masked: bool, by_document: bool | None = None) -> Iterator[Batch]:
    """Batches of `rows` windows, padded on the right with targets of -1.

    With masks, and where it is asked for, each document is read by itself.
    """
    spans = _spans(data, ctx_len, masked if by_document is None else by_document)
    while part := list(islice(spans, rows)):
        width = max(count for _, count in part) - 1
        ids = torch.zeros(len(part), width, dtype=torch.long)
        targets = torch.full((len(part), width), -1)
        mask = torch.zeros(len(part), width) if masked else None
        for row, (start, count) in enumerate(part):
            tokens = torch.from_numpy(np.asarray(data.tokens(start, count), dtype=np.int64))
            ids[row, : count - 1], targets[row, : count - 1] = tokens[:-1], tokens[1:]
            if mask is not None:
                chosen = data.weights(start, count).astype(np.float32)
                mask[row, : count - 1] = torch.from_numpy(chosen)[1:]
        yield Batch(ids, targets, mask)


def held_out_loss(
    data: Binidx | Sequence[Binidx], config: TrainConfig, micro_batch: int, *, masked: bool, rank: Rank = ALONE
) -> Callable[[nn.Module], float]:
    """Function of a model: its mean loss over all target tokens of the validation parts, in nats."""
    parts = [data] if isinstance(data, Binidx) else list(data)
    by_document = masked or config.rows in ("documents", "packed")

    def loss(model: nn.Module) -> float:
        found = (windows(part, config.ctx_len, micro_batch, masked, by_document) for part in parts)
        return mean_loss(model, chain.from_iterable(found), micro_batch, config.precision, config.chunk, rank)

    return loss
