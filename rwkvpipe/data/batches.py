"""What step n sees. Every batch is a function of the corpora, the settings and the step alone."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.data.binidx import Binidx
from rwkvpipe.data.order import Shares, magic_prime, place, shuffled

log = logging.getLogger("rwkvpipe")

BLOCK = 1 << 16  # documents that are looked at together


@dataclass(frozen=True)
class Batch:
    """ids (B, T) int64; targets (B, T) int64, -1 where there is none; mask (B, T) float of 0 and 1, or None for all."""

    ids: Tensor
    targets: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Mix:
    """Corpora that each give a part of the rows, by weights."""

    corpora: tuple[Binidx, ...]
    weights: tuple[float, ...]


class Share(Protocol):
    """Which of the processes that train together this is."""

    index: int
    count: int


Span = tuple[int, int]
Order = Callable[[int], Span]
"""From a running number within a corpus to (first token, how many) of a row."""


def _rows(step: int, config: TrainConfig, rank: Share) -> range:
    """The running numbers of the rows of a step that belong to a process: every count-th."""
    return range(step * config.batch + rank.index, (step + 1) * config.batch, rank.count)


def check_batch(where: str | Path, found: int, what: str, config: TrainConfig, part: float = 1.0) -> None:
    """Raise DataError where a step would have to take one thing twice; a `part` of its rows comes from here."""
    wanted = config.batch if part == 1 else max(1, math.floor(config.batch * part))
    if found < wanted:
        raise DataError(
            f"{where}: {found} {what} are fewer than the {wanted} that a step takes (train.batch);"
            " give more of them, or a smaller batch"
        )


def span_order(count: int, config: TrainConfig) -> Callable[[int], int]:
    """Function from a running number to one of `count` things, in shuffled passes or as they stand."""
    return shuffled(count, config.seed or 0) if config.order == "shuffled" else lambda number: number % count


def _chunks(data: Binidx, config: TrainConfig, part: float) -> Order:
    """Rows of ctx_len tokens of the stream, borders of documents ignored. Raises DataError when there are too few."""
    tokens, ctx_len = len(data), config.ctx_len
    if tokens < ctx_len + 1:
        raise DataError(
            f"{data.prefix}: the corpus has {tokens} tokens, one row takes {ctx_len + 1} (train.ctx_len {ctx_len}"
            " and the last target); give more text or a smaller ctx_len"
        )
    if config.order != "magic":
        count = _rows_of_stream(data, ctx_len)
        check_batch(data.prefix, count, f"rows of {ctx_len} tokens", config, part)
        index = span_order(count, config)
        return lambda number: (index(number) * ctx_len, ctx_len + 1)
    chunks = tokens // ctx_len
    prime = magic_prime(chunks)
    if prime is None or prime <= 0.9 * chunks:
        raise DataError(
            f"{data.prefix}: train.order magic: {tokens} tokens are {chunks} chunks of {ctx_len}, and the largest"
            f" fitting prime is {prime or 'missing'}, which reads too small a part of them (RWKV-LM asks for over 0.9);"
            " choose order shuffled, a smaller ctx_len, or more text"
        )
    check_batch(data.prefix, chunks, f"rows of {ctx_len} tokens", config, part)
    log.info("order magic: %d chunks of %d tokens, prime %d", chunks, ctx_len, prime)
    return lambda number: (place(number, 0, prime) * ctx_len, ctx_len + 1)


def _rows_of_documents(data: Binidx, ctx_len: int) -> np.ndarray:
    """How many rows (n,) each document is; of one token nothing can be learned."""
    sizes = np.diff(data.documents, axis=1).ravel()
    return np.maximum(-(-(sizes - 1) // ctx_len), 0)


def _rows_of_stream(data: Binidx, ctx_len: int) -> int:
    """How many rows the stream is; neighbours share a token: target of one, input of the next."""
    return (len(data) - 1) // ctx_len


def _pieces(data: Binidx, config: TrainConfig, part: float) -> Order:
    """Documents, each a row; a longer one than ctx_len becomes several, which share a token as chunks do.

    Raises DataError when there are too few.
    """
    borders, counts = data.documents, _rows_of_documents(data, config.ctx_len)
    ends = np.cumsum(counts)  # rows up to the end of each document
    count = int(ends[-1]) if len(ends) else 0
    if not count:
        raise DataError(f"{data.prefix}: no document has two tokens, of which the second could be learned; give text")
    check_batch(data.prefix, count, "rows of documents", config, part)
    log.info(
        "%d documents are %d rows; %d are longer than train.ctx_len %d, %d too short to learn from",
        len(counts), count, int((counts > 1).sum()), config.ctx_len, int((counts == 0).sum()),
    )  # fmt: skip
    index = span_order(count, config)

    def span(number: int) -> Span:
        row = index(number)
        document = int(np.searchsorted(ends, row, "right"))
        start = int(borders[document, 0]) + (row - int(ends[document] - counts[document])) * config.ctx_len
        return start, min(config.ctx_len + 1, int(borders[document, 1]) - start)

    return span


def _learned(data: Binidx, ctx_len: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(first tokens, sizes) of the documents with something to learn, cut at ctx_len, block by block."""
    for first in range(0, len(data.documents), BLOCK):
        borders = data.documents[first : first + BLOCK]
        begin = int(borders[0, 0])
        before = np.concatenate(([0], np.cumsum(data.mask(begin, int(borders[-1, 1]) - begin) != 0)))
        starts, sizes = borders[:, 0], np.minimum(borders[:, 1] - borders[:, 0], ctx_len + 1)
        # the first token of a document is never a target
        marks = before[starts + sizes - begin] - before[np.minimum(starts + 1, borders[:, 1]) - begin]
        found = (sizes > 1) & (marks > 0)
        yield starts[found], sizes[found]


def _answers(data: Binidx, config: TrainConfig, part: float) -> Order:
    """Documents with something to learn, cut at ctx_len. Raises DataError when less than a batch is left."""
    found = list(_learned(data, config.ctx_len))
    starts, sizes = (np.concatenate(each) for each in zip(*found, strict=True)) if found else ((), ())
    long = np.diff(data.documents, axis=1).ravel() > config.ctx_len + 1
    cut = int(np.isin(starts, data.documents[long, 0]).sum())
    left_out = len(data.documents) - len(starts)
    if cut or left_out:
        log.info(
            "%d documents; %d cut at train.ctx_len %d, %d left out because nothing in them is to be learned",
            len(data.documents), cut, config.ctx_len, left_out,
        )  # fmt: skip
    if not len(starts):
        raise DataError(
            f"{data.prefix}: none of {len(data.documents)} documents has a token to learn within train.ctx_len"
            f" {config.ctx_len}; give talks with answers, or a larger ctx_len"
        )
    check_batch(data.prefix, len(starts), "documents with something to learn", config, part)
    index = span_order(len(starts), config)

    def span(number: int) -> Span:
        row = index(number)
        return int(starts[row]), int(sizes[row])

    return span


def spans_of(
    data: Binidx | Mix, config: TrainConfig, rank: Share, order: Callable[[Binidx, TrainConfig, float], Order]
) -> Callable[[int], list[tuple[Binidx, int, int]]]:
    """Function from a step to (corpus, first token, how many) of this process's rows."""
    if config.batch < rank.count:
        raise ConfigError(f"train.batch: {config.batch} rows a step for {rank.count} devices; each needs one at least")
    mix = data if isinstance(data, Mix) else Mix((data,), (1.0,))
    shares = Shares(mix.weights, config.seed or 0)
    orders = [order(corpus, config, part) for corpus, part in zip(mix.corpora, shares.parts, strict=True)]

    def spans(step: int) -> list[tuple[Binidx, int, int]]:
        picked = map(shares.pick, _rows(step, config, rank))
        return [(mix.corpora[corpus], *orders[corpus](number)) for corpus, number in picked]

    return spans


def _stacked(rows: Sequence[tuple[Binidx, int, int]]) -> Batch:
    """Rows of equal length."""
    found = [np.asarray(data.tokens(start, count), dtype=np.int64) for data, start, count in rows]
    both = torch.from_numpy(np.stack(found))  # (b, ctx_len + 1)
    return Batch(both[:, :-1].contiguous(), both[:, 1:].contiguous())


def _padded(rows: Sequence[tuple[Binidx, int, int]], masked: bool) -> Batch:
    """Documents as rows, padded on the right: ids with 0, targets with -1, mask with 0."""
    width = max(count for _, _, count in rows) - 1
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), -1)
    mask = torch.zeros(len(rows), width) if masked else None
    for row, (data, start, count) in enumerate(rows):
        tokens = torch.from_numpy(data.tokens(start, count).astype(np.int64))
        ids[row, : count - 1], targets[row, : count - 1] = tokens[:-1], tokens[1:]
        if mask is not None:
            marks = torch.from_numpy(data.mask(start, count).astype(np.float32))
            mask[row, : count - 1] = (marks[1:] != 0).float()
    return Batch(ids, targets, mask)


def rows_of(data: Binidx, config: TrainConfig, *, masked: bool) -> int:
    """How many rows one pass over a corpus has."""
    if masked:
        return sum(len(starts) for starts, _ in _learned(data, config.ctx_len))
    if config.rows == "documents":
        return int(_rows_of_documents(data, config.ctx_len).sum())
    if config.order == "magic":
        return magic_prime(len(data) // config.ctx_len) or 0
    return _rows_of_stream(data, config.ctx_len)


def token_batches(data: Binidx | Mix, config: TrainConfig, rank: Share, first_step: int) -> Iterator[Batch]:
    """Batches of tokens that are all learned, from step `first_step` on, without end.

    Of the stream (b, ctx_len), where b is this process's share of config.batch: chunk i is tokens i ctx_len to
    (i + 1) ctx_len, targets one further. With rows of documents (b, T), where T is the longest of this share.
    Raises DataError when a corpus is too short for the order asked for.
    """
    whole = config.rows == "documents"
    if whole and config.order == "magic":
        raise ConfigError("train.order: magic reads one stream of tokens; whole documents come shuffled or sequential")
    spans = spans_of(data, config, rank, _pieces if whole else _chunks)

    return (
        _padded(spans(step), masked=False) if whole else _stacked(spans(step)) for step in itertools.count(first_step)
    )


def masked_batches(data: Binidx | Mix, config: TrainConfig, rank: Share, first_step: int) -> Iterator[Batch]:
    """Batches (b, T) of whole documents from step `first_step` on, without end; T is the longest of this share.

    The mask marks the targets to learn. Documents are cut at ctx_len; those without a token to learn are left out.
    Raises ConfigError for order magic, DataError when less than a batch is left.
    """
    if config.order == "magic":
        raise ConfigError("train.order: magic reads one stream of tokens; whole documents come shuffled or sequential")
    spans = spans_of(data, config, rank, _answers)

    return (_padded(spans(step), masked=True) for step in itertools.count(first_step))
