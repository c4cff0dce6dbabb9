"""Which process is this, on which device does it compute, and what the processes that train together exchange.

They train in data parallel: each holds the whole model, computes some rows of a step, and the gradients are summed.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from rwkvpipe.base import crew
from rwkvpipe.base.errors import ConfigError, Parted

log = logging.getLogger("rwkvpipe")

PARENT = os.getppid()
BUCKET = 1 << 24  # numbers that are exchanged at once
LONGEST = timedelta(days=7)  # a process that is gone is noticed at once; one that is at work is waited for


@dataclass(frozen=True)
class Rank:
    """One of the processes that train together: its number, how many there are, its device."""

    index: int
    count: int
    device: torch.device
    lockstep: bool = False
    """Whether it must make as many passes as the others, because their models are one."""

    def mine(self, rows: int, micro_batch: int) -> Iterator[slice]:
        """The rows of a step that this process computes, at most `micro_batch` at a time: every count-th part.

        In lockstep it may be asked to compute none, where others still have some.
        """
        return (own for own, _ in self.shares(rows, micro_batch))

    def shares(self, rows: int, micro_batch: int) -> Iterator[tuple[slice, slice]]:
        """The same, each with the rows that decide how it is computed: in lockstep those of all processes at once."""
        size = min(micro_batch, -(-rows // self.count))
        for round in range(0, rows, self.count * size):
            first = min(round + self.index * size, rows)
            own = slice(first, min(first + size, rows))
            if self.lockstep:
                yield own, slice(round, min(round + self.count * size, rows))
            elif first < rows:
                yield own, own

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place. Raises Parted when one of them is gone."""
        if self.count > 1:
            self._together(lambda: distributed.all_reduce(value))
        return value

    def total(self, *numbers: float) -> list[float]:
        """The sums of numbers over all processes."""
        return self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def gather(self, value: Any) -> list:
        """What each process gives (anything that JSON holds), the first one's first."""
        if self.count == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.count, dtype=torch.int64)
        sizes[self.index] = len(own)
        texts = torch.zeros(self.count, int(self.sum(sizes).max()), dtype=torch.uint8)
        texts[self.index, : len(own)] = own
        self.sum(texts)
        return [json.loads(bytes(text[:size].tolist())) for text, size in zip(texts, sizes.tolist(), strict=True)]

    def wait(self) -> None:
        """Wait until all have come here."""
        self.total(0)

    def sum_gradients(self, parameters: list[Tensor], stopping: bool) -> bool:
        """Sum the gradients of all processes, in place; returns whether one of them is told to stop.

        A tensor that has none anywhere keeps none.
        """
        if self.count == 1:
            return stopping
        if self.lockstep:  # they are summed already
            return self.total(float(stopping))[0] > 0
        found = self.total(float(stopping), *(value.grad is not None for value in parameters))
        grads = []
        for value, has in zip(parameters, found[1:], strict=True):
            if has:
                value.grad = torch.zeros_like(value) if value.grad is None else value.grad
                grads.append(value.grad)
        while grads:
            bucket = [grads.pop(0)]
            while grads and sum(grad.numel() for grad in bucket) + grads[0].numel() <= BUCKET:
                bucket.append(grads.pop(0))
            flat = self.sum(torch.cat([grad.flatten() for grad in bucket]))
            for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(part.view_as(grad))
        return found[0] > 0

    def _together(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            log.debug("%s", error)
            raise Parted(f"process {self.index + 1} of {self.count}: another of them is gone; this one stops") from None


ALONE = Rank(0, 1, torch.device("cpu"))


def deserted() -> bool:
    """Whether whoever started this process is gone, so that nobody waits for what it does."""
    return os.getppid() != PARENT or crew.deserted()


def _number(variable: str, least: int, default: int) -> int:
    text = os.environ.get(variable, "")
    if text and not (text.isdecimal() and int(text) >= least):
        raise ConfigError(f"{variable}: {text!r} in the environment is no number of processes; unset it")
    return int(text) if text else default


def here() -> tuple[int, int, int]:
    """(index, count, index on this machine) of this process. Raises ConfigError where the environment is at odds."""
    count = _number("WORLD_SIZE", 1, 1)
    index = _number("RANK", 0, 0)
    if index >= count:
        raise ConfigError(f"RANK: {index} is not below WORLD_SIZE {count}; let launch or torchrun set both")
    return index, count, _number("LOCAL_RANK", 0, index)


def start() -> Rank:
    """Choose the device and say which; join the other processes, if there are any.

    RWKVPIPE_DEVICE (`cpu` or `cuda`, set by `launch`) decides; without it a GPU is used if there is one.
    Raises ConfigError when a GPU was asked for and none can be used.
    """
    wanted = os.environ.get("RWKVPIPE_DEVICE", "")
    if wanted not in ("", "cpu", "cuda"):
        raise ConfigError(f"RWKVPIPE_DEVICE: {wanted!r} is no device; it is cpu or cuda")
    index, count, local = here()
    usable = torch.cuda.is_available()
    if wanted == "cuda" and not usable:
        raise ConfigError("RWKVPIPE_DEVICE: cuda was asked for, but torch sees no usable GPU; launch 0 is the CPU")
    if wanted == "cpu" or not usable:
        device, name = torch.device("cpu"), "cpu"
    else:
        if count > 1 and local >= torch.cuda.device_count():
            raise ConfigError(f"process {local + 1} of this machine has no GPU: torch sees {torch.cuda.device_count()}")
        device = torch.device("cuda", local if count > 1 else torch.cuda.current_device())
        torch.cuda.set_device(device)
        name = f"{device} ({torch.cuda.get_device_name(device)})"
    torch.set_num_threads(torch.get_num_threads())  # said aloud, MKL takes no fewer on a machine of fewer cores
    if index:
        log.setLevel(logging.WARNING)  # one of them speaks for all
    together = f"{count} processes, " if count > 1 else ""
    log.info("device %s, %s%d threads, torch %s", name, together, torch.get_num_threads(), torch.__version__)
    rank = Rank(index, count, device)
    if count > 1 and not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        rank._together(
            lambda: distributed.init_process_group(
                backend, init_method=crew.meeting() or "env://", rank=index, world_size=count, timeout=LONGEST
            )
        )
    return rank
