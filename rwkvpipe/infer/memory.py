"""What writing side by side takes of memory, computed before anything is allocated."""

import resource
from pathlib import Path

import torch

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.infer.decode_card import FORM, N

COPIES = 4  # of the rows' states: what is written, its next step, a group that was read, rows on their way
RECORDED = 2  # more of them on a card: where graphs write, and where they read
MIXED = 40  # arrays as wide as the stream that a block holds at a time, at most; 32 were 0.3 % too few once, in int8
SAMPLED = 96  # bytes that choosing a token takes for each id of a row, in PyTorch: logits, their powers, sorted, summed
COUNTED = 5  # bytes of penalties for each id of a row
SCORED = 12  # bytes for each number of the logits that are held when texts are weighed


def state_bytes(config: RwkvConfig) -> int:
    """Bytes of one row's state: layers x (two last inputs, a memory of head_size numbers for each channel) in fp32."""
    return 4 * config.n_layer * config.n_embd * (2 + config.head_size)


def row_bytes(config: RwkvConfig, chunk: int, copies: int = COPIES) -> int:
    """Bytes that one row takes at most, read in chunks of so many tokens."""
    D, V = config.n_embd, config.vocab_size
    read = 4 * chunk * (MIXED * D + 2 * (config.dim_ffn or 4 * D))
    return copies * state_bytes(config) + read + (SAMPLED + COUNTED) * V


def _number(path: str) -> int | None:
    file = Path(path)
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None


def free_bytes(device: torch.device) -> int | None:
    """Bytes that may still be taken; None where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    found = []
    if Path("/proc/meminfo").is_file():
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    most, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if most is not None and used is not None:
        found.append(most - used)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and Path("/proc/self/statm").is_file():
        found.append(limit - resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0]))
    return min(found, default=None)


def _copied(config: RwkvConfig, device: torch.device) -> int:
    """Bytes of the matrices of low rank, which are laid out again for a card's kernels."""
    if device.type != "cuda" or config.family != "rwkv7" or config.head_size != N:
        return 0
    return 8 * config.n_layer * config.n_embd * sum(getattr(config, name) for name in FORM.ranks)


def _taken(config: RwkvConfig, rows: int, device: torch.device, chunk: int, logits: int) -> int:
    """Bytes that so many rows take, and what weighs texts beside them."""
    each = row_bytes(config, chunk, COPIES + RECORDED * (device.type == "cuda"))
    return rows * each + SCORED * min(rows * chunk * config.vocab_size, logits) + _copied(config, device)


def spare_bytes(config: RwkvConfig, rows: int, device: torch.device, *, chunk: int, logits: int) -> int | None:
    """Bytes that are left beside so many rows; None where the system does not say."""
    free = free_bytes(device)
    return None if free is None else max(0, free - _taken(config, rows, device, chunk, logits))


def check_rows(config: RwkvConfig, rows: int, device: torch.device, *, chunk: int, logits: int) -> None:
    """Raise ConfigError, naming how many rows would do, for more of them than there is memory for."""
    each = row_bytes(config, chunk, COPIES + RECORDED * (device.type == "cuda"))
    free, taken = free_bytes(device), _taken(config, rows, device, chunk, logits)
    if free is None or taken <= free:
        return
    most = (free - SCORED * min(chunk * config.vocab_size, logits) - _copied(config, device)) // each
    way = f"{most} would do" if most > 0 else "not even one would do; free some, or take a smaller model"
    raise ConfigError(
        f"rows: {rows} texts at a time take about {taken / 1e9:.1f} GB of memory,"
        f" {free / 1e9:.1f} GB are free; {way} (--rows, in a profile rows)"
    )
