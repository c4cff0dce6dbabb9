"""One engine for many clients: what they ask waits in a bounded queue and is written side by side, by one thread."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.base.errors import ConfigError, PipeError
from rwkvpipe.infer.engine import Engine
from rwkvpipe.infer.prefix import SAVED
from rwkvpipe.infer.reading import SLACK
from rwkvpipe.infer.row import Job, Row
from rwkvpipe.model.layers import State


class Full(PipeError):
    """The queue has no room; ask again later."""


class Closed(PipeError):
    """Nothing is written any more."""


@dataclass(frozen=True)
class Token:
    """One id that was chosen: its plain log-probability, and the likeliest ids at its place."""

    number: int
    logprob: float | None = None
    likely: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Event:
    """News of one text of an order: bytes that stay, the ids since, how it ended; or what went wrong."""

    index: int
    data: bytes = b""
    tokens: Sequence[Token] = ()
    finish: str | None = None
    error: PipeError | None = None


@dataclass(eq=False)
class Order:
    """What one client asks: `samples` texts after each prompt, told to `listen` as they come (from another thread)."""

    prompts: list[list[int]]
    sampling: SamplingConfig
    samples: int
    top: int | None
    listen: Callable[[Event], None]
    given_up: bool = False
    left: int = field(init=False)

    def __post_init__(self):
        self.left = len(self.prompts) * self.samples


@dataclass(eq=False)
class _Text:
    """One text of an order, and what of it was told."""

    order: Order
    index: int
    job: Job
    bytes_told: int = 0
    ids_told: int = 0


class Desk:
    """Takes orders from any thread; `run` writes them until `close`."""

    def __init__(self, engine: Engine, waiting: int):
        self.engine, self.waiting, self.kept = engine, waiting, engine.states()
        self.slots = engine.slots(engine.rows, self.kept)
        self.change = threading.Condition()
        self.queue: deque[tuple[Order, int]] = deque()  # prompts that wait to be read
        self.ready: deque[_Text] = deque()  # texts that wait for a slot
        self.texts: dict[Row, _Text] = {}
        self.orders: set[Order] = set()
        self.closed = False
        self.readings: deque[tuple[list[tuple[Order, int]], Generator]] = deque()  # groups of prompts, in turns

    def submit(self, order: Order) -> None:
        """Take an order. Raises Full, Closed, or what is wrong with its settings."""
        Row(Job(0, 0, order.prompts[0], order.sampling, torch.empty(0), State([], [], []), 0), self.slots.words)
        most = self.engine.rows + self.waiting
        if order.left > most:
            raise ConfigError(f"{order.left} texts are asked for at once; this server takes {most} at most")
        with self.change:
            if self.closed:
                raise Closed("the server is stopping")
            held = sum(other.left for other in self.orders)
            if held + order.left > most:
                raise Full(f"{held} texts are being written or wait, and {most} is the most; try again later")
            self.orders.add(order)
            self.queue.extend((order, n) for n in range(len(order.prompts)))
            self.change.notify()

    def give_up(self, order: Order) -> None:
        """The client has gone: its slots are free before the next token."""
        with self.change:
            order.given_up = True
            self.orders.discard(order)
            self.change.notify()

    def close(self) -> None:
        """Stop writing, whatever is on the way."""
        with self.change:
            self.closed = True
            self.change.notify()

    def run(self) -> None:
        """Write until closed. What goes wrong is told to those who wait."""
        problem: PipeError = Closed("the engine failed; the server's log says how")
        try:
            while self._await_work():
                self._turn()
            problem = Closed("the server is stopping")
        except PipeError as error:
            problem = error
            raise
        finally:
            self._fail(problem)

    def _await_work(self) -> bool:
        with self.change:
            while not (self.closed or self.queue or self.ready or self.slots.busy or self.readings):
                self.change.wait()
            return not self.closed

    def _turn(self) -> None:
        """Forget who has gone, read a chunk, start what is ready, write one token of everything."""
        self._forget()
        self._read()
        if self.ready and self.slots.free:
            texts = [self.ready.popleft() for _ in range(min(len(self.ready), self.slots.free))]
            done = self.slots.enter([text.job for text in texts])
            rows = {row.job: row for row in [*filter(None, self.slots.rows), *done]}
            self.texts |= {rows[text.job]: text for text in texts}
            self._tell(done)
        if self.slots.busy:
            self._tell(self.slots.step())

    def _forget(self) -> None:
        with self.change:
            self.queue = deque(item for item in self.queue if not item[0].given_up)
        self.ready = deque(text for text in self.ready if not text.order.given_up)
        self.readings = deque(one for one in self.readings if not all(order.given_up for order, _ in one[0]))
        for row, text in list(self.texts.items()):
            if text.order.given_up:
                self.slots.drop(row)
                del self.texts[row]

    def _read(self) -> None:
        """Begin to read prompts that wait, where there is room, and read one more chunk of one group."""
        with self.change:
            group = self._alike(self.slots.free - len(self.ready) - sum(len(group) for group, _ in self.readings))
        if group:
            self.readings.append((group, self._begin([order.prompts[n] for order, n in group])))
        if not self.readings:
            return
        group, reading = self.readings.popleft()
        try:
            next(reading)
        except StopIteration as done:
            self._made_ready(group, *done.value)
        else:
            self.readings.append((group, reading))

    def _alike(self, room: int) -> list[tuple[Order, int]]:
        """The prompt that has waited longest, and others of about its length: long ones must not hold up short ones."""
        group, left = [], deque()
        for order, n in self.queue:
            length = len(order.prompts[n])
            first = len(group[0][0].prompts[group[0][1]]) if group else length
            fits = max(length, first) <= 2 * min(length, first) + SLACK
            (group if fits and len(group) < room else left).append((order, n))
        self.queue = left
        return group

    def _begin(self, prompts: list[list[int]]) -> Generator:
        """Read prompts on from what is known of them. What one has in common with an earlier text is kept, too."""
        found = [self.kept.find(ids) for ids in prompts]
        state, starts = self.engine.model.start(len(prompts), self.slots.device), [length for length, _ in found]
        for row, (_, known) in enumerate(found):
            if known is not None:
                state.put([row], known)
        depths = [self.kept.alike(ids) for ids in prompts]
        turns = [max(a, b if b - a >= SAVED else 0) for a, b in zip(starts, depths, strict=True)]
        if turns != starts:
            heads = [ids[a:b] for ids, a, b in zip(prompts, starts, turns, strict=True)]
            _, state = yield from self.engine.reader.chunks(heads, state)
            for row, (ids, head, turn) in enumerate(zip(prompts, heads, turns, strict=True)):
                if head:
                    self.kept.add(ids[:turn], state.take([row]))
            yield
        rests = [ids[turn:] for ids, turn in zip(prompts, turns, strict=True)]
        return (yield from self.engine.reader.chunks(rests, state))

    def _made_ready(self, group: list[tuple[Order, int]], logits: torch.Tensor, state: State) -> None:
        for row, (order, n) in enumerate(group):
            if order.given_up:
                continue
            ids = order.prompts[n]
            self.kept.add(ids, state.take([row]))
            for sample in range(order.samples):
                job = Job(n, sample, ids, order.sampling, logits, state, row, order.top)
                self.ready.append(_Text(order, n * order.samples + sample, job))

    def _tell(self, done: Sequence[Row]) -> None:
        """News of every row to whom it belongs."""
        for row in [*filter(None, self.slots.rows), *done]:
            text = self.texts[row]
            if row.error is not None:  # that of its own settings: nobody else's
                del self.texts[row]
                self.give_up(text.order)
                text.order.listen(Event(text.index, error=row.error))
                continue
            data = row.written()
            new = range(text.ids_told, len(row.ids))
            tokens = [Token(row.ids[n], *(row.told[n] if row.told else ())) for n in new]
            if not new and row.finish is None:
                continue
            event = Event(text.index, data[text.bytes_told :], tokens, row.finish)
            text.bytes_told, text.ids_told = len(data), len(row.ids)
            text.order.listen(event)
            if row.finish is not None:
                del self.texts[row]
                with self.change:
                    text.order.left -= 1
                    if not text.order.left:
                        self.orders.discard(text.order)

    def _fail(self, error: PipeError) -> None:
        with self.change:
            self.closed = True
            orders, self.orders = self.orders, set()
        for order in orders:
            order.listen(Event(0, error=error))
