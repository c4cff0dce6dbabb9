"""Batched inference: a row of state is a slot, and a slot whose text is finished takes the next prompt."""

import codecs
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.infer.slots import Completion, Job, Progress, Slots, logprob
from rwkvpipe.model.layers import State
from rwkvpipe.tokenizer.load import Tokenizer, load_tokenizer

log = logging.getLogger("rwkvpipe")

CHUNK = 256  # tokens of a row read in one forward
SLACK = 32  # tokens of padding that cost less than another group
LOGITS = 1 << 25  # numbers of logits held at a time


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


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows padded on the right (B, T), and their lengths (B,)."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long, device=device)
    return ids.view(len(rows), width), torch.tensor(lengths, device=device)


class Engine:
    """Writes on after prompts and weighs texts, `rows` at a time; what comes out does not depend on `rows`.

    Raises ConfigError when the tokenizer has ids that the model lacks.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, rows: int):
        size = model.config.vocab_size
        if rows < 1:
            raise ConfigError(f"rows: {rows} at a time; 1 is the least")
        if tokenizer.size > size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.size} ids, the model {size}; give the tokenizer it was trained with"
            )
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.device = next(model.parameters()).device

    def _begin(self, text: str) -> list[int]:
        """Ids of a text to go on from; without any, the id that ends documents stands before it."""
        ids = self.tokenizer.encode(text)
        if not ids and self.tokenizer.eos is None:
            raise DataError("an empty prompt: this tokenizer has no id that begins a document; give it some text")
        return ids or [self.tokenizer.eos]

    def _groups(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Numbers of rows of about equal length, the shortest first, as many as go at a time."""
        group: list[int] = []
        for n in sorted(range(len(rows)), key=lambda n: len(rows[n])):
            # one long row must not make all others as long
            if group and (len(group) == self.rows or len(rows[n]) > 2 * len(rows[group[0]]) + SLACK):
                yield group
                group = []
            group.append(n)
        if group:
            yield group

    @torch.inference_mode()
    def _read(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, State]:
        """Logits (B, V) after the last token of each row, and the state there."""
        ids, lengths = _padded(rows, self.device)
        state, last = None, None
        for start in range(0, ids.shape[1], CHUNK):
            part = ids[:, start : start + CHUNK]
            here = (lengths - start).clamp(0, part.shape[1])
            features, state = self.model.features(part, state, here)
            ends = features.gather(1, (here - 1).clamp(min=0)[:, None, None].expand(-1, 1, features.shape[-1]))[:, 0]
            last = ends if last is None else torch.where(here[:, None] > 0, ends, last)  # (B, D)
        return self.model.logits(last), state

    @torch.inference_mode()
    def _sums(self, rows: Sequence[Sequence[int]], state: State | None, window: int) -> Iterator[Tensor]:
        """Log-probability of each row's tokens but the first, read from `state`: (B,) fp64 a window of targets."""
        ids, lengths = _padded(rows, self.device)
        width = ids.shape[1] - 1
        for start in range(0, width, window):
            end, total = min(start + window, width), torch.zeros(len(ids), dtype=torch.float64, device=self.device)
            for a in range(start, end, CHUNK):
                b = min(a + CHUNK, end)
                here = (lengths - 1 - a).clamp(0, b - a)
                features, state = self.model.features(ids[:, a:b], state, here)
                step = max(1, LOGITS // (len(ids) * self.model.config.vocab_size))
                for c in range(0, b - a, step):
                    cut = slice(c, min(c + step, b - a))
                    found = logprob(self.model.logits(features[:, cut]), ids[:, a + 1 : b + 1][:, cut])  # (B, step)
                    places = torch.arange(cut.start, cut.stop, device=self.device)
                    total += found.double().masked_fill(places >= here[:, None], 0.0).sum(1)
            yield total

    def generate(
        self,
        prompts: Sequence[str],
        sampling: SamplingConfig,
        samples: int = 1,
        *,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[Completion]:
        """Complete each prompt `samples` times; completions come as they finish.

        A completion depends on the weights, its prompt and `sampling`, and on the prompt's number (its place, or
        the one in `numbers`) and the sample's, of which its stream of random numbers is made; on nothing else.
        """
        ids = [self._begin(prompt) for prompt in prompts]
        jobs = self._jobs(ids, samples, range(len(ids)) if numbers is None else numbers)
        progress = Progress("writing", len(ids) * samples)
        slots = Slots(self.model, self.tokenizer, sampling, min(self.rows, len(ids) * samples))
        free = list(range(slots.rows))
        while slots.rows:
            while free and (fresh := list(islice(jobs, len(free)))):
                taken, free = free[: len(fresh)], free[len(fresh) :]
                free += slots.accept(taken, slots.enter(taken, fresh))
                yield from slots.finished(progress)
            if free:  # nothing waits any more
                slots.leave(free)
                free = []
            if slots.rows:
                free = slots.accept(range(slots.rows), slots.step())
                yield from slots.finished(progress)

    def stream(self, prompt: str, sampling: SamplingConfig, number: int = 0) -> Iterator[str]:
        """Complete one prompt, giving the text piece by piece; together it is what `generate` gives."""
        slots = Slots(self.model, self.tokenizer, sampling, 1)
        job = next(self._jobs([self._begin(prompt)], 1, [number]))
        told, decoder = "", codecs.getincrementaldecoder("utf-8")("replace")
        done, sent = slots.accept([0], slots.enter([0], [job])), 0
        while not done:
            data = slots.written(0)
            piece, sent = decoder.decode(data[sent:]), max(sent, len(data))
            if piece:
                told += piece
                yield piece
            done = slots.accept([0], slots.step())
        yield slots.done[0].text[len(told) :]

    def _jobs(self, ids: list[list[int]], samples: int, numbers: Sequence[int]) -> Iterator[Job]:
        """Prompts as they are wanted, read a group at a time, each once for all its samples."""
        for group in self._groups(ids):
            logits, state = self._read([ids[n] for n in group])
            for row, n in enumerate(group):
                for number in range(samples):
                    yield Job(numbers[n], number, ids[n], logits, state, row)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """log p(continuation | context) of each (context, continuation): the sum over the continuation's tokens.

        The two are encoded apart. An empty context is the begin of a document. A context is read once however many
        continuations it has.
        """
        contexts: dict[tuple[int, ...], list[int]] = {}
        ends = [self.tokenizer.encode(continuation) for _, continuation in pairs]
        for number, (context, _) in enumerate(pairs):
            contexts.setdefault(tuple(self._begin(context)), []).append(number)
        found, keys, progress = [0.0] * len(pairs), list(contexts), Progress("weighing", len(pairs))
        for group in self._groups(keys):
            logits, state = self._read([keys[n] for n in group])
            asked = [(row, number) for row, n in enumerate(group) for number in contexts[keys[n]] if ends[number]]
            for part in self._groups([ends[number] for _, number in asked]):
                rows = [asked[n] for n in part]
                values = self._continued(logits, state, [row for row, _ in rows], [ends[number] for _, number in rows])
                for (_, number), value in zip(rows, values, strict=True):
                    found[number] = value
                progress.add(len(rows), sum(len(keys[group[row]]) + len(ends[number]) for row, number in rows))
        return found

    @torch.inference_mode()
    def _continued(self, logits: Tensor, state: State, rows: list[int], ends: list[list[int]]) -> list[float]:
        """Log-probabilities of continuations, each after row `rows[i]` of what was read."""
        index = torch.tensor(rows, device=self.device)
        first = torch.tensor([end[0] for end in ends], device=self.device)
        total = logprob(logits[index], first).double()
        width = max(len(end) for end in ends)
        if width > 1:
            total = total + sum(self._sums(ends, state.take(rows), width))
        return total.tolist()

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
        for group in self._groups(rows):
            if not (group := [n for n in group if len(rows[n]) > 1]):
                continue
            for number, sums in enumerate(self._sums([rows[n] for n in group], None, ctx_len)):
                before = 1 + number * ctx_len
                for n, value in zip(group, sums.tolist(), strict=True):
                    if covered := rows[n][before : before + ctx_len]:
                        found[n].append((-value, covered))
                        progress.add(len(covered), len(covered))
        return found
