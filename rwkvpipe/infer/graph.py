"""A token of every row, or a chunk of a few rows of text, as one launch on an NVIDIA card.

A step is hundreds of small kernels, which a processor starts one by one in more time than a card takes for them, and
so is reading where it is of a few hundred tokens. As a CUDA graph, the model's own step recorded once for a number of
rows (and tokens), they are started together. A graph reads and writes memory of its own: when writing, the state lies
there from step to step, and rows that come and go are written in place; what was read is copied out.
"""

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from rwkvpipe.infer.decode_card import card_decoder
from rwkvpipe.kernel import gpu
from rwkvpipe.model.layers import State

log = logging.getLogger("rwkvpipe")

WARM = 2  # steps before one is recorded: libraries ask for memory in their first
MOST, ROWS = 2048, 32  # tokens of all rows, and rows, read as one launch at most; of more a card has enough to do
LEAST = 16  # tokens of a row for which reading is recorded; shorter ones are filled up


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
    # on a stream of this card, whichever is the current one; what other threads do to the card meanwhile is theirs.
    # What cannot be recorded leaves torch on the side: back from there
    once = torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local")
    with torch.cuda.device(device), torch.cuda.stream(here), once:
        work()
    return graph.replay


def enough(rows: int) -> int:
    """For how many rows a step is recorded, so that few are: 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on."""
    size = 1 << max(rows - 1, 0).bit_length()
    return 3 * size // 4 if size >= 4 and 3 * size // 4 >= rows else size


class Recorded:
    """Works of a model, each recorded when it is asked for; together they may take one another's memory."""

    def __init__(self, model: nn.Module):
        self.model, self.device = model, next(model.parameters()).device
        self.pool: tuple | None = None
        self.works: dict[Hashable, Callable[[], None]] = {}

    def forget(self) -> None:
        """Let go of all that was recorded; what is recorded from now on has memory of its own."""
        self.works.clear()
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def record(self, name: Hashable, what: str, work: Callable[[], None]) -> None:
        """Record a work; one that cannot be recorded is done as it is, and a line says why."""
        try:
            self.works[name] = recorded(work, self.device, self.pool)
        except RuntimeError as error:
            log.warning("%s is not recorded: %s", what, " ".join(str(error).split())[:200])
            self.works[name] = work


class Graphs(Recorded):
    """Steps of a model for as many rows as come; what a graph's rows have too many of is computed and left out.

    Weights must not change meanwhile.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.decoder = card_decoder(model)
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
        if size not in self.works:  # before the state is there: recording writes
            self._record(size)
        own = self._part(rows)
        for mine, given in _pairs(own, state):
            if mine.data_ptr() != given.data_ptr():
                mine.copy_(given)
        self.ids[:rows, 0] = ids
        self.works[size]()
        state.att_x, state.wkv, state.ffn_x = own.att_x, own.wkv, own.ffn_x
        return self.logits[:rows]

    def _room(self, rows: int) -> None:
        """Memory for so many rows; what was recorded for other memory goes."""
        self.forget()
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        self.state = self.model.start(rows, self.device)
        self.logits = torch.zeros(rows, self.model.config.vocab_size, device=self.device)

    def _record(self, size: int) -> None:
        if self._decodes(size):
            try:
                self._work(size)
            except RuntimeError as error:
                log.warning("kernels for a token are not used: %s", error)
                self.decoder = None
        self.record(size, f"a step of {size} rows", lambda: self._work(size))

    def _decodes(self, rows: int) -> bool:
        """Whether kernels for a token compute so many rows."""
        return self.decoder is not None and self.decoder.takes(rows)

    def _part(self, rows: int) -> State:
        """The first rows of the state, in place."""
        return first_rows(self.state, rows)

    def _work(self, rows: int) -> None:
        own = self._part(rows)
        if self._decodes(rows):
            self.decoder.step(self.ids[:rows, 0], own, self.logits[:rows])
            return
        with gpu.over_states():
            logits, after = self.model(self.ids[:rows], own)
        for mine, found in _pairs(own, after):
            if mine.data_ptr() != found.data_ptr():
                mine.copy_(found)
        self.logits[:rows] = logits[:, -1]


class Chunks(Recorded):
    """Reads rows of text as one launch: few rows, of so many tokens or fewer, which are filled up.

    A size is recorded when it comes for the second time.
    """

    def __init__(self, model: nn.Module, longest: int):
        super().__init__(model)
        self.longest, self.rows, self.seen = longest, 0, set()

    def features(self, ids: Tensor, state: State | None, lengths: Tensor) -> tuple[Tensor, State] | None:
        """What `LanguageModel.features` gives for ids (B, T), of which rows have `lengths` (B,); state None is its own.

        None where it is not to be recorded: the model computes it. The stream (B, T, D) lies where the next one is
        written.
        """
        rows, width = ids.shape
        size = enough(rows), min(self.longest, 1 << max(width - 1, LEAST - 1).bit_length())
        if not rows or width > size[1] or size[0] > ROWS or size[0] * size[1] > MOST or self.model.training:
            return None
        if size not in self.seen:
            self.seen.add(size)
            return None
        if size[0] > self.rows:
            self._room(size[0])
        if size not in self.works:
            self.record(size, f"reading {size[0]} rows of {size[1]} tokens", lambda: self._work(*size))
        copy(first_rows(self.state, rows), self.model.start(rows, self.device) if state is None else state)
        self.ids[:rows, :width], self.lengths[:rows] = ids, lengths
        self.works[size]()
        found = self.found[: size[0] * size[1]].view(*size, -1)[:rows, :width]
        own = first_rows(self.state, rows)
        after = State(*([torch.empty_like(x) for x in parts] for parts in (own.att_x, own.wkv, own.ffn_x)))
        copy(after, own)
        return found, after

    def _room(self, rows: int) -> None:
        """Memory for so many rows; what was recorded for other memory goes."""
        self.forget()
        self.rows = rows
        self.ids = torch.zeros(rows, self.longest, dtype=torch.long, device=self.device)
        self.lengths = torch.ones(rows, dtype=torch.long, device=self.device)
        self.state = self.model.start(rows, self.device)
        self.found = torch.zeros(MOST, self.model.config.n_embd, device=self.device)

    def _work(self, rows: int, width: int) -> None:
        own = first_rows(self.state, rows)
        lengths = self.lengths[:rows].clamp(max=width)  # of rows that are not there they are what they were
        found, after = self.model.features(self.ids[:rows, :width], own, lengths)
        copy(own, after)
        self.found[: rows * width] = found.flatten(0, 1)


def first_rows(state: State, rows: int) -> State:
    """The first rows of a state, in place."""
    return State(*([x[:rows] for x in parts] for parts in (state.att_x, state.wkv, state.ffn_x)))


def _pairs(one: State, other: State) -> list[tuple[Tensor, Tensor]]:
    parts = ((one.att_x, other.att_x), (one.wkv, other.wkv), (one.ffn_x, other.ffn_x))
    return [pair for mine, given in parts for pair in zip(mine, given, strict=True)]


def copy(to: State, given: State) -> None:
    """Overwrite a state, all its parts together."""
    mine, others = zip(*_pairs(to, given), strict=True)
    torch._foreach_copy_(list(mine), list(others))


def _recordable(model: nn.Module) -> bool:
    """Whether a model's work can be recorded: on an NVIDIA card, in fp32, not while it learns."""
    on_card = all(x.is_cuda and x.dtype == torch.float32 for x in model.parameters())
    return on_card and not torch.version.hip and not any(module.training for module in model.modules())


def graphs(model: nn.Module) -> Graphs | None:
    """The recorded form of a model's step, or None where the model's own is to be used: off NVIDIA's cards."""
    if not _recordable(model):
        return None
    log.info("writing token by token: a CUDA graph for each number of rows")
    return Graphs(model)


def chunks(model: nn.Module, longest: int) -> Chunks | None:
    """The recorded form of a model's reading, of so many tokens of a row at a time, or None as for `graphs`."""
    if not _recordable(model):
        return None
    log.info("reading few rows: a CUDA graph for each number of rows and tokens that comes again")
    return Chunks(model, longest)
