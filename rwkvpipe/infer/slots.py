"""The rows that are being written side by side; one that is over makes room for the next."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rwkvpipe.base.errors import ConfigError
from rwkvpipe.infer.decode import decoder
from rwkvpipe.infer.draw import Asked, choose
from rwkvpipe.infer.graph import graphs
from rwkvpipe.infer.prefix import States
from rwkvpipe.infer.row import Job, Row
from rwkvpipe.infer.words import Words
from rwkvpipe.model.layers import State

FAINTEST = 2.0**-100  # of times that fade: an id that has come has come, `presence` asks no more


class Slots:
    """At most `limit` rows, each with its own settings; they share one state and one step of the model."""

    def __init__(self, model: nn.Module, words: Words, limit: int, kept: States | None = None):
        self.model, self.words, self.limit, self.kept = model, words, limit, kept
        self.device = next(model.parameters()).device
        self.rows: list[Row | None] = []
        self.state: State | None = None
        self.decoder = decoder(model) or graphs(model)
        self.table: dict[str, Tensor] = {}  # (rows, V): how often an id came, and whether; where penalties ask
        self.forbidden = None if words.owned.all() else torch.from_numpy(np.flatnonzero(~words.owned)).to(self.device)
        self.steps = 0

    @property
    def free(self) -> int:
        """How many jobs there is room for."""
        return self.limit - sum(row is not None for row in self.rows)

    @property
    def busy(self) -> bool:
        """Whether anything is being written."""
        return any(row is not None for row in self.rows)

    @torch.inference_mode()
    def enter(self, jobs: Sequence[Job]) -> list[Row]:
        """Start jobs, as many as there is room for, and choose their first tokens; returns rows that are over."""
        rows = [Row(job, self.words) for job in jobs]  # what cannot be is refused before anything has changed
        self._grow(len(rows) - self.rows.count(None), jobs[0].state)
        places = [place for place, row in enumerate(self.rows) if row is None][: len(rows)]
        logits, first = [], 0
        while first < len(jobs):  # those of one group of prompts are moved together
            state = jobs[first].state
            end = next((n for n in range(first, len(jobs)) if jobs[n].state is not state), len(jobs))
            source = [job.row for job in jobs[first:end]]
            self.state.put(places[first:end], state.take(source))
            logits.append(jobs[first].logits[torch.tensor(source, device=self.device)])
            first = end
        for place, row in zip(places, rows, strict=True):
            self.rows[place] = row
            if row.penalised:
                self._count(place, row)
        return self._accept(places, torch.cat(logits))

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """One more token for every row; returns rows that are over."""
        self.close_up()
        newest = torch.tensor([row.ids[-1] for row in self.rows], device=self.device)  # (rows,)
        self.steps += 1
        if self.decoder:
            logits = self.decoder.step(newest, self.state)
        else:
            logits, self.state = self.model(newest[:, None], self.state)
            logits = logits[:, -1]
        return self._accept(range(len(self.rows)), logits)

    def drop(self, row: Row) -> None:
        """Give a row up."""
        self.rows = [None if other is row else other for other in self.rows]

    @torch.inference_mode()
    def close_up(self) -> None:
        """Let go of rows that stay empty."""
        left = [place for place, row in enumerate(self.rows) if row is not None]
        if len(left) == len(self.rows):
            return
        index = torch.tensor(left, dtype=torch.long, device=self.device)
        self.rows = [self.rows[place] for place in left]
        penalised = any(row.penalised for row in self.rows)
        self.table = {name: value[index] for name, value in self.table.items()} if penalised else {}
        self.state = self.state.take(left) if left else None

    def _grow(self, more: int, like: State) -> None:
        if more <= 0:
            return
        had = len(self.rows)
        source = like.take([0] * more) if self.state is None else self.state.take([*range(had), *[0] * more])
        self.state = source
        self.rows = [*self.rows, *[None] * more]
        self.table = {name: torch.cat((x, x.new_zeros(more, x.shape[1]))) for name, x in self.table.items()}

    def _count(self, place: int, row: Row) -> None:
        """Begin to count what a row writes; its prompt counts as seen."""
        if not self.table:
            shape = (len(self.rows), self.words.size)
            self.table = {
                "counts": torch.zeros(shape, device=self.device),
                "seen": torch.zeros(shape, dtype=torch.bool, device=self.device),
            }
        self.table["counts"][place] = 0
        self.table["seen"][place] = False
        self.table["seen"][place, torch.tensor(row.job.ids, device=self.device)] = True

    def _accept(self, places: Sequence[int], logits: Tensor) -> list[Row]:
        """Choose the next token of these rows from logits (places, V)."""
        rows = [self.rows[place] for place in places]
        index = None if len(rows) == len(self.rows) else torch.tensor(list(places), device=self.device)
        chosen, values = self._choose(rows, index, logits)
        counted = [n for n, row in enumerate(rows) if row.penalised]
        if counted:
            for n in counted:
                if (decay := rows[n].job.sampling.decay) != 1.0:
                    times = self.table["counts"][places[n]]
                    self.table["counts"][places[n]] = torch.maximum(times * decay, times.clamp(max=FAINTEST))
            spots = torch.tensor([places[n] for n in counted], device=self.device), chosen[counted]
            self.table["counts"][spots] += 1
            self.table["seen"][spots] = True
        numbers, values, over = chosen.tolist(), values.tolist(), []
        for n, (place, row) in enumerate(zip(places, rows, strict=True)):
            if row.error is None:
                if row.job.top is not None:
                    row.told.append(self._alternatives(logits[n], numbers[n], row.job.top))
                row.add(numbers[n], values[n])
            if row.finish is not None:
                over.append(row)
                if self.kept is not None and row.error is None:  # the last id was not read any more
                    self.kept.add([*row.job.ids, *row.ids[:-1]], self.state.take([place]))
                self.rows[place] = None
        return over

    def _choose(self, rows: list[Row], index: Tensor | None, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Next ids (rows,) and their log-probabilities: rows of equal settings are sampled together.

        `index`: their places, None for all.
        """
        limited = self._limited(rows, logits)
        groups: dict[str, list[int]] = {}
        for n, row in enumerate(rows):
            groups.setdefault(row.rules, []).append(n)
        chosen, values = [], []
        for members in groups.values():
            first, whole = rows[members[0]], len(members) == len(rows)
            part = None if whole else torch.tensor(members, device=self.device)
            here = part if index is None else index if whole else index[part]
            counts = seen = draws = None
            if first.penalised:
                counts, seen = (
                    self.table[name] if here is None else self.table[name][here] for name in ("counts", "seen")
                )
            if first.job.sampling.temperature > 0:
                draws = torch.tensor([rows[n].uniform() for n in members], dtype=torch.float64)
            given = (limited, logits) if whole else (limited[part], logits[part])
            found = choose(Asked(*given, self.forbidden, draws, counts, seen), first.job.sampling)
            chosen.append(found[0]), values.append(found[1])
        if len(groups) == 1:
            return chosen[0], values[0]
        back = torch.tensor([n for members in groups.values() for n in members], device=self.device).argsort()
        return torch.cat(chosen)[back], torch.cat(values)[back]

    def _limited(self, rows: list[Row], logits: Tensor) -> Tensor:
        """Logits with -inf at all that a row's choices rule out; a row to which nothing is left fails."""
        for n, row in enumerate(rows):
            try:
                allowed = row.allowed()
            except ConfigError as error:
                row.fail(error)
                continue
            if allowed is None:
                continue
            here = torch.as_tensor(allowed, device=self.device)
            kept = logits[n, here]
            logits = logits.index_fill(0, torch.tensor([n], device=self.device), -torch.inf)
            logits[n, here] = kept
        return logits

    def _alternatives(self, logits: Tensor, number: int, top: int) -> tuple[float, list[tuple[int, float]]]:
        """Plain log-probability of an id, and the `top` likeliest ids that stand for something with theirs."""
        values = logits.log_softmax(-1)
        likely = values if self.forbidden is None else values.index_fill(-1, self.forbidden, -torch.inf)
        found = likely.topk(min(top, int(np.count_nonzero(self.words.owned))))
        return values[number].item(), list(zip(found.indices.tolist(), found.values.tolist(), strict=True))
