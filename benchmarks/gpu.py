"""All figures of an NVIDIA card, one after the other, in eight minutes at most: `python -m benchmarks gpu`.

Each is taken by a process of its own (benchmarks/card.py). A peer is asked where it is installed: in its environment
(`python -m benchmarks.peers fla`), or beside us. What cannot be taken says why.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import peers
from rwkvpipe.kernel.gpu import at_hand

SECONDS = 450.0  # for all; what is not begun by then is left out
LONGEST = 120.0  # for one of them
NOT_YET = "not yet taken"
LARGE, HALF = "8 4096 64", "8 4096 32"
# what it is called, the words for benchmarks.card, and whose environment; ours first: they must be there
CASES = [
    ("RWKV-7 operator, 8 rows of 4096, 64 heads", f"op wkv7 {LARGE}", None),
    ("the same, 32 heads", f"op wkv7 {HALF}", None),
    ("the same, 1 row, 12 heads", "op wkv7 1 4096 12", None),
    ("RWKV-6 operator, 64 heads", f"op wkv6 {LARGE}", None),
    ("RWKV-5.2 operator, 64 heads", f"op wkv5 {LARGE}", None),
    ("training, 0.4B, rows of 4096", "train rwkv7-0.4b 4096", None),
    ("training, 1.5B, rows of 4096", "train rwkv7-1.5b 4096", None),
    ("writing, 0.4B, one row", "decode rwkv7-0.4b 1", None),
    ("writing, 0.4B, 320 rows", "decode rwkv7-0.4b 320", None),
    ("reading, 0.4B, 4096 tokens", "read rwkv7-0.4b 4096", None),
    ("flash-linear-attention's RWKV-7 operator, 64 heads", f"op fla {LARGE}", "fla"),
    ("wind_rwkv's, by chunks, 64 heads", f"op wind_chunked {LARGE}", "wind_rwkv"),
    ("wind_rwkv's, RWKV-LM's way, 64 heads", f"op wind_stepping {LARGE}", "wind_rwkv"),
]
UNITS = {
    "forward_ms": "{:.2f} ms forward",
    "both_ms": "{:.2f} ms with backward",
    "error": "error {:.1e}",
    "rows": "{:d} rows",
    "tokens_per_second": "{:,.0f} tokens a second",
    "gigabytes": "{:.1f} GB",
    "mfu": "MFU {:.1%}",
    "bandwidth_share": "{:.0%} of the bandwidth",
}


def asked(words: str, peer: str | None, left: float) -> dict:
    """What a process finds, or why it finds nothing."""
    python = (peers.python(peer) if peer else None) or sys.executable
    command = [str(python), "-m", "benchmarks.card", *words.split()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=min(left, LONGEST))
    except subprocess.TimeoutExpired:
        return {"missing": "took too long"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["nothing was said"]
    return json.loads(lines[-1]) if done.returncode == 0 else {"missing": lines[-1][:200]}


def measure(card: str, seconds: float = SECONDS) -> dict:
    """All figures of a card."""
    begin, found = time.monotonic(), []
    at_hand(torch.device("cuda"))  # compiles our kernels, which is nobody's figure
    for name, words, peer in CASES:
        left = seconds - (time.monotonic() - begin)
        figures = asked(words, peer, left) if left > 1 else {"missing": "there was no time left"}
        found.append({"name": name, "card": card, **figures})
    return {"what": "gpu", "cases": found}


def said(case: dict) -> str:
    """The figures of a case in words."""
    words = [how.format(case[key]) for key, how in UNITS.items() if key in case]
    return ", ".join(words) or case.get("missing", NOT_YET)


def table(found: dict | None) -> str:
    """The figures for people, each with its card; without any they are not yet taken."""
    cases = found["cases"] if found else [{"name": name, "card": ""} for name, _, _ in CASES]
    lines = [f"| {case['name']} | {said(case)} | {case['card']} |" for case in cases]
    return "\n".join(["| | figures | card |", "| --- | --- | --- |", *lines])


def kept(file: Path) -> dict | None:
    """The last run in a file of runs."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return json.loads(lines[-1]) if lines else None
