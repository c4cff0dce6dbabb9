"""The demo's first stage, cut short, with native kernels and by torch alone: what a run of it takes, in turns."""

import json
import time
from pathlib import Path
from statistics import median

from benchmarks import precision
from benchmarks.page import rows
from benchmarks.train import conditions

STEPS = 100
WAYS = {"native kernels": {}, "by torch": {"RWKVPIPE_KERNELS": "torch"}}


def train(folder: Path, room: str, environment: dict[str, str]) -> dict:
    """CPU seconds, seconds and the last loss of one training."""
    out = folder / room / "model.safetensors"
    words = (folder / "settings.json", "--model", folder / "init.safetensors", "--data", folder / "sums")
    begin = time.monotonic()
    spent = precision.run("-m", "rwkvpipe.pretrain", *words, "--micro-batch", "16", "--out", out, **environment)
    rows = [json.loads(line) for line in (out.parent / "metrics.jsonl").read_text().splitlines()]
    return {"cpu_seconds": spent, "seconds": time.monotonic() - begin, "loss": rows[-1]["valid_loss"]}


def measure(folder: Path, rounds: int) -> dict:
    """Runs of both, one after the other; starting Python and the last held-out loss are in it, once each."""
    precision.corpus(folder)
    train_ = precision.TRAIN | {"steps": STEPS, "valid_every": 0}
    asked = {"kind": "pretrain", "seed": 1, "model": precision.MODEL, "train": train_}
    (folder / "settings.json").write_text(json.dumps(asked))
    words = (folder / "settings.json", "--tokenizer", folder / "letters", "--out", folder / "init.safetensors")
    precision.run("-m", "rwkvpipe.init", *words)
    found = {way: [] for way in WAYS}
    for number in range(rounds):
        for way, environment in WAYS.items():
            found[way].append(train(folder, f"{number}-{way.replace(' ', '-')}", environment))
            print(way, found[way][-1], flush=True)
    return {"what": "demo", "case": {**precision.MODEL, **train_}, "ways": found, **conditions()}


def table(found: dict) -> str:
    """The numbers for people."""
    seconds = {way: [each["cpu_seconds"] for each in some] for way, some in found["ways"].items()}
    body = []
    for way, some in found["ways"].items():
        times = [slow / fast for slow, fast in zip(seconds["by torch"], seconds[way], strict=True)]
        said = f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})" if way != "by torch" else "1"
        wall = median(each["seconds"] for each in some)
        body.append([way, f"{some[-1]['loss']:.4f}", f"{median(seconds[way]):.1f}", f"{wall:.1f}", said])
    head = [f"{found['case']['steps']} steps of the demo's first stage", "held-out loss", "CPU s", "s", "times as fast"]
    return rows(head, body).rstrip("\n")
