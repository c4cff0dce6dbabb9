"""The model that a policy's divergence is measured from: what it began as, or, if asked, what slowly follows it."""

import torch
from torch import Tensor

from rwkvpipe.train.sharding import local, part_of, parted
from rwkvpipe.train.stage import Stage
from rwkvpipe.train.stop import held

HEAD = "reference_model/"  # of its tensors in a resume point
MIXUP = 0.6


class Reference:
    """The stage's own start: beside an adapter the model less that; else a copy, which `sync` moves."""

    def __init__(self, stage: Stage):
        self.stage, self.config, self.copy = stage, stage.settings.rollout, stage.start
        self.moved = 0
        """The step before which it last moved."""

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Before every sync-th step: mixup x policy + (1 - mixup) x reference (TR-DPO, arXiv 2404.09656)."""
        if self.config.sync is None or step == self.moved or step % self.config.sync:
            return
        share = MIXUP if self.config.mixup is None else self.config.mixup
        parted(self.stage.model)
        with held():  # a stop must not leave it moved half, to be moved again
            for own, new in zip(self.copy.parameters(), self.stage.model.parameters(), strict=True):
                local(own).lerp_(local(new), share)
            self.moved = step

    def carry(self) -> dict[str, Tensor]:
        """What a resume point must hold of it."""
        if not self.moved:
            return {}
        kept = {f"{HEAD}{name}": value for name, value in self.copy.named_parameters()}
        return kept | {f"{HEAD}moved": torch.tensor(self.moved)}

    @torch.no_grad()
    def restore(self, carried: dict[str, Tensor]) -> dict[str, Tensor]:
        """Go back to what `carry` gave; returns what else was carried."""
        own = {name.removeprefix(HEAD): value for name, value in carried.items() if name.startswith(HEAD)}
        if own:
            self.moved = int(own["moved"])
            for name, value in self.copy.named_parameters():
                value.copy_(part_of(own[name], value))
        return {name: value for name, value in carried.items() if not name.startswith(HEAD)}
