"""Which process is this, and on which device does it compute."""

import logging
import os
from dataclasses import dataclass

import torch

from rwkvpipe.base.errors import ConfigError

log = logging.getLogger("rwkvpipe")

PARENT = os.getppid()


@dataclass(frozen=True)
class Rank:
    """One of the processes that train together: its number, how many there are, its device."""

    index: int
    count: int
    device: torch.device


def deserted() -> bool:
    """Whether whoever started this process is gone, so that nobody waits for what it does."""
    return os.getppid() != PARENT


def start() -> Rank:
    """Choose the device and say which.

    RWKVPIPE_DEVICE (`cpu` or `cuda`, set by `launch`) decides; without it a GPU is used if there is one.
    Raises ConfigError when a GPU was asked for and none can be used.
    """
    wanted = os.environ.get("RWKVPIPE_DEVICE", "")
    if wanted not in ("", "cpu", "cuda"):
        raise ConfigError(f"RWKVPIPE_DEVICE: {wanted!r} is no device; it is cpu or cuda")
    usable = torch.cuda.is_available()
    if wanted == "cuda" and not usable:
        raise ConfigError("RWKVPIPE_DEVICE: cuda was asked for, but torch sees no usable GPU; launch 0 is the CPU")
    if wanted == "cpu" or not usable:
        device, name = torch.device("cpu"), "cpu"
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        name = f"{device} ({torch.cuda.get_device_name(device)})"
    torch.set_num_threads(torch.get_num_threads())  # said aloud, MKL takes no fewer on a machine of fewer cores
    log.info("device %s, %d threads, torch %s", name, torch.get_num_threads(), torch.__version__)
    return Rank(0, 1, device)
