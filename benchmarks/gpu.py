"""All figures of an NVIDIA card, one after the other, in eight minutes at most: `python -m benchmarks gpu`.

Each is taken by a process of its own (benchmarks/card.py). A peer is asked where it is installed: in its environment
(`python -m benchmarks.peers fla`), or beside us, or in the clone that is named. What cannot be taken says why.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import peers
from rwkvpipe.kernel.gpu import at_hand

SECONDS = 450.0  # for all; what is not begun by then is left out
LONGEST = 120.0  # for one of them
NOT_YET = "not yet taken"
CLONES = ("RWKV-LM", "Albatross")  # words in the place of which the folder of a clone is put
LARGE, HALF = "8 4096 64", "8 4096 32"
# what it is called, the words for benchmarks.card, and whose environment; ours first: they must be there
CASES = [
    ("RWKV-7 operator, 8 rows of 4096, 64 heads", f"op wkv7 {LARGE}", None),
    ("the same, 32 heads", f"op wkv7 {HALF}", None),
    ("the same, 1 row, 12 heads", "op wkv7 1 4096 12", None),
    ("RWKV-6 operator, 64 heads", f"op wkv6 {LARGE}", None),
    ("RWKV-5.2 operator, 64 heads", f"op wkv5 {LARGE}", None),
    ("training, 0.4B, rows of 4096", "train rwkv7-0.4b 4096 kept", None),
    ("the same, blocks computed again", "train rwkv7-0.4b 4096 again", None),
    ("training, 1.5B, rows of 4096", "train rwkv7-1.5b 4096 kept", None),
    ("the same, 1.5B, blocks computed again", "train rwkv7-1.5b 4096 again", None),
    ("writing, 0.4B, one row", "decode rwkv7-0.4b 1", None),
    ("writing, 0.4B, 320 rows", "decode rwkv7-0.4b 320", None),
    ("reading, 0.4B, 4096 tokens", "read rwkv7-0.4b 4096", None),
    ("the same by the engine, chunk by chunk", "engine rwkv7-0.4b 4096", None),
    ("flash-linear-attention's RWKV-7 operator, 64 heads", f"op fla {LARGE}", "fla"),
    ("wind_rwkv's, by chunks, 64 heads", f"op wind_chunked {LARGE}", "wind_rwkv"),
    ("wind_rwkv's, RWKV-LM's way, 64 heads", f"op wind_stepping {LARGE}", "wind_rwkv"),
    ("RWKV-LM's, 64 heads", f"op lm {LARGE} RWKV-LM", None),
    ("RWKV-LM's for the H100, 64 heads", f"op lm_h100 {LARGE} RWKV-LM", None),
    ("RWKV-LM's training, 0.4B, rows of 4096", "train_lm rwkv7-0.4b 4096 RWKV-LM", None),
    ("RWKV-LM's training, 1.5B, rows of 4096", "train_lm rwkv7-1.5b 4096 RWKV-LM", None),
    ("Albatross's writing, 0.4B, one row", "albatross rwkv7-0.4b 1 Albatross", None),
    ("Albatross's writing, 0.4B, 320 rows", "albatross rwkv7-0.4b 320 Albatross", None),
]
# with these in the place of theirs all of the above runs anywhere, in no time
SMALL = {LARGE: "1 16 1", HALF: "1 16 1", "1 4096 12": "1 16 1", "rwkv7-0.4b": "2x64", "rwkv7-1.5b": "2x64",
         "4096": "16", "320": "3"}  # fmt: skip
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


def asked(device: str, words: list[str], peer: str | None, left: float) -> dict:
    """What a process finds, or why it finds nothing."""
    python = (peers.python(peer) if peer else None) or sys.executable
    command = [str(python), "-m", "benchmarks.card", device, *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=min(left, LONGEST))
    except subprocess.TimeoutExpired:
        return {"missing": "took too long"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["nothing was said"]
    return json.loads(lines[-1]) if done.returncode == 0 else {"missing": lines[-1][:200]}


def small(words: str) -> str:
    """The same figure of something tiny."""
    for large, tiny in SMALL.items():
        words = words.replace(large, tiny)
    return words


def measure(
    card: str, seconds: float = SECONDS, *, dry: bool = False, clones: Mapping[str, Path | None] | None = None
) -> dict:
    """All figures of a card, each told as it is taken; `dry`: of something tiny, on the processor.

    clones: where RWKV-LM and Albatross lie.
    """
    begin, found, clones = time.monotonic(), [], clones or {}
    if not dry:
        at_hand(torch.device("cuda"))  # compiles our kernels, which is nobody's figure
    for name, words, peer in CASES:
        left = seconds - (time.monotonic() - begin)
        words = (small(words) if dry else words).split()
        lacking = [word for word in words if word in CLONES and not clones.get(word)]
        words = [str(clones[word].resolve()) if clones.get(word) else word for word in words]
        if lacking:
            figures = {"missing": f"no clone of {lacking[0]} was named"}
        elif left > 1:
            figures = asked("cpu" if dry else "cuda", words, peer, left)
        else:
            figures = {"missing": "there was no time left"}
        found.append({"name": name, "card": card, **figures})
        print(json.dumps(found[-1]), flush=True)
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
