"""A token of every row as one launch on an NVIDIA card: the model's own step, recorded once for a number of rows.

A step is hundreds of small kernels, which a processor starts one by one in more time than a card takes for them. As a
CUDA graph they are started together. A graph reads and writes memory of its own, so the state lies there from step to
step; rows that come and go are written in place.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rwkvpipe.model.layers import State

log = logging.getLogger("rwkvpipe")

WARM = 2  # steps before one is recorded: libraries ask for memory in their first


def recorded(work: Callable[[], None], device: torch.device, pool: tuple | None) -> Callable[[], None]:
    """What does `work` again, on the same memory, in one launch. It is done a few times here already.

    What is computed in between lies in `pool`, which works that are not done at the same time may share.
    """
    side, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(WARM):
            work()
    here.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph.replay


def enough(rows: int) -> int:
    """For how many rows a step is recorded, so that few are: 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on."""
    size = 1 << max(rows - 1, 0).bit_length()
    return 3 * size // 4 if size >= 4 and 3 * size // 4 >= rows else size


class Graphs:
    """Steps of a model for as many rows as come; what a graph's rows have too many of is computed and left out."""

    def __init__(self, model: nn.Module):
        self.model, self.device = model, next(model.parameters()).device
        self.steps: dict[int, Callable[[], None]] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.ids = torch.zeros(0, 1, dtype=torch.long, device=self.device)
        self.state = State([], [], [])
        self.logits = torch.zeros(0)

    def step(self, ids: Tensor, state: State) -> Tensor:
        """Logits (rows, V) after one id for each row, (rows,); the state becomes the one after it.

        Both lie where the next step writes: whoever wants to keep them copies them.
        """
        rows, size = len(ids), enough(len(ids))
        if size > len(self.ids):
            self._room(size)
        if size not in self.steps:  # before the state is there: recording writes
            self.steps[size] = self._recorded(size)
        own = self._part(rows)
        for mine, given in _pairs(own, state):
            if mine.data_ptr() != given.data_ptr():
                mine.copy_(given)
        self.ids[:rows, 0] = ids
        self.steps[size]()
        state.att_x, state.wkv, state.ffn_x = own.att_x, own.wkv, own.ffn_x
        return self.logits[:rows]

    def _recorded(self, rows: int) -> Callable[[], None]:
        def work() -> None:
            self._work(rows)

        try:
            return recorded(work, self.device, self.pool)
        except RuntimeError as error:
            log.warning("a step of %d rows is not recorded: %s", rows, " ".join(str(error).split())[:200])
            return work

    def _room(self, rows: int) -> None:
        """Memory for so many rows; what was recorded for other memory goes."""
        self.steps.clear()
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        self.state = self.model.start(rows, self.device)
        self.logits = torch.zeros(rows, self.model.config.vocab_size, device=self.device)

    def _part(self, rows: int) -> State:
        """The first rows of the state, in place."""
        return State(*([x[:rows] for x in parts] for parts in (self.state.att_x, self.state.wkv, self.state.ffn_x)))

    def _work(self, rows: int) -> None:
        own = self._part(rows)
        logits, after = self.model(self.ids[:rows], own)
        for mine, found in _pairs(own, after):
            mine.copy_(found)
        self.logits[:rows] = logits[:, -1]


def _pairs(one: State, other: State) -> list[tuple[Tensor, Tensor]]:
    parts = ((one.att_x, other.att_x), (one.wkv, other.wkv), (one.ffn_x, other.ffn_x))
    return [pair for mine, given in parts for pair in zip(mine, given, strict=True)]


def graphs(model: nn.Module) -> Graphs | None:
    """The recorded form of a model's step, or None where the model's own is to be used: off NVIDIA's cards."""
    on_card = all(x.is_cuda and x.dtype == torch.float32 for x in model.parameters())
    if not on_card or torch.version.hip or any(module.training for module in model.modules()):
        return None
    log.info("writing token by token: a CUDA graph for each number of rows")
    return Graphs(model)
