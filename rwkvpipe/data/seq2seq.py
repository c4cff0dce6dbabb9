"""What step n of an encoder and a decoder sees: pairs out of a packed corpus of format seq2seq."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.data.batches import BLOCK, Mix, Order, Share, check_batch, span_order, spans_of
from rwkvpipe.data.binidx import Binidx

log = logging.getLogger("rwkvpipe")


@dataclass(frozen=True)
class PairBatch:
    """source (B, S), inputs and targets (B, T) int64, padded on the right: targets with -1, the others with 0.

    `source_lengths` and `lengths` (B,) say how much of a row is real: 0 is an id, too, so that no id can.
    """

    source: Tensor
    source_lengths: Tensor
    inputs: Tensor
    targets: Tensor
    lengths: Tensor


def _sides(data: Binidx) -> np.ndarray:
    """Which documents (n,) have a source and a target."""
    found = []
    for first in range(0, len(data.documents), BLOCK):
        borders = data.documents[first : first + BLOCK]
        begin = int(borders[0, 0])
        before = np.concatenate(([0], np.cumsum(data.mask(begin, int(borders[-1, 1]) - begin) != 0)))
        marks = before[borders[:, 1] - begin] - before[borders[:, 0] - begin]
        found.append((marks > 0) & (marks < borders[:, 1] - borders[:, 0]))
    return np.concatenate(found) if found else np.zeros(0, bool)


def _pairs(data: Binidx, config: TrainConfig, part: float) -> Order:
    """Whole documents of two sides, in order. Raises DataError when less than a batch is there."""
    borders = data.documents[_sides(data)]
    if not len(borders):
        raise DataError(f"{data.prefix}: no document has a source and a target; pack the corpus with format seq2seq")
    check_batch(data.prefix, len(borders), "pairs", config, part)
    index = span_order(len(borders), config)

    def span(number: int) -> list[tuple[int, int]]:
        start, end = borders[index(number)].tolist()
        return [(start, end - start)]

    return span


def _cut(ids: np.ndarray, longest: int) -> np.ndarray:
    """A source of at most so many tokens that ends as it did."""
    return ids if len(ids) <= longest else np.concatenate((ids[: longest - 1], ids[-1:]))


def _padded(rows: list[np.ndarray], filler: int) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    found = torch.full((len(rows), int(lengths.max())), filler)
    for number, row in enumerate(rows):
        found[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return found, lengths


def pair_batches(
    data: Binidx | Mix, config: TrainConfig, rank: Share, *, first_step: int, begin: int
) -> Iterator[PairBatch]:
    """Batches of pairs from step `first_step` on, without end; `begin` (corpus.json) is what a decoder reads first.

    Sources and targets are cut at ctx_len, sources so that their last id stays. Raises ConfigError for order magic,
    DataError when less than a batch is there.
    """
    if config.order == "magic":
        raise ConfigError("train.order: magic reads one stream of tokens; pairs come shuffled or sequential")
    spans = spans_of(data, config, rank, _pairs)

    def batch(step: int) -> PairBatch:
        sources, targets = [], []
        for corpus, ((start, count),) in spans(step):
            ids, marks = np.asarray(corpus.tokens(start, count)), corpus.mask(start, count) != 0
            sources.append(_cut(ids[~marks], config.ctx_len))
            targets.append(ids[marks][: config.ctx_len])
        inputs = [np.concatenate(([begin], target[:-1])) for target in targets]
        source, source_lengths = _padded(sources, 0)
        wanted, lengths = _padded(targets, -1)
        return PairBatch(source, source_lengths, _padded(inputs, 0)[0], wanted, lengths)

    return map(batch, itertools.count(first_step))
