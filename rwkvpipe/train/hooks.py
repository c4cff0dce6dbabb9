"""What a user's functions make of completions before they are learned from: other texts, and how much tokens count.

`postprocess(prompts, completions, completion_ids, masks, tokenizer, and a list for each column of the questions)`
returns a dict with the three in the middle. `completion_ids` is a tensor (N, C) of ids, padded on the right with 0;
`masks` (N, C) is True on the ids of each completion. Both keep their shape; edited texts are to be encoded again.
`loss_mask(prompts, completions, completion_ids, tokenizer, ...)` returns (N, C) numbers from 0 on: what each token
counts in the loss. Both may leave out arguments that they do not need.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rwkvpipe.base.config import RolloutConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.infer.engine import Completion
from rwkvpipe.tokenizer.load import Tokenizer
from rwkvpipe.train.own import columns, function, taken, theirs

POST, MASK = "rollout.postprocess", "rollout.loss_mask"
MADE = ("completions", "completion_ids", "masks")


def _padded(found: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """Ids (N, C) long, and where they are (N, C) bool."""
    width = max(1, *(len(c.ids) for c in found))
    ids, masks = torch.zeros(len(found), width, dtype=torch.long), torch.zeros(len(found), width, dtype=torch.bool)
    for row, completion in enumerate(found):
        ids[row, : len(completion.ids)] = torch.tensor(completion.ids)
        masks[row, : len(completion.ids)] = True
    return ids, masks


def _array(key: str, name: str, given: object, like: Tensor) -> Tensor:
    """What was given as a tensor of the shape asked for. Raises DataError."""
    try:
        found = torch.as_tensor(given).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{key}: {name} is {type(given).__name__}, no rows of numbers") from None
    if found.shape != like.shape:
        raise DataError(f"{key}: {name} is of shape {tuple(found.shape)}, {tuple(like.shape)} went in")
    return found


class Shaping:
    """The hooks of a stage; without any of them completions stay as they were drawn."""

    def __init__(self, config: RolloutConfig, tokenizer: Tokenizer):
        self.names, self.tokenizer = {POST: config.postprocess, MASK: config.loss_mask}, tokenizer
        self.own = {key: function(key, name) for key, name in self.names.items() if name}

    def __call__(self, rows: list[dict], prompts: list[str], found: list[Completion]) -> dict:
        """Texts and ids of all completions, and what their tokens count (None: all alike), as JSON holds them.

        Raises DataError where a function does not keep to what it is told above.
        """
        texts = [c.text for c in found]
        ids, masks = _padded(found)
        every = columns(rows) | {"prompts": list(prompts), "tokenizer": self.tokenizer}
        if POST in self.own:
            given = self._call(POST, every | dict(zip(MADE, (list(texts), ids.clone(), masks.clone()), strict=True)))
            texts, ids, masks = self._checked(given, texts, ids)
        lists = [row[: int(mask.sum())] for row, mask in zip(ids.tolist(), masks, strict=True)]
        counts = None
        if MASK in self.own:
            given = self._call(MASK, every | {"completions": list(texts), "completion_ids": ids.clone()})
            found_counts = _array(MASK, "what it returns", given, ids).double()
            if not torch.isfinite(found_counts).all() or (found_counts < 0).any():
                raise DataError(
                    f"{MASK}: a token counts less than nothing, or no number says how much; give 0 and more"
                )
            counts = [row[: len(some)] for row, some in zip(found_counts.tolist(), lists, strict=True)]
        return {"texts": texts, "ids": lists, "counts": counts}

    def _call(self, key: str, every: dict) -> object:
        asked = taken(key, self.names[key], self.own[key], every)
        with theirs(key, self.names[key]):
            return self.own[key](**asked)

    def _checked(self, given: object, before: list[str], like: Tensor) -> tuple[list[str], Tensor, Tensor]:
        """What `postprocess` returned, if it may be learned from. Raises DataError."""
        if not isinstance(given, dict):
            raise DataError(f"{POST}: {type(given).__name__} returned; a dict of {', '.join(MADE)} is needed")
        for name in MADE:
            if name not in given:
                raise DataError(f"{POST}: the dict returned has no {name}")
        texts, ids, masks = given["completions"], *(_array(POST, name, given[name], like) for name in MADE[1:])
        if not isinstance(texts, Sequence) or len(texts) != len(before) or not all(isinstance(t, str) for t in texts):
            raise DataError(f"{POST}: completions is no list of {len(before)} texts")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise DataError(f"{POST}: completion_ids is of {ids.dtype}, whole numbers are needed")
        masks = masks != 0
        ends = masks.long()
        if (ends[:, 1:] > ends[:, :-1]).any():
            row = int((ends[:, 1:] > ends[:, :-1]).any(1).nonzero()[0])
            raise DataError(f"{POST}: masks of completion {row} has a gap; a completion is the ids up to one place")
        wrong = masks & ((ids < 0) | (ids >= self.tokenizer.size))
        if wrong.any():
            raise DataError(f"{POST}: completion_ids has {int(ids[wrong][0])}, no id of the {self.tokenizer.size}")
        same = (ids * masks == like).all(1)
        for row, (text, old) in enumerate(zip(texts, before, strict=True)):
            if text != old and bool(same[row]):
                raise DataError(f"{POST}: completion {row} has another text and the same ids; encode it again")
        return list(texts), ids.long(), masks

    def read(
        self, found: list[Completion], shaped: dict
    ) -> tuple[list[Completion], list[list[float]] | None, set[int]]:
        """The completions as they are now, what their tokens count, and which of them nobody drew so."""
        rows = list(zip(found, shaped["texts"], shaped["ids"], strict=True))
        foreign = {row for row, (completion, _, ids) in enumerate(rows) if list(completion.ids) != ids}
        return [replace(c, text=text, ids=ids) for c, text, ids in rows], shaped["counts"], foreign
