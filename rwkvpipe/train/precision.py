"""The arithmetic of training: what is rounded, which device can do it, and what keeps the small gradients of fp16."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from rwkvpipe.base.errors import ConfigError

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
CALM = 1000  # steps without overflow after which the factor of fp16 doubles


def arithmetic(precision: str, device: torch.device) -> AbstractContextManager:
    """Context of a forward: bf16 and fp16 round the inputs of matrix products; weights, state and loss stay fp32."""
    return torch.autocast(device.type, NARROW.get(precision, torch.bfloat16), enabled=precision in NARROW)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ConfigError where the device cannot compute so, or so slowly that nobody can mean it."""
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision: fp16 takes a CPU many times as long as fp32; choose fp32 or bf16, or a GPU")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(f"train.precision: {torch.cuda.get_device_name(device)} has no bf16; choose fp16 or fp32")


@dataclass
class Scaler:
    """What the loss is multiplied by before the backward, and gradients divided by after it.

    fp16 has no numbers below 6e-8. A step that overflows is computed again with half the factor, so none is lost; what
    the factor is follows from the steps before alone, and resume points hold it.
    """

    size: float = 1.0
    calm: int = 0

    @classmethod
    def of(cls, precision: str) -> "Scaler":
        """The one to begin with: 1, which changes nothing, but for fp16."""
        return cls(65536.0 if precision == "fp16" else 1.0)

    def lower(self) -> bool:
        """Half the factor; returns whether that was possible."""
        if self.size <= 1:
            return False
        self.size, self.calm = self.size / 2, 0
        return True

    def settle(self, precision: str) -> None:
        """A step went well; after enough of them in a row fp16 tries twice the factor."""
        self.calm += 1
        if precision == "fp16" and self.calm >= CALM:
            self.size, self.calm = self.size * 2, 0
