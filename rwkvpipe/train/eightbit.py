"""Adam with moments of 8 bits a number (Dettmers et al. 2022, arXiv 2110.02861), by the library bitsandbytes.

Tensors of fewer than 4,096 numbers keep moments of 32 bits, as there.
"""

import importlib
from collections.abc import MutableMapping
from types import ModuleType

import torch
from torch import Tensor

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import ConfigError

KEY = "train.optimizer: adamw8bit"


def _library() -> ModuleType:
    """bitsandbytes. Raises ConfigError where it is not, or cannot be loaded."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        said = "is not installed (pip install bitsandbytes)" if error.name == "bitsandbytes" else f"fails: {error}"
        raise ConfigError(f"{KEY} needs the library bitsandbytes, which {said}; or choose adamw") from None


def check_optimizer(config: TrainConfig, device: torch.device, shard: str | None = None) -> None:
    """Raise ConfigError where the optimizer of the settings cannot move weights on the device, before any are read."""
    if config.optimizer != "adamw8bit":
        return
    if shard is not None:
        raise ConfigError(f"{KEY} has no moments that memory.shard could cut; leave one of them out")
    tried = torch.zeros(4096, device=device)
    tried.grad = torch.ones_like(tried)
    try:
        EightBit([{"params": [tried], "lr": 0.1, "weight_decay": 0.0}], (0.9, 0.99), 1e-8).step()
    except (RuntimeError, AttributeError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"{KEY}: bitsandbytes cannot do it on {device}: {said}; choose adamw") from None
    if not bool(torch.isfinite(tried).all()) or float(tried.max()) >= 0:
        raise ConfigError(f"{KEY}: bitsandbytes moves nothing on {device}; choose adamw")


class _Moments(MutableMapping):
    """Its moments by parameter, as tensors alone, which is what resume points hold."""

    def __init__(self, kept: dict):
        self.kept = kept

    def __getitem__(self, value: Tensor) -> dict[str, Tensor]:
        return {name: torch.as_tensor(part) for name, part in self.kept[value].items()}

    def __setitem__(self, value: Tensor, found: dict[str, Tensor]) -> None:
        self.kept[value] = {name: int(part) if name == "step" else part for name, part in found.items()}

    def __delitem__(self, value: Tensor) -> None:
        del self.kept[value]

    def __iter__(self):
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


class EightBit:
    """The optimizer as the loop knows it: groups, moments by parameter, a step."""

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float):
        self.inner = _library().optim.AdamW8bit(groups, betas=betas, eps=eps)
        self.param_groups = self.inner.param_groups
        self.state = _Moments(self.inner.state)
        for number, group in enumerate(self.param_groups):  # there from the start, for resume points to be put into
            for place, value in enumerate(group["params"]):
                self.inner.init_state(group, value, number, place)

    @torch.no_grad()
    def step(self) -> None:
        """Move every tensor that has a gradient."""
        self.inner.step()
