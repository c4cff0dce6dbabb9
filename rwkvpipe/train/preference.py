"""DPO (Rafailov et al. 2023, arXiv 2305.18290): of two answers the one that people prefer becomes likelier."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpipe.base.config import DpoConfig, TrainConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import read_jsonl
from rwkvpipe.data.pair import Ids, encoded, pair
from rwkvpipe.tokenizer.load import Tokenizer
from rwkvpipe.train.likelihood import likelihood, scattered
from rwkvpipe.train.loss import device_of
from rwkvpipe.train.precision import arithmetic
from rwkvpipe.train.question import drawn
from rwkvpipe.train.stage import Stage
from rwkvpipe.weights.lora import row_dropout


@dataclass(frozen=True)
class Pairs:
    """Pairs of a step: ids (2 B, T) long, chosen and rejected in turn; mask (2 B, T) of 1 over the answers' ids."""

    ids: Tensor
    mask: Tensor

    def rows(self, part: slice, device: torch.device) -> "Pairs":
        """Some of the rows, cut to the longest of them."""
        mask = self.mask[part]
        width = int(mask.any(0).nonzero().max()) + 1
        return Pairs(self.ids[part, :width].to(device), mask[:, :width].to(device))


def read_pairs(path: Path, tokenizer: Tokenizer, longest: int) -> list[tuple[Ids, Ids]]:
    """Pairs as ids, cut at `longest` tokens. Raises DataError naming the line of one that does not do."""
    found = []
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}:{number}"
        try:
            both = encoded(pair(row, {}, where), tokenizer)
        except DataError as error:
            raise DataError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
        cut = tuple((ids[:longest], mask[:longest]) for ids, mask in both)
        if not all(any(mask[1:]) for _, mask in cut):
            raise DataError(
                f"{where}: nothing of an answer is left within {longest} tokens, or no token stands before it;"
                " raise train.ctx_len, or mend the row"
            )
        if cut[0] == cut[1]:
            raise DataError(f"{where}: the answers are equal within {longest} tokens; raise train.ctx_len")
        found.append(cut)
    if not found:
        raise DataError(f"{path}: no pairs in it")
    return found


def pair_batches(pairs: list[tuple[Ids, Ids]], config: TrainConfig, seed: int, first_step: int) -> Iterator[Pairs]:
    """The pairs of each step from `first_step` on, without end."""
    step = first_step
    while True:
        chosen = [text for number in drawn(len(pairs), config, step, seed) for text in pairs[number]]
        width = max(len(ids) for ids, _ in chosen)
        ids, mask = torch.zeros(len(chosen), width, dtype=torch.long), torch.zeros(len(chosen), width)
        for row, (tokens, marks) in enumerate(chosen):
            ids[row, : len(tokens)], mask[row, : len(marks)] = torch.tensor(tokens), torch.tensor(marks).float()
        yield Pairs(ids, mask)
        step += 1


def answer_logprobs(model: nn.Module, pairs: Pairs, precision: str) -> Tensor:
    """Log-probabilities (R, T - 1) of the answers' tokens, 0 elsewhere; only their logits are made, some at a time."""
    chosen = pairs.mask[:, 1:] != 0
    with arithmetic(precision, pairs.ids.device):
        features, _ = model.features(pairs.ids[:, :-1])  # (R, T - 1, D)
    found, _ = likelihood(model, features[chosen], pairs.ids[:, 1:][chosen], precision=precision)
    return scattered(found, chosen)


def preference_loss(new: Tensor, old: Tensor, lengths: Tensor, config: DpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (B,) of each pair from sums of log-probabilities (2 B,), chosen and rejected in turn, and what it tells.

    With h = (new - old of the chosen) - (new - old of the rejected): -log s(beta h), s the logistic function, of which
    `smoothing` is taken the other way round; ipo: (h - 1 / (2 beta))^2 with means instead of sums (arXiv 2310.12036).
    """
    gain = new - old
    if config.loss == "ipo":
        gain = gain / lengths
    chosen, rejected = gain[0::2], gain[1::2]
    apart = chosen - rejected
    if config.loss == "ipo":
        loss = (apart - 1 / (2 * config.beta)).square()
    else:
        loss = -F.logsigmoid(config.beta * apart) * (1 - config.smoothing)
        loss = loss - F.logsigmoid(-config.beta * apart) * config.smoothing
    told = {"chosen": config.beta * chosen, "rejected": config.beta * rejected, "margin": config.beta * apart}
    return loss, {name: value.detach() for name, value in told.items()} | {"accuracy": (apart > 0).float().detach()}


class Preferences:
    """The losses of DPO and their numbers. What it is compared with is the model as it began."""

    def __init__(self, stage: Stage, config: DpoConfig, micro_batch: int):
        self.stage, self.config, self.rank, self.micro_batch = stage, config, stage.rank, max(1, micro_batch // 2)
        self.precision = stage.settings.train.precision
        self.parts: list[dict[str, float]] = []

    def losses(self, model: nn.Module, batch: Pairs) -> Iterator[Tensor]:
        """The mean over the pairs of the step, some of them at a time."""
        pairs = len(batch.ids) // 2
        for part in self.rank.mine(pairs, self.micro_batch):
            idle = part.start == part.stop  # others still have some: a pass that counts nothing
            rows = batch.rows(slice(0, 2) if idle else slice(2 * part.start, 2 * part.stop), device_of(model))
            with torch.no_grad(), self.stage.begun() as start:
                old = answer_logprobs(start, rows, self.precision).sum(1)
            with row_dropout(model, 2 * part.start):
                new = answer_logprobs(model, rows, self.precision).sum(1)
                loss, told = preference_loss(new, old, rows.mask[:, 1:].sum(1), self.config)
                share = 0 if idle else 1 / pairs
                self.parts.append({name: float(value.sum()) * share for name, value in told.items()})
                yield loss.sum() * share

    def measures(self) -> dict[str, float]:
        """Means over the pairs of the step just made: rewards of both answers, their margin, how often it is right."""
        names = ("chosen", "rejected", "margin", "accuracy")
        sums = self.rank.total(*(sum(part[name] for part in self.parts) for name in names))
        self.parts.clear()
        return {f"reward_{name}": value for name, value in zip(names, sums, strict=True)}


def tokens(batch: Pairs) -> int:
    """Tokens of a step up to the end of each answer."""
    places = torch.arange(1, batch.mask.shape[1] + 1)
    return int((places * (batch.mask != 0)).amax(1).sum())


def targets(batch: Pairs) -> int:
    """Those of them that are an answer's."""
    return int((batch.mask != 0).sum())
