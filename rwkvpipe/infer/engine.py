"""Batched inference: a row of state is a slot, and a slot whose text is finished takes the next prompt."""

import codecs
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from torch import nn

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.infer.memory import check_rows, spare_bytes
from rwkvpipe.infer.packed import keep
from rwkvpipe.infer.prefix import KEPT, States
from rwkvpipe.infer.progress import Progress
from rwkvpipe.infer.reading import CHUNK, LOGITS, Reader
from rwkvpipe.infer.row import Completion, Job, Row
from rwkvpipe.infer.slots import Slots
from rwkvpipe.infer.words import Words, words
from rwkvpipe.kernel import choice
from rwkvpipe.tokenizer.load import Tokenizer, load_tokenizer

__all__ = ["Completion", "Engine", "load_vocabulary"]

log = logging.getLogger("rwkvpipe")


def load_vocabulary(path: str | Path, rows: int, model: str | Path) -> Tokenizer:
    """The tokenizer at `path` for the model at `model`, whose embedding has `rows` rows.

    Raises ConfigError when it has more ids than that; fewer are said in the log, they may be padding.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.size > rows:
        raise ConfigError(
            f"--tokenizer: {path} has {tokenizer.size} ids, the model {model} only {rows};"
            " give the tokenizer it was trained with"
        )
    if tokenizer.size < rows:
        log.info("%s has %d ids, %s only %d: the others are never chosen", model, rows, path, tokenizer.size)
    return tokenizer


class Engine:
    """Writes on after prompts and weighs texts, `rows` at a time; what comes out does not depend on `rows`
    but for the last digits of logits (docs/inference.md).

    The model may have adapters beside its matrices, and initial states. `kind` (see `packed`) is what its matrices are
    kept in from then on, whatever is done with it; None leaves them where they are trained. Raises ConfigError when the
    tokenizer has ids that the model lacks, or for more rows than memory holds. `special` words of prompts are an id
    each (a chat template may name some).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        rows: int,
        *,
        kind: str | None = None,
        special: Mapping[str, int] | None = None,
    ):
        size = model.config.vocab_size
        if rows < 1:
            raise ConfigError(f"rows: {rows} at a time; 1 is the least")
        if tokenizer.size > size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.size} ids, the model {size}; give the tokenizer it was trained with"
            )
        if kind is not None:
            keep(model, kind)
        choice.begin(model)
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.special = {word: number for word, number in (special or {}).items() if 0 <= number < size}
        self.reader = Reader(model, rows)
        check_rows(model.config, rows, self.reader.device, chunk=CHUNK, logits=LOGITS)

    @property
    def words(self) -> Words:
        """What the ids write."""
        return words(self.tokenizer, self.model.config.vocab_size)

    def begin(self, text: str | Sequence[int]) -> list[int]:
        """Ids of a text (or they themselves) to go on from; without any, the id that ends documents stands before.

        Raises DataError for ids that the model lacks.
        """
        ids = self._ids(text) if isinstance(text, str) else list(text)
        size = self.model.config.vocab_size
        if odd := [number for number in ids if not 0 <= number < size]:
            raise DataError(f"a prompt: there is no id {odd[0]}; the model has 0 to {size - 1}")
        if not ids and self.tokenizer.eos is None:
            raise DataError("an empty prompt: this tokenizer has no id that begins a document; give it some text")
        return ids or [self.tokenizer.eos]

    def _ids(self, text: str) -> list[int]:
        parts = re.split("|".join(f"({re.escape(word)})" for word in self.special), text) if self.special else [text]
        ids = []
        for part in filter(None, parts):
            ids += [self.special[part]] if part in self.special else self.tokenizer.encode(part)
        return ids

    def check(self, sampling: SamplingConfig) -> None:
        """Raise ConfigError, naming the key, for settings by which no text of this vocabulary can be drawn."""
        Row(Job(0, 0, [], sampling, None, None, 0), self.words)

    def slots(self, rows: int, kept: States | None = None) -> Slots:
        """Room for `rows` texts to be written side by side."""
        return Slots(self.model, self.words, rows, kept)

    def states(self) -> States:
        """Room for states of texts that others may go on from, as far as the rows leave memory for it."""
        spare = spare_bytes(self.model.config, self.rows, self.reader.device, chunk=CHUNK, logits=LOGITS)
        return States() if spare is None else States(min(KEPT, spare))

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingConfig,
        samples: int = 1,
        *,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[Completion]:
        """Complete each prompt, a text or ids, `samples` times; completions come as they finish.

        A completion depends on the weights, its prompt and `sampling`, and on the prompt's number (its place, or
        the one in `numbers`) and the sample's, of which its stream of random numbers is made; on nothing else.
        """
        ids = [self.begin(prompt) for prompt in prompts]
        jobs = self._jobs(ids, sampling, samples, range(len(ids)) if numbers is None else numbers)
        progress = Progress("writing", len(ids) * samples)
        slots = self.slots(self.rows)
        while True:
            done = []
            while slots.free and (fresh := list(islice(jobs, slots.free))):
                done += slots.enter(fresh)
            if not done and slots.busy:
                done = slots.step()
            for row in done:
                progress.add(1, len(row.ids))
                yield row.completion()
            if not done and not slots.busy:
                return

    def _jobs(
        self, ids: list[list[int]], sampling: SamplingConfig, samples: int, numbers: Sequence[int]
    ) -> Iterator[Job]:
        """Prompts as they are wanted, read a group at a time, equal ones once, each once for all its samples."""
        places: dict[tuple[int, ...], list[int]] = {}
        for n, row in enumerate(ids):
            places.setdefault(tuple(row), []).append(n)
        texts = list(map(list, places))
        for group, logits, state in self.reader.shared(texts):
            for row, text in enumerate(group):
                for n in places[tuple(texts[text])]:
                    for sample in range(samples):
                        yield Job(numbers[n], sample, ids[n], sampling, logits, state, row)

    def stream(
        self, prompt: str, sampling: SamplingConfig, number: int = 0, kept: States | None = None
    ) -> Iterator[str]:
        """Complete one prompt, giving the text piece by piece; together it is what `generate` gives.

        States in `kept` save reading what was read before; the new ones are put there.
        """
        slots, ids = self.slots(1, kept), self.begin(prompt)
        known, state = (0, None) if kept is None else kept.find(ids)
        logits, state = self.reader.read([ids[known:]], state)
        if kept is not None:
            kept.add(ids, state)
        decoder, sent = codecs.getincrementaldecoder("utf-8")("replace"), 0
        done = slots.enter([Job(number, 0, ids, sampling, logits, state, 0)])
        while not done:
            data = slots.rows[0].written()
            if piece := decoder.decode(data[sent:]):
                yield piece
            sent, done = len(data), slots.step()
        done[0].completion()  # raises what went wrong
        yield decoder.decode(done[0].written()[sent:], final=True)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """log p(continuation | context) of each (context, continuation): the sum over the continuation's tokens.

        The two are encoded apart. An empty context is the begin of a document. A context is read once however many
        continuations it has, and what contexts begin with alike once for all of them.
        """
        contexts: dict[tuple[int, ...], list[int]] = {}
        ends = [list(self.tokenizer.encode(continuation)) for _, continuation in pairs]
        for number, (context, _) in enumerate(pairs):
            contexts.setdefault(tuple(self.begin(context)), []).append(number)
        found, keys, progress = [0.0] * len(pairs), list(contexts), Progress("weighing", len(pairs))
        for group, logits, state in self.reader.shared(list(map(list, keys))):
            asked = [(row, number) for row, n in enumerate(group) for number in contexts[keys[n]] if ends[number]]
            for part in self.reader.groups([len(ends[number]) for _, number in asked]):
                rows = [asked[n] for n in part]
                values = self.reader.continued(logits, state, [r for r, _ in rows], [ends[n] for _, n in rows])
                for (_, number), value in zip(rows, values, strict=True):
                    found[number] = value
                progress.add(len(rows), sum(len(keys[group[row]]) + len(ends[number]) for row, number in rows))
        return found

    def rolling(self, text: str | Sequence[int], ctx_len: int) -> tuple[float, int]:
        """-log p of a whole text (or its ids), and how many tokens that covers.

        It is read in windows of ctx_len tokens, the state carried along, so every token sees all before it. The
        first is predicted after the id that ends documents; a tokenizer without one leaves the first out.
        """
        windows = self.windows([self.tokenizer.encode(text) if isinstance(text, str) else text], ctx_len)[0]
        return sum(nats for nats, _ in windows), sum(len(ids) for _, ids in windows)

    def windows(self, texts: Sequence[Sequence[int]], ctx_len: int) -> list[list[tuple[float, list[int]]]]:
        """As `rolling` for many texts, given as ids: for each window -log p, and the ids that it covers."""
        eos = self.tokenizer.eos
        rows = [[*([] if eos is None else [eos]), *ids] for ids in texts]
        found: list[list[tuple[float, list[int]]]] = [[] for _ in texts]
        progress = Progress("reading", sum(max(len(row) - 1, 0) for row in rows))
        for group in self.reader.groups([len(row) for row in rows]):
            if not (group := [n for n in group if len(rows[n]) > 1]):
                continue
            for number, sums in enumerate(self.reader.sums([rows[n] for n in group], None, ctx_len)):
                before = 1 + number * ctx_len
                for n, value in zip(group, sums.tolist(), strict=True):
                    if covered := rows[n][before : before + ctx_len]:
                        found[n].append((-value, covered))
                        progress.add(len(covered), len(covered))
        return found
