"""The model that a policy's divergence is measured from: what it began as, or, if asked, what slowly follows it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rwkvpipe.train.stage import Stage
from rwkvpipe.weights import lora

HEAD = "reference_model/"  # of its tensors in a resume point
MIXUP = 0.6


class Reference:
    """Beside an adapter the model less that; else a copy, which `sync` moves towards the policy."""

    def __init__(self, stage: Stage):
        self.stage, self.config = stage, stage.settings.rollout
        copied = self.config.beta > 0 and not stage.settings.apart
        self.copy = copy.deepcopy(stage.model).eval().requires_grad_(False) if copied else None
        self.moved = 0
        """The step before which it last moved."""

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """The model, to be asked inside the block alone."""
        if self.copy is not None:
            yield self.copy
            return
        with lora.disabled(self.stage.model):
            yield self.stage.model

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Before every sync-th step: mixup x policy + (1 - mixup) x reference (TR-DPO, arXiv 2404.09656)."""
        if self.config.sync is None or step == self.moved or step % self.config.sync:
            return
        share = MIXUP if self.config.mixup is None else self.config.mixup
        for own, new in zip(self.copy.parameters(), self.stage.model.parameters(), strict=True):
            own.lerp_(new, share)
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
                value.copy_(own[name])
        return {name: value for name, value in carried.items() if not name.startswith(HEAD)}
