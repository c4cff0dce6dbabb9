"""Which form of the operators runs here: the native one where it is built, else the PyTorch one."""

import logging
from types import ModuleType

log = logging.getLogger("rwkvpipe")

_said: set[str] = set()


def extension() -> ModuleType | None:
    """The native operators, or None where there are none (then `why_not` says why)."""
    return None


def why_not() -> str:
    """Why `extension` gives None."""
    return "this version has none"


def announce(operator: str, device: str) -> None:
    """Say once which kernel computes `operator` on `device`."""
    line = f"kernel: {operator} in PyTorch, by chunks, on {device} (native kernels: {why_not()})"
    if line not in _said:
        _said.add(line)
        log.info("%s", line)
