"""The machine that a report is written on, and the versions of the software there."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rwkvpipe", "torch", "numpy", "safetensors", "tokenizers", "pydantic", "matplotlib", "snakemake")


def _found(path: str, pattern: str) -> str | None:
    file = Path(path)
    if not file.is_file():
        return None
    match = re.search(pattern, file.read_text(encoding="utf-8", errors="replace"), re.M)
    return match[1].strip() if match else None


def hardware() -> dict[str, str]:
    """Processor, cores, memory and graphics cards, as far as the system tells."""
    name = _found("/proc/cpuinfo", r"^model name\s*:\s*(.+)$") or platform.processor() or platform.machine()
    memory = _found("/proc/meminfo", r"^MemTotal:\s*(\d+) kB")
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = [_found(str(card), r"^Model:\s*(.+)$") or "unknown" for card in cards]
    facts = {"Processor": name, "Cores": str(os.cpu_count() or "unknown")}
    if memory:
        facts["Memory"] = f"{int(memory) / 2**20:.0f} GiB"
    return facts | {"Graphics": ", ".join(models) or "none"} | {"System": f"{platform.system()} {platform.release()}"}


def software() -> dict[str, str]:
    """Versions of Python and of the packages that decide results or draw them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = _found(str(ROOT / "pyproject.toml"), r'^version = "(.+)"$') if name == "rwkvpipe" else None
    return {name: version or "not installed" for name, version in found.items()}


def commit() -> str | None:
    """The commit that is checked out where this program lies; None where that is no git repository."""
    git = ROOT / ".git"
    branch = _found(str(git / "HEAD"), r"^ref: (.+)$")
    if branch is None:
        return _found(str(git / "HEAD"), r"^([0-9a-f]{40})$")
    loose = _found(str(git / branch), r"^([0-9a-f]{40})$")
    return loose or _found(str(git / "packed-refs"), rf"^([0-9a-f]{{40}}) {re.escape(branch)}$")
