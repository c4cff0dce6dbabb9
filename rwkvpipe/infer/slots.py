"""The rows that are being written: what each has chosen so far, and when its text is over."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.base.errors import ConfigError, WeightsError
from rwkvpipe.infer.decode import decoder
from rwkvpipe.infer.sampling import sample, stream
from rwkvpipe.model.layers import State
from rwkvpipe.tokenizer.load import Tokenizer

log = logging.getLogger("rwkvpipe")

EVERY = 10.0  # seconds between lines on progress


def logprob(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (...) of ids (...) under logits (..., V)."""
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    `ids` holds everything it chose, that which ended it included; `text` goes up to what ended it. `logprobs` are
    those of softmax(logits / temperature), before penalties and cuts (at temperature 0, of softmax(logits)).
    `finish` is `stop` (a stop text, or the id that ends documents) or `length`.
    """

    prompt: int
    sample: int
    ids: list[int]
    text: str
    logprobs: list[float]
    finish: str


@dataclass(frozen=True)
class Job:
    """One sample of one prompt, to be started from row `row` of what a group of prompts left behind."""

    prompt: int
    sample: int
    ids: list[int]
    logits: Tensor
    state: State
    row: int


class Progress:
    """A line now and then on how far the work is."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done, self.tokens = what, total, 0, 0
        self.began = self.told = self.last = time.monotonic()

    def add(self, done: int, tokens: int = 0) -> None:
        """Count what was just done. Things that are done together come in bursts: a line tells of those before."""
        now = time.monotonic()
        if not self.done:
            self.told = now
        elif now - self.told >= EVERY:
            self.told, spent = now, max(self.last - self.began, 1e-9)
            left = max(0.0, spent / self.done * (self.total - self.done) - (now - self.last))
            rate = f"{self.tokens / spent:.0f} tokens/s" if self.tokens else f"{self.done / spent:.1f}/s"
            log.info("%s: %d of %d, %s, %.0f s left", self.what, self.done, self.total, rate, left)
        self.done, self.tokens, self.last = self.done + done, self.tokens + tokens, now


class Slots:
    """The rows that are being written: state, what was chosen so far, and whose they are."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, sampling: SamplingConfig, rows: int):
        self.model, self.tokenizer, self.sampling, self.rows = model, tokenizer, sampling, rows
        self.device = device = next(model.parameters()).device
        length, V = sampling.max_tokens, model.config.vocab_size
        self.jobs: list[Job | None] = [None] * rows
        self.state: State | None = None
        self.decoder = decoder(model)
        self.done: list[Completion] = []
        self.table = {
            "ids": torch.zeros(rows, length, dtype=torch.long, device=device),
            "logprobs": torch.zeros(rows, length, device=device),
            "length": torch.zeros(rows, dtype=torch.long, device=device),
        }
        if sampling.temperature > 0:
            self.table["uniform"] = torch.zeros(rows, length, dtype=torch.float64, device=device)
        if sampling.repetition_penalty != 1.0 or sampling.presence or sampling.frequency:
            self.table["counts"] = torch.zeros(rows, V, dtype=torch.int32, device=device)
            self.table["seen"] = torch.zeros(rows, V, dtype=torch.bool, device=device)
        self.stops = [text.encode() for text in sampling.stop]
        if b"" in self.stops:
            raise ConfigError("sampling.stop: an empty text ends every completion at once; remove it")
        owned = torch.tensor([tokenizer.owns(i) or i == tokenizer.eos for i in range(V)], device=device)
        self.forbidden = None if owned.all() else ~owned
        self.endings = torch.tensor([self._may_end(i) for i in range(V)], device=device)

    def _may_end(self, number: int) -> bool:
        """Whether a text can be over with this id: only then is it worth a look."""
        tokenizer = self.tokenizer
        if number == tokenizer.eos:
            return True
        if not self.stops or not tokenizer.owns(number):
            return False
        data = tokenizer.decode_bytes([number])
        return any(stop[-1] in data for stop in self.stops)

    @torch.inference_mode()
    def enter(self, slots: list[int], jobs: list[Job]) -> Tensor:
        """Put jobs into slots and give the logits (len(slots), V) for their first tokens."""
        if self.state is None:
            self.state = jobs[0].state.take([0] * self.rows)
        logits, place = [], 0
        while place < len(jobs):  # those of one group of prompts are moved together
            state = jobs[place].state
            end = next((n for n in range(place, len(jobs)) if jobs[n].state is not state), len(jobs))
            rows = [job.row for job in jobs[place:end]]
            self.state.put(slots[place:end], state.take(rows))
            logits.append(jobs[place].logits[torch.tensor(rows, device=self.device)])
            place = end
        self.table["length"][slots] = 0
        for slot, job in zip(slots, jobs, strict=True):
            self.jobs[slot] = job
            if "uniform" in self.table:
                draws = stream(self.sampling.seed, job.prompt, job.sample)
                row = torch.rand(self.sampling.max_tokens, generator=draws, dtype=torch.float64)
                self.table["uniform"][slot] = row.to(self.device)
            if "counts" in self.table:
                self.table["counts"][slot] = 0
                self.table["seen"][slot] = False
                self.table["seen"][slot, torch.tensor(job.ids, device=self.device)] = True
        return torch.cat(logits)

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Logits (rows, V) after the newest token of every slot."""
        newest = self.table["ids"].gather(1, self.table["length"][:, None] - 1)  # (rows, 1)
        if self.decoder:
            return self.decoder.step(newest[:, 0], self.state)
        logits, self.state = self.model(newest, self.state)
        return logits[:, -1]

    @torch.inference_mode()
    def accept(self, slots: Iterable[int], logits: Tensor) -> list[int]:
        """Choose the next token of these slots; returns those that are finished."""
        table, index = self.table, torch.tensor(list(slots), device=self.device)
        place = table["length"][index]
        choice = logits if self.forbidden is None else logits.masked_fill(self.forbidden, -torch.inf)
        counts, seen = (table[name][index] if name in table else None for name in ("counts", "seen"))
        uniform = table["uniform"][index, place] if "uniform" in table else []
        chosen = sample(choice, self.sampling, counts, uniform, seen=seen)
        table["ids"][index, place] = chosen
        table["logprobs"][index, place] = logprob(logits / (self.sampling.temperature or 1.0), chosen).float()
        table["length"][index] = place + 1
        if "counts" in table:
            table["counts"][index, chosen] += 1
            table["seen"][index, chosen] = True
        perhaps = self.endings[chosen] | (place + 1 >= self.sampling.max_tokens)
        return [slot for slot in index[perhaps].tolist() if self._close(slot)]

    def _close(self, slot: int) -> bool:
        """Whether the text in a slot is over; then it is one of those done."""
        count, tokenizer, job = int(self.table["length"][slot]), self.tokenizer, self.jobs[slot]
        ids, cut, finish = self.table["ids"][slot, :count].tolist(), None, "stop"
        if ids[-1] != tokenizer.eos:
            # a token has a byte at least: a stop text that has just come lies in so many of them
            tail = tokenizer.decode_bytes(ids[-max(map(len, self.stops), default=1) :])
            if not any(stop in tail for stop in self.stops):
                if count < self.sampling.max_tokens:
                    return False
                finish = "length"
        data = tokenizer.decode_bytes(ids)
        if finish == "stop":
            cut = min((data.find(stop) for stop in self.stops if stop in data), default=None)
        text = data[:cut].decode("utf-8", "replace")
        logprobs = self.table["logprobs"][slot, :count].tolist()
        if not all(map(math.isfinite, logprobs)):
            raise WeightsError("the model's logits are no numbers; its weights are damaged, or training has diverged")
        self.done.append(Completion(job.prompt, job.sample, ids, text, logprobs, finish))
        self.jobs[slot] = None
        return True

    def written(self, slot: int) -> bytes:
        """What is written in a slot and no stop text can take back any more."""
        held = max(map(len, self.stops), default=1) - 1
        data = self.tokenizer.decode_bytes(self.table["ids"][slot, : int(self.table["length"][slot])].tolist())
        return data[: max(0, len(data) - held)]

    def finished(self, progress: Progress) -> Iterator[Completion]:
        """Hand out what was finished since."""
        while self.done:
            completion = self.done.pop(0)
            progress.add(1, len(completion.ids))
            yield completion

    @torch.inference_mode()
    def leave(self, slots: list[int]) -> None:
        """Close up the rows of slots that stay empty."""
        kept = [slot for slot in range(self.rows) if slot not in set(slots)]
        index = torch.tensor(kept, dtype=torch.long, device=self.device)
        self.table = {name: value[index] for name, value in self.table.items()}
        self.jobs = [self.jobs[slot] for slot in kept]
        self.state, self.rows = self.state.take(kept), len(kept)
