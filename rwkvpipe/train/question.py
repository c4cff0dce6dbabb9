"""What GRPO asks: rows of the question file as prompts, those that are too long cut."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import read_jsonl
from rwkvpipe.tokenizer.load import Tokenizer
from rwkvpipe.train.loop import step_seed

log = logging.getLogger("rwkvpipe")

Check = Callable[[dict], None]
"""Raises DataError for a row that cannot be graded."""


@dataclass(frozen=True)
class Question:
    """A row of the question file, its prompt, and the ids that the model reads of it."""

    row: dict
    prompt: str
    ids: list[int]
    line: int
    """Where it stands in the file, from 1 on."""
    cut: int = 0
    """How many ids of the prompt are left out."""


@dataclass(frozen=True)
class Room:
    """The longest prompt, and what becomes of a longer one: its `end` or `start` is kept, or `drop`, or `refuse`."""

    longest: int
    long: str = "refuse"


def read_questions(
    path: Path, prompt_of: Callable[[dict], str], tokenizer: Tokenizer, room: Room, checks: Sequence[Check] = ()
) -> list[Question]:
    """Questions as prompts that fit, each judged by `checks`; how many were too long is said.

    Raises DataError naming the line of one that does not do.
    """
    found, dropped = [], 0
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            if not isinstance(row.get("question"), str):
                raise DataError("no text under `question`")
            for check in checks:
                check(row)
            prompt = prompt_of(row)
            ids = tokenizer.encode(prompt)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        over = len(ids) - room.longest
        if not ids or (over > 0 and room.long == "refuse"):
            raise DataError(
                f"{path}:{number}: the prompt has {len(ids)} tokens; 1 to {room.longest} leave room for the completion"
                " (train.ctx_len less rollout.sampling.max_tokens)"
            )
        if over > 0 and room.long == "drop":
            dropped += 1
        elif over > 0:
            ids = ids[over:] if room.long == "end" else ids[: room.longest]
            found.append(Question(row, prompt, ids, number, over))
        else:
            found.append(Question(row, prompt, ids, number))
    if not found:
        raise DataError(f"{path}: no questions in it" + (f" but {dropped} that are too long" if dropped else ""))
    cut = sum(question.cut > 0 for question in found)
    if cut or dropped:
        done = f"{cut} are cut, their {room.long} is kept" if cut else f"{dropped} are left out"
        log.warning("%s: prompts of more than %d tokens leave no room: %s", path, room.longest, done)
    # a function of the user's that takes a column finds it in each rollout, whichever questions are asked there
    names = dict.fromkeys(name for question in found for name in question.row)
    return [replace(question, row=dict.fromkeys(names) | question.row) for question in found]


def drawn(count: int, config: TrainConfig, step: int, seed: int) -> list[int]:
    """Which of `count` questions step `step` asks: passes over all of them, each in an order of its own."""
    chosen = []
    for place in range(step * config.batch, (step + 1) * config.batch):
        epoch, index = divmod(place, count)
        chosen.append(index if config.order == "sequential" else int(_mixed(count, step_seed(seed, epoch))[index]))
    return chosen


@lru_cache(maxsize=2)  # a step may end one pass and begin the next
def _mixed(count: int, seed: int) -> Tensor:
    """The order (count,) of a pass."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
