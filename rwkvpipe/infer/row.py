"""One text on its way: what was chosen, what it writes, and when it is over."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.base.errors import ConfigError, WeightsError
from rwkvpipe.infer.grammar import Grammar
from rwkvpipe.infer.lot import Lot
from rwkvpipe.infer.words import Words, choices
from rwkvpipe.model.layers import State
from rwkvpipe.tokenizer.byte import utf8

DRAWN = 64  # random numbers drawn at once
RULES = {
    "seed",
    "max_tokens",
    "stop",
    "stop_ids",
    "choices",
    "regex",
    "json_schema",
}  # what does not decide the chances of the next id


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    `ids` holds everything it chose, that which ended it included; `text` goes up to what ended it. `logprobs` are
    those of softmax(logits / temperature), before penalties and cuts (at temperature 0, of softmax(logits)).
    `finish` is `stop` (a stop text or id, the id that ends documents, a choice that is whole) or `length`.
    """

    prompt: int
    sample: int
    ids: list[int]
    text: str
    logprobs: list[float]
    finish: str


@dataclass(frozen=True, eq=False)
class Job:
    """One sample of one prompt, to be started from row `row` of what a group of prompts left behind."""

    prompt: int
    sample: int
    ids: list[int]
    sampling: SamplingConfig
    logits: Tensor = field(repr=False)
    state: State = field(repr=False)
    row: int
    top: int | None = None
    """How many alternatives to tell beside each token, with plain log-probabilities; None: do not."""


class Row:
    """A job that is being written."""

    def __init__(self, job: Job, words: Words):
        self.job, self.words, sampling = job, words, job.sampling
        self.rules = sampling.model_dump_json(exclude=RULES)  # rows with equal ones are sampled together
        self.penalised = bool(sampling.repetition_penalty != 1.0 or sampling.presence or sampling.frequency)
        self.stops = [utf8(text) for text in sampling.stop]
        if b"" in self.stops:
            raise ConfigError("sampling.stop: an empty text ends every completion at once; remove it")
        self.choices = choices(sampling.choices, words) if sampling.choices else None
        self.node = self.choices.root if self.choices else None
        ruled = sampling.regex is not None or sampling.json_schema is not None
        self.grammar = Grammar(sampling, words) if ruled else None
        for key in ("bias", "ban", "spare", "stop_ids"):
            if odd := [number for number in getattr(sampling, key) if not 0 <= number < words.size]:
                raise ConfigError(f"sampling.{key}: there is no id {odd[0]}; the model has 0 to {words.size - 1}")
        banned = list(set(sampling.ban))
        if banned and words.owned[banned].sum() == words.owned.sum():
            raise ConfigError("sampling.ban: leaves no id of the vocabulary; shorten it")
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.told: list[tuple[float, list[tuple[int, float]]]] = []  # plain log-probability, and the likeliest ids
        self.data = bytearray()
        self.finish: str | None = None
        self.error: ConfigError | None = None
        self._lot = Lot(sampling.seed, job.prompt, job.sample)
        self._draws: list[float] = []

    def uniform(self) -> float:
        """The next number of its own stream."""
        if not self._draws:
            self._draws = self._lot.draw(DRAWN)[::-1]
        return self._draws.pop()

    def allowed(self) -> Sequence[int] | np.ndarray | None:
        """Ids that may come next, where the choice is limited. Raises ConfigError where nothing may."""
        if self.grammar is None and self.choices is None:
            return None
        found = self.node.ids if self.grammar is None else self.grammar.ids
        if not np.setdiff1d(found, self.job.sampling.ban).size:
            raise ConfigError("sampling: no token of the vocabulary goes on with what the text may be; change it")
        return found

    def add(self, number: int, logprob: float) -> bool:
        """Take the next id; whether the text is over with it. Raises WeightsError for logits that are no numbers."""
        if not math.isfinite(logprob):
            raise WeightsError("the model's logits are no numbers; its weights are damaged, or training has diverged")
        self.ids.append(number)
        self.logprobs.append(logprob)
        if number == self.words.eos or number in self.job.sampling.stop_ids:
            self.finish = "stop"
            return True
        self.data, before = self.words.grown(self.data, self.ids)
        if (place := self._stopped(before)) is not None:
            del self.data[place:]
            self.finish = "stop"
        elif self.grammar is not None:
            self._follow(number)
        elif self.choices is not None:
            self.node = self.node.after(self.data[before:])
            if self.choices.over(self.node):
                self.finish = "stop"
        if self.finish is None and len(self.ids) >= self.job.sampling.max_tokens:
            self.finish = "length"
        return self.finish is not None

    def _stopped(self, before: int) -> int | None:
        """Where the stop text begins that was whole first, byte by byte; of those whole at once the longest."""
        found = [(self.data.find(stop, max(0, before - len(stop) + 1)), len(stop)) for stop in self.stops]
        ends = [(place + length, place) for place, length in found if place >= 0]
        return min(ends)[1] if ends else None

    def _follow(self, number: int) -> None:
        """Go on in the grammar by one id."""
        try:
            self.grammar.take(number)
            if self.grammar.over:
                self.finish = "stop"
        except ConfigError as error:
            self.fail(error)

    def fail(self, error: ConfigError) -> None:
        """End a text whose own settings leave no way on; those beside it are none the worse for it."""
        self.error, self.finish = error, "error"

    def written(self) -> bytes:
        """What neither a stop text nor a character that becomes whole can take back any more."""
        if self.finish is not None:
            return bytes(self.data)
        data, held = self.words.settled(self.data), 0
        for stop in self.stops:
            most = min(len(stop) - 1, len(data))
            held = max(held, next((n for n in range(most, 0, -1) if data.endswith(stop[:n])), 0))
        return bytes(data[: len(data) - held])

    def completion(self) -> Completion:
        """The text that is over. Raises what ended it where that was its own settings."""
        if self.error is not None:
            raise self.error
        text = self.data.decode("utf-8", "replace")
        return Completion(self.job.prompt, self.job.sample, self.ids, text, self.logprobs, self.finish or "length")
