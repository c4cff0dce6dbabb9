"""What step n sees. Every batch is a function of the corpus, the settings and the step alone."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.data.binidx import Binidx

log = logging.getLogger("rwkvpipe")


@dataclass(frozen=True)
class Batch:
    """ids (B, T) int64; targets (B, T) int64, -1 where there is none; mask (B, T) float of 0 and 1, or None for all."""

    ids: Tensor
    targets: Tensor
    mask: Tensor | None = None


class Share(Protocol):
    """Which of the processes that train together this is."""

    index: int
    count: int


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def magic_prime(chunks: int) -> int | None:
    """The largest prime of the form 3n + 2 up to chunks - 1, None if there is none (RWKV-LM, make_data.py).

    Modulo such a prime cubes are all different, so each chunk but the last few comes once in so many rows.
    """
    start = chunks - 1 - (chunks - 3) % 3  # the largest 3n + 2 that is not above chunks - 1
    return next((number for number in range(start, 1, -3) if _prime(number)), None)


def place(step: int, row: int, prime: int, batch: int = 1) -> int:
    """The chunk that a row of a step reads: RWKV-LM's visit number cubed, times the golden ratio, modulo `prime`."""
    visit = 1 + step * batch + row
    factor = int(prime * ((math.sqrt(5) - 1) / 2))
    return factor * pow(visit, 3, prime) % prime


def _shuffled(count: int, seed: int) -> Callable[[int], int]:
    """Function from a running number to an index: pass after pass, each in an order of its own."""

    @lru_cache(maxsize=2)  # a batch may end one pass and begin the next
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(count)

    def index(number: int) -> int:
        epoch, position = divmod(number, count)
        return int(order(epoch)[position])

    return index


def _rows(step: int, config: TrainConfig, rank: Share) -> range:
    """The running numbers of the rows of a step that belong to a process: every count-th."""
    return range(step * config.batch + rank.index, (step + 1) * config.batch, rank.count)


def _check_share(config: TrainConfig, rank: Share) -> None:
    if config.batch < rank.count:
        raise ConfigError(f"train.batch: {config.batch} rows a step for {rank.count} devices; each needs one at least")


def check_batch(where: str | Path, found: int, what: str, config: TrainConfig) -> None:
    """Raise DataError where a step would have to take one thing twice."""
    if found < config.batch:
        raise DataError(
            f"{where}: {found} {what} are fewer than the {config.batch} that a step takes (train.batch);"
            " give more of them, or a smaller batch"
        )


def _chunk_order(data: Binidx, config: TrainConfig) -> Callable[[int], int]:
    """Function from a running number to a chunk. Raises DataError when there are too few."""
    tokens, ctx_len = len(data), config.ctx_len
    if tokens < ctx_len + 1:
        raise DataError(
            f"{data.prefix}: the corpus has {tokens} tokens, one row takes {ctx_len + 1} (train.ctx_len {ctx_len}"
            " and the last target); give more text or a smaller ctx_len"
        )
    if config.order != "magic":
        count = (tokens - 1) // ctx_len  # neighbours share a token: target of one, input of the next
        check_batch(data.prefix, count, f"rows of {ctx_len} tokens", config)
        return _shuffled(count, config.seed or 0) if config.order == "shuffled" else lambda number: number % count
    chunks = tokens // ctx_len
    prime = magic_prime(chunks)
    if prime is None or prime <= 0.9 * chunks:
        raise DataError(
            f"{data.prefix}: train.order magic: {tokens} tokens are {chunks} chunks of {ctx_len}, and the largest"
            f" fitting prime is {prime or 'missing'}, which reads too small a part of them (RWKV-LM asks for over 0.9);"
            " choose order shuffled, a smaller ctx_len, or more text"
        )
    check_batch(data.prefix, chunks, f"rows of {ctx_len} tokens", config)
    log.info("order magic: %d chunks of %d tokens, prime %d", chunks, ctx_len, prime)
    return lambda number: place(number, 0, prime)


def token_batches(data: Binidx, config: TrainConfig, rank: Share, first_step: int) -> Iterator[Batch]:
    """Batches (b, ctx_len) of a stream of tokens from step `first_step` on, without end, document borders ignored.

    b is this process's share of config.batch. Chunk i is tokens i ctx_len to (i + 1) ctx_len, targets one further.
    Raises DataError when the corpus is too short for the order asked for.
    """
    _check_share(config, rank)
    chunk = _chunk_order(data, config)
    width = config.ctx_len

    def batches() -> Iterator[Batch]:
        step = first_step
        while True:
            rows = [data.tokens(chunk(number) * width, width + 1) for number in _rows(step, config, rank)]
            both = torch.from_numpy(np.stack(rows).astype(np.int64))  # (b, ctx_len + 1)
            yield Batch(both[:, :-1].contiguous(), both[:, 1:].contiguous())
            step += 1

    return batches()


def _learnable(data: Binidx, config: TrainConfig, rank: Share) -> np.ndarray:
    """Documents (n, 2) with a token to learn, cut at ctx_len. Raises DataError when none is left."""
    found, cut = [], 0
    for start, end in data.documents.tolist():
        count = min(end - start, config.ctx_len + 1)
        # the first token of a document is never a target
        if count > 1 and data.mask(start + 1, count - 1).any():
            found.append((start, start + count))
            cut += end - start > count
    left_out = len(data.documents) - len(found)
    if rank.index == 0 and (cut or left_out):
        log.info(
            "%d documents; %d cut at train.ctx_len %d, %d left out because nothing in them is to be learned",
            len(data.documents), cut, config.ctx_len, left_out,
        )  # fmt: skip
    if not found:
        raise DataError(
            f"{data.prefix}: none of {len(data.documents)} documents has a token to learn within train.ctx_len"
            f" {config.ctx_len}; give talks with answers, or a larger ctx_len"
        )
    check_batch(data.prefix, len(found), "documents with something to learn", config)
    return np.asarray(found)


def _padded(data: Binidx, spans: list[tuple[int, int]]) -> Batch:
    """Documents as rows, padded on the right: ids with 0, targets with -1, mask with 0."""
    width = max(end - start for start, end in spans) - 1
    ids = torch.zeros(len(spans), width, dtype=torch.long)
    targets = torch.full((len(spans), width), -1)
    mask = torch.zeros(len(spans), width)
    for row, (start, end) in enumerate(spans):
        tokens = torch.from_numpy(data.tokens(start, end - start).astype(np.int64))
        marks = torch.from_numpy(data.mask(start, end - start).astype(np.float32))
        length = end - start - 1
        ids[row, :length], targets[row, :length] = tokens[:-1], tokens[1:]
        mask[row, :length] = (marks[1:] != 0).float()
    return Batch(ids, targets, mask)


def masked_batches(data: Binidx, config: TrainConfig, rank: Share, first_step: int) -> Iterator[Batch]:
    """Batches (b, T) of whole documents from step `first_step` on, without end; T is the longest of this share.

    The mask marks the targets to learn. Documents are cut at ctx_len; those without a token to learn are left out.
    Raises ConfigError for order magic, DataError when less than a batch is left.
    """
    _check_share(config, rank)
    if config.order == "magic":
        raise ConfigError("train.order: magic reads one stream of tokens; whole documents come shuffled or sequential")
    documents = _learnable(data, config, rank)
    count = len(documents)
    index = _shuffled(count, config.seed or 0) if config.order == "shuffled" else lambda number: number % count

    def batches() -> Iterator[Batch]:
        step = first_step
        while True:
            yield _padded(data, [tuple(documents[index(number)].tolist()) for number in _rows(step, config, rank)])
            step += 1

    return batches()
