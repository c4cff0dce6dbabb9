"""The held-out loss: every token of the validation part, read once, in order."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.data.batches import Batch
from rwkvpipe.data.binidx import Binidx
from rwkvpipe.train.loss import mean_loss


def _spans(data: Binidx, ctx_len: int, by_document: bool) -> Iterator[tuple[int, int]]:
    """(start, count) of windows of at most ctx_len + 1 tokens; neighbours share one, which the first only predicts."""
    pieces = [(int(start), int(end)) for start, end in data.documents] if by_document else [(0, len(data))]
    for start, end in pieces:
        for begin in range(start, end - 1, ctx_len):
            yield begin, min(ctx_len + 1, end - begin)


def windows(data: Binidx, ctx_len: int, rows: int, masked: bool) -> Iterator[Batch]:
    """Batches of `rows` windows, padded on the right with targets of -1; with masks, each document by itself."""
    spans = list(_spans(data, ctx_len, masked))
    for first in range(0, len(spans), rows):
        part = spans[first : first + rows]
        width = max(count for _, count in part) - 1
        ids = torch.zeros(len(part), width, dtype=torch.long)
        targets = torch.full((len(part), width), -1)
        mask = torch.zeros(len(part), width) if masked else None
        for row, (start, count) in enumerate(part):
            tokens = torch.from_numpy(np.asarray(data.tokens(start, count), dtype=np.int64))
            ids[row, : count - 1], targets[row, : count - 1] = tokens[:-1], tokens[1:]
            if mask is not None:
                chosen = np.asarray(data.mask(start, count), dtype=np.float32)
                mask[row, : count - 1] = torch.from_numpy(chosen)[1:]
        yield Batch(ids, targets, mask)


def held_out_loss(data: Binidx, config: TrainConfig, micro_batch: int, *, masked: bool) -> Callable[[nn.Module], float]:
    """Function of a model: its mean loss over all target tokens of the validation part, in nats."""
    return lambda model: mean_loss(
        model, windows(data, config.ctx_len, micro_batch, masked), micro_batch, config.precision, config.chunk
    )
