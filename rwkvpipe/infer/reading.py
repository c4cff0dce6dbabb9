"""Texts read by a model, many at a time and a chunk after the other: the state they leave, what they weigh."""

from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor, nn

from rwkvpipe.infer import graph
from rwkvpipe.infer.draw import logprob
from rwkvpipe.infer.packed import kind_of
from rwkvpipe.infer.prefix import Header, headers
from rwkvpipe.kernel import gpu
from rwkvpipe.model.layers import State

CHUNK = 256  # tokens of a row read in one forward
SLACK = 32  # tokens of padding that cost less than another group
LOGITS = 1 << 25  # numbers of logits held at a time


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows padded on the right (B, T), and their lengths (B,)."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long, device=device)
    return ids.view(len(rows), width), torch.tensor(lengths, device=device)


class Reader:
    """Reads rows of ids, at most `rows` at a time."""

    def __init__(self, model: nn.Module, rows: int):
        self.model, self.rows = model, rows
        self.device = next(model.parameters()).device
        self.recorded = graph.chunks(model, CHUNK)

    def groups(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of rows of about equal length, the shortest first, as many as go at a time."""
        group: list[int] = []
        for n in sorted(range(len(lengths)), key=lengths.__getitem__):
            # one long row must not make all others as long
            if group and (len(group) == self.rows or lengths[n] > 2 * lengths[group[0]] + SLACK):
                yield group
                group = []
            group.append(n)
        if group:
            yield group

    @torch.inference_mode()
    def chunks(
        self, rows: Sequence[Sequence[int]], state: State | None = None
    ) -> Generator[None, None, tuple[Tensor, State]]:
        """Read rows from `state`, a chunk each time it is asked for more.

        It returns logits (B, V) after the last token of each row, and the state there.
        """
        ids, lengths = padded(rows, self.device)
        last = None
        for start in range(0, ids.shape[1], CHUNK):
            if start:
                yield
            part = ids[:, start : start + CHUNK]
            here = (lengths - start).clamp(0, part.shape[1])
            features, state = self._features(part, state, here)
            ends = features.gather(1, (here - 1).clamp(min=0)[:, None, None].expand(-1, 1, features.shape[-1]))[:, 0]
            last = ends if last is None else torch.where(here[:, None] > 0, ends, last)  # (B, D)
        return self.model.logits(last), state

    def _features(self, ids: Tensor, state: State | None, lengths: Tensor) -> tuple[Tensor, State]:
        """The stream (B, T, D) of a chunk of rows of `lengths`, to be used before the next, and the state after it."""
        with gpu.roughly(kind_of(self.model) not in (None, "fp32")):
            if self.recorded and (found := self.recorded.features(ids, state, lengths)):
                return found
            return self.model.features(ids, state, None if bool((lengths == ids.shape[1]).all()) else lengths)

    def read(self, rows: Sequence[Sequence[int]], state: State | None = None) -> tuple[Tensor, State]:
        """The same at once."""
        reading = self.chunks(rows, state)
        while True:
            try:
                next(reading)
            except StopIteration as done:
                return done.value

    def shared(self, texts: Sequence[list[int]]) -> Iterator[tuple[list[int], Tensor, State]]:
        """Read texts, in an order of its own: (their numbers, logits (B, V), state) of each group.

        What several begin with is read once (see `prefix`); equal texts are the caller's to find.
        """
        below: list[tuple[Header, int, State | None]] = [(headers(texts), 0, None)]
        while below:
            header, depth, state = below.pop()
            if header.depth:
                state = self.read([texts[header.example][depth : header.depth]], state)[1]
            rests = [texts[n][header.depth :] for n in header.rows]
            for group in self.groups([len(rest) for rest in rests]):
                start = None if state is None else state.take([0] * len(group))
                yield [header.rows[n] for n in group], *self.read([rests[n] for n in group], start)
            below += [(child, header.depth, state) for child in reversed(header.below)]

    @torch.inference_mode()
    def sums(self, rows: Sequence[Sequence[int]], state: State | None, window: int) -> Iterator[Tensor]:
        """Log-probability of each row's tokens but the first, read from `state`: (B,) fp64 a window of targets."""
        ids, lengths = padded(rows, self.device)
        width = ids.shape[1] - 1
        for start in range(0, width, window):
            end, total = min(start + window, width), torch.zeros(len(ids), dtype=torch.float64, device=self.device)
            for a in range(start, end, CHUNK):
                b = min(a + CHUNK, end)
                here = (lengths - 1 - a).clamp(0, b - a)
                features, state = self._features(ids[:, a:b], state, here)
                step = max(1, LOGITS // (len(ids) * self.model.config.vocab_size))
                for c in range(0, b - a, step):
                    cut = slice(c, min(c + step, b - a))
                    found = logprob(self.model.logits(features[:, cut]), ids[:, a + 1 : b + 1][:, cut])  # (B, step)
                    places = torch.arange(cut.start, cut.stop, device=self.device)
                    total += found.double().masked_fill(places >= here[:, None], 0.0).sum(1)
            yield total

    @torch.inference_mode()
    def continued(self, logits: Tensor, state: State, rows: list[int], ends: list[list[int]]) -> list[float]:
        """Log-probabilities of continuations, each after row `rows[i]` of what was read."""
        index = torch.tensor(rows, device=self.device)
        first = torch.tensor([end[0] for end in ends], device=self.device)
        total = logprob(logits[index], first).double()
        width = max(len(end) for end in ends)
        if width > 1:
            total = total + sum(self.sums(ends, state.take(rows), width))
        return total.tolist()
