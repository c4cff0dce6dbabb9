"""What step n sees. Every batch is a function of the corpora, the settings and the step alone."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.data.binidx import Binidx
from rwkvpipe.data.bins import best_fit
from rwkvpipe.data.order import Shares, magic_prime, place, shuffled

log = logging.getLogger("rwkvpipe")

BLOCK = 1 << 16  # documents that are looked at together
MOST = 20  # documents that are named


@dataclass(frozen=True)
class Batch:
    """ids (B, T) int64; targets (B, T) int64, -1 where there is none; mask (B, T) float, or None for all of them alike.

    A mask is 0 where a target is not learned, 1 where it is; any other number from 0 up is how much it counts.
    starts (B, T) bool marks the first tokens of documents, where rows hold several and the state begins anew.
    """

    ids: Tensor
    targets: Tensor
    mask: Tensor | None = None
    starts: Tensor | None = None


@dataclass(frozen=True)
class Mix:
    """Corpora that each give a part of the rows, by weights."""

    corpora: tuple[Binidx, ...]
    weights: tuple[float, ...]


class Share(Protocol):
    """Which of the processes that train together this is."""

    index: int
    count: int


@dataclass(frozen=True)
class _Alone:
    index: int = 0
    count: int = 1


ALONE = _Alone()


Spans = Sequence[tuple[int, int]]
"""(first token, how many) of each document of a row."""
Order = Callable[[int], Spans]
"""From a running number within a corpus to a row."""
Row = tuple[Binidx, Spans]


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
        return lambda number: [(index(number) * ctx_len, ctx_len + 1)]
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
    return lambda number: [(place(number, 0, prime) * ctx_len, ctx_len + 1)]


def _rows_of_documents(data: Binidx, ctx_len: int) -> np.ndarray:
    """How many rows (n,) each document is; of one token nothing can be learned."""
    sizes = np.diff(data.documents, axis=1).ravel()
    return np.maximum(-(-(sizes - 1) // ctx_len), 0)


def _rows_of_stream(data: Binidx, ctx_len: int) -> int:
    """How many rows the stream is; neighbours share a token: target of one, input of the next."""
    return (len(data) - 1) // ctx_len


@lru_cache(maxsize=16)
def _pieces(data: Binidx, ctx_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(first tokens, sizes) of all documents; a longer one than ctx_len becomes several, which share a token."""
    borders, counts = data.documents, _rows_of_documents(data, ctx_len)
    before = np.cumsum(counts) - counts  # rows before each document
    number = np.arange(int(counts.sum())) - np.repeat(before, counts)  # of each row within its document
    starts = np.repeat(borders[:, 0], counts) + number * ctx_len
    return starts, np.minimum(ctx_len + 1, np.repeat(borders[:, 1], counts) - starts)


@lru_cache(maxsize=16)
def _learned(data: Binidx, ctx_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(first tokens, sizes) of the documents with something to learn, cut at ctx_len."""
    parts = []
    for first in range(0, len(data.documents), BLOCK):
        borders = data.documents[first : first + BLOCK]
        begin = int(borders[0, 0])
        before = np.concatenate(([0], np.cumsum(data.mask(begin, int(borders[-1, 1]) - begin) != 0)))
        starts, sizes = borders[:, 0], np.minimum(borders[:, 1] - borders[:, 0], ctx_len + 1)
        # the first token of a document is never a target
        marks = before[starts + sizes - begin] - before[np.minimum(starts + 1, borders[:, 1]) - begin]
        found = (sizes > 1) & (marks > 0)
        parts.append((starts[found], sizes[found]))
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts, sizes = (np.concatenate(each) for each in zip(*parts, strict=True))
    return starts, sizes


def read_of(data: Binidx, ctx_len: int, *, masked: bool) -> dict[str, int]:
    """What becomes of a corpus' documents: how many there are, how many are cut (into rows, where all is learned),
    and how many are left out because nothing in them is to be learned."""
    sizes = np.diff(data.documents, axis=1).ravel()
    if not masked:
        return {"documents": len(sizes), "cut": int((sizes > ctx_len + 1).sum()), "left_out": int((sizes < 2).sum())}
    starts = _learned(data, ctx_len)[0]
    cut = int(np.isin(starts, data.documents[sizes > ctx_len + 1, 0]).sum())
    return {"documents": len(sizes), "cut": cut, "left_out": len(sizes) - len(starts)}


@lru_cache(maxsize=16)
def _packed(data: Binidx, ctx_len: int, masked: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of several documents: their numbers, row by row, and where each row of them ends."""
    sizes = (_learned if masked else _pieces)(data, ctx_len)[1]
    return best_fit(sizes - 1, ctx_len)  # the last token of a document is a target alone


def _by_document(data: Binidx, config: TrainConfig, part: float, *, masked: bool) -> Order:
    """Rows of a document each, or packed with several. Raises DataError when less than a batch is left."""
    ctx_len = config.ctx_len
    starts, sizes = (_learned if masked else _pieces)(data, ctx_len)
    read = read_of(data, ctx_len, masked=masked)
    if not len(starts) and masked:
        raise DataError(
            f"{data.prefix}: none of {read['documents']} documents has a token to learn within train.ctx_len"
            f" {ctx_len}; give talks with answers, or a larger ctx_len"
        )
    if not len(starts):
        raise DataError(f"{data.prefix}: no document has two tokens, of which the second could be learned; give text")
    if not masked:
        log.info(
            "%d documents are %d rows; %d are longer than train.ctx_len %d, %d too short to learn from",
            read["documents"], len(starts), read["cut"], ctx_len, read["left_out"],
        )  # fmt: skip
    elif read["cut"] or read["left_out"]:
        log.info(
            "%d documents; %d cut at train.ctx_len %d, %d left out because nothing in them is to be learned",
            read["documents"], read["cut"], ctx_len, read["left_out"],
        )  # fmt: skip
    if config.rows != "packed":
        what = "documents with something to learn" if masked else "rows of documents"
        check_batch(data.prefix, len(starts), what, config, part)
        index = span_order(len(starts), config)
        return lambda number: [(int(starts[index(number)]), int(sizes[index(number)]))]
    members, ends = _packed(data, ctx_len, masked)
    check_batch(data.prefix, len(ends), f"rows of documents, packed up to {ctx_len} tokens,", config, part)
    full = (int(sizes.sum()) - len(sizes)) / (len(ends) * ctx_len)
    log.info("%d texts are packed into %d rows, full to %.1f %%", len(sizes), len(ends), 100 * full)
    index = span_order(len(ends), config)

    def spans(number: int) -> Spans:
        row = index(number)
        some = members[ends[row - 1] if row else 0 : ends[row]]
        return list(zip(starts[some].tolist(), sizes[some].tolist(), strict=True))

    return spans


def spans_of(
    data: Binidx | Mix, config: TrainConfig, rank: Share, order: Callable[[Binidx, TrainConfig, float], Order]
) -> Callable[[int], list[Row]]:
    """Function from a step to (corpus, its spans) of this process's rows."""
    if config.batch < rank.count:
        raise ConfigError(f"train.batch: {config.batch} rows a step for {rank.count} devices; each needs one at least")
    mix = data if isinstance(data, Mix) else Mix((data,), (1.0,))
    shares = Shares(mix.weights, config.seed or 0)
    orders = [order(corpus, config, part) for corpus, part in zip(mix.corpora, shares.parts, strict=True)]

    def spans(step: int) -> list[Row]:
        picked = map(shares.pick, _rows(step, config, rank))
        return [(mix.corpora[corpus], orders[corpus](number)) for corpus, number in picked]

    return spans


def _stacked(rows: Sequence[Row]) -> Batch:
    """Rows of equal length."""
    found = [np.asarray(data.tokens(*spans[0]), dtype=np.int64) for data, spans in rows]
    both = torch.from_numpy(np.stack(found))  # (b, ctx_len + 1)
    return Batch(both[:, :-1].contiguous(), both[:, 1:].contiguous())


def _padded(rows: Sequence[Row], *, masked: bool, packed: bool) -> Batch:
    """Documents as rows, padded on the right: ids with 0, targets with -1, mask with 0."""
    width = max(sum(count - 1 for _, count in spans) for _, spans in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), -1)
    mask = torch.zeros(len(rows), width) if masked else None
    starts = torch.zeros(len(rows), width, dtype=torch.bool) if packed else None
    for row, (data, spans) in enumerate(rows):
        first = 0
        for start, count in spans:
            last = first + count - 1
            tokens = torch.from_numpy(data.tokens(start, count).astype(np.int64))
            ids[row, first:last], targets[row, first:last] = tokens[:-1], tokens[1:]
            if mask is not None:
                mask[row, first:last] = torch.from_numpy(data.weights(start, count).astype(np.float32))[1:]
            if starts is not None:
                starts[row, first] = True
            first = last
    return Batch(ids, targets, mask, starts)


def named(spans: Callable[[int], list[Row]], step: int) -> str:
    """Which documents a step reads, by their numbers, corpus by corpus."""
    found: dict[str, set[int]] = {}
    for data, parts in spans(step):
        starts = data.documents[:, 0]
        for first, count in parts:
            low, high = np.searchsorted(starts, [first, first + count - 1], "right")
            found.setdefault(str(data.prefix), set()).update(range(int(low), int(high) + 1))
    told = {prefix: sorted(numbers) for prefix, numbers in found.items()}
    listed = {prefix: ", ".join(map(str, n[:MOST])) + (" ..." if len(n) > MOST else "") for prefix, n in told.items()}
    return "; ".join(f"documents {numbers} of {prefix}" for prefix, numbers in listed.items())


def documents_of(data: Mix, config: TrainConfig, step: int, *, masked: bool) -> str:
    """Which documents a step of `masked_batches` or `token_batches` reads, in words."""
    by_document = masked or config.rows in ("documents", "packed")
    order = partial(_by_document, masked=masked) if by_document else _chunks
    return named(spans_of(data, config, ALONE, order), step)


def rows_of(data: Binidx, config: TrainConfig, *, masked: bool) -> int:
    """How many rows one pass over a corpus has."""
    if config.rows == "packed":
        return len(_packed(data, config.ctx_len, masked)[1])
    if masked:
        return len(_learned(data, config.ctx_len)[0])
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
    if config.rows in ("documents", "packed"):
        return _document_batches(data, config, rank, first_step, masked=False)
    spans = spans_of(data, config, rank, _chunks)
    return (_stacked(spans(step)) for step in itertools.count(first_step))


def masked_batches(data: Binidx | Mix, config: TrainConfig, rank: Share, first_step: int) -> Iterator[Batch]:
    """Batches (b, T) of whole documents from step `first_step` on, without end; T is the longest of this share.

    The mask says how much targets count. Documents are cut at ctx_len; those without a token to learn are left out.
    Raises ConfigError for order magic, DataError when less than a batch is left.
    """
    return _document_batches(data, config, rank, first_step, masked=True)


def _document_batches(
    data: Binidx | Mix, config: TrainConfig, rank: Share, first_step: int, *, masked: bool
) -> Iterator[Batch]:
    if config.order == "magic":
        raise ConfigError("train.order: magic reads one stream of tokens; whole documents come shuffled or sequential")
    spans, packed = spans_of(data, config, rank, partial(_by_document, masked=masked)), config.rows == "packed"
    return (_padded(spans(step), masked=masked, packed=packed) for step in itertools.count(first_step))
