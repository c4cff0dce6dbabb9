"""Text to tokens with one tokenizer.json: ours beside datatrove, Megatron's builder and the library's own batches.

Each program runs in a process of its own, on one core; CPU seconds count from start to end, less those of a start with
one document. Before anything is timed, all must have written the same ids.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.pack import documents, run
from rwkvpipe.data.binidx import Binidx

WORKERS = Path(__file__).parent / "workers"
OURS, QUICK, BATCH = "rwkvpipe", "rwkvpipe, gigatoken", "tokenizers, batches"
PEERS = {"datatrove": "datatrove_tokens.py", "megatron-core": "megatron_tokens.py"}
IDS = 32768


def tokenizer(text: Path, folder: Path) -> Path:
    """A tokenizer.json learned from the text."""
    spec = json.dumps({"kind": "bpe", "corpora": ["text"], "vocab_size": IDS, "sample": 8})
    out = folder / "bpe"
    if not (out / "bpe.json").exists():
        subprocess.run([sys.executable, "-m", "rwkvpipe.vocab", text, "--spec", spec, "--out", out], check=True)
    return out


def measure(peers: dict[str, Path], folder: Path, rounds: int, files: list[Path], megabytes: float = 6) -> dict:
    """CPU seconds of all, in turns. Raises SystemExit when their ids differ."""
    text, tiny = documents(files, folder, megabytes), folder / "pack-tiny.jsonl"
    tiny.write_text('{"text": "a"}\n')
    words = tokenizer(text, folder)
    spec = json.dumps({"path": "x", "tokenizer": "words"})

    def pack(source: Path, engine: str = "tokenizers") -> float:
        call = [sys.executable, "-m", "rwkvpipe.pack", source, "--spec", spec, "--tokenizer", words]
        call += ["--bpe-engine", engine, "--out", folder / "ours"]
        return run(call, folder / "ours.log")["cpu_seconds"]

    def peer(name: str, source: Path) -> float:
        call = [peers[name], WORKERS / PEERS[name], source, words / "bpe.json", folder / name]
        return run(call, folder / f"{name}.log")["cpu_seconds"]

    def batch() -> float:
        call = [sys.executable, WORKERS / "batch_tokens.py", text, words / "bpe.json"]
        return json.loads(subprocess.run(list(map(str, call)), check=True, capture_output=True).stdout)["cpu_seconds"]

    def packed(engine: str) -> np.ndarray:
        pack(text, engine)
        found = Binidx(folder / "ours/train")
        return np.array(found.tokens(0, len(found)))

    wanted = packed("tokenizers")
    if not np.array_equal(packed("gigatoken"), wanted):
        raise SystemExit("the ids of gigatoken are others, so there is nothing to compare")
    for name in peers:
        peer(name, text)
        found = next((folder / name).glob("*.ds" if name == "datatrove" else "*.bin"))
        if not np.array_equal(np.fromfile(found, dtype=np.uint16), wanted):
            raise SystemExit(f"the ids of {name} are others, so there is nothing to compare")
    size, rates = text.stat().st_size / 1e6, {name: [] for name in (OURS, QUICK, BATCH, *peers)}
    for _ in range(rounds):
        rates[OURS].append(size / (pack(text) - pack(tiny)))
        rates[QUICK].append(size / (pack(text, "gigatoken") - pack(tiny, "gigatoken")))
        rates[BATCH].append(size / batch())
        for name in peers:
            rates[name].append(size / (peer(name, text) - peer(name, tiny)))
    return {
        "benchmark": "bpe",
        "megabytes": size,
        "megabytes_per_cpu_second": rates,
        "ratios": {
            name: median(a / b for a, b in zip(rates[OURS], theirs, strict=True))
            for name, theirs in rates.items()
            if name != OURS
        },
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }


def table(found: dict) -> str:
    """The numbers for people."""
    lines = [f"{'':20} {'MB/s':>7} {'ours is':>8}"]
    for name, rates in found["megabytes_per_cpu_second"].items():
        ratio = f"{found['ratios'][name]:.2f} x" if name in found["ratios"] else ""
        lines.append(f"{name:20} {median(rates):7.2f} {ratio:>8}")
    return "\n".join([*lines, "the same ids; megabytes a second of one core, starts not counted"])
