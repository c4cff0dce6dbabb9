"""Text to a binidx pair: ours beside the way of RWKV-LM's make_data.py, same documents, same order, same vocabulary.

Each program runs in a process of its own; CPU seconds, those of its own processes with it, count from start to end.
Before anything is timed, both must have written the same bytes.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.tokenize import corpus
from rwkvpipe.base.files import digest

WORKER = Path(__file__).parent / "workers/make_data.py"
OURS, THEIRS = "rwkvpipe", "make_data.py"


def _held(process: int) -> tuple[float, float]:
    """Megabytes that a process and those that it started hold, what they share counted once; and counted by each."""
    once, each, waiting = 0, 0, [process]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        try:
            said = (folder / "smaps_rollup").read_text()
            waiting += [int(word) for task in folder.glob("task/*/children") for word in task.read_text().split()]
        except OSError:  # it has ended meanwhile
            continue
        once += sum(int(line.split()[1]) for line in said.splitlines() if line.startswith("Pss:"))
        each += sum(int(line.split()[1]) for line in said.splitlines() if line.startswith("Rss:"))
    return once / 1024, each / 1024


def run(words: list, log: Path) -> dict:
    """CPU seconds of a program and of all it starts, and the most memory that they held together."""
    with open(log, "w") as said:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
        process = subprocess.Popen([str(word) for word in words], stdout=said, stderr=said, env=environment)
        most, resident, ended = 0.0, 0.0, 0
        while not ended:
            time.sleep(0.2)
            held = _held(process.pid)
            most, resident = max(most, held[0]), max(resident, held[1])
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
    if status:
        raise SystemExit(f"{words[:3]} failed:\n{log.read_text()[-2000:]}")
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "megabytes": most, "resident": resident}


def documents(files: list[Path], folder: Path, megabytes: float) -> Path:
    """JSON lines with a text each, again and again until there are so many megabytes."""
    texts = map(json.loads, corpus(files, folder, megabytes).read_text(encoding="utf-8").splitlines())
    lines = [json.dumps({"text": text}) for text in texts if text]
    out = folder / "pack-text.jsonl"
    with open(out, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            for number, line in enumerate(lines):
                file.write(line + "\n")
                if number % 50 == 0 and file.tell() >= megabytes * 1e6:
                    break
    return out


def measure(peer: Path, folder: Path, rounds: int, files: list[Path], megabytes: float = 300) -> dict:
    """CPU seconds of both, in turns, and of an empty start of ours. Raises SystemExit when their bytes differ."""
    text = documents(files, folder, megabytes)
    part = folder / "pack-part.jsonl"  # theirs is slow: it gets a fiftieth
    with open(text, "rb") as file:
        part.write_bytes(b"".join(file.readlines(int(megabytes * 2e4))))
    subprocess.run([sys.executable, "-m", "rwkvpipe.vocab", "--spec", '{"kind": "world"}', "--out", folder / "world"],
                   check=True)  # fmt: skip
    spec = json.dumps({"path": "x", "tokenizer": "world"})

    def ours(source: Path) -> dict:
        words = [sys.executable, "-m", "rwkvpipe.pack", source, "--spec", spec, "--tokenizer", folder / "world"]
        return run([*words, "--out", folder / "ours"], folder / "ours.log")

    def theirs(source: Path) -> dict:
        return run([peer, WORKER, source, folder / "theirs"], folder / "theirs.log")

    theirs(part)
    shuffled = folder / "theirs/shuffled.jsonl"  # theirs shuffles: ours gets the documents as that wrote them
    ours(shuffled)
    same = {
        kind: (digest(folder / f"ours/train.{kind}"), digest(folder / f"theirs/out.{kind}")) for kind in ("bin", "idx")
    }
    if any(a != b for a, b in same.values()):
        raise SystemExit("the files differ, so there is nothing to compare")
    tiny = folder / "pack-tiny.jsonl"
    tiny.write_text('{"text": "a"}\n')
    sizes = {name: source.stat().st_size / 1e6 for name, source in (("whole", text), ("part", part))}
    turns: dict[str, list[dict]] = {OURS: [], THEIRS: [], "start of ours": [], "start of theirs": []}
    for _ in range(rounds):
        turns[OURS].append(ours(text))
        turns[THEIRS].append(theirs(part))
        turns["start of ours"].append(ours(tiny))
        turns["start of theirs"].append(theirs(tiny))
    rates = {
        OURS: [_rate(sizes["whole"], *both) for both in zip(turns[OURS], turns["start of ours"], strict=True)],
        THEIRS: [_rate(sizes["part"], *both) for both in zip(turns[THEIRS], turns["start of theirs"], strict=True)],
    }
    return {
        "benchmark": "pack",
        "megabytes": sizes,
        "turns": turns,
        "megabytes_per_cpu_second": rates,
        "ratio": median(a / b for a, b in zip(rates[OURS], rates[THEIRS], strict=True)),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }


def _rate(megabytes: float, whole: dict, start: dict) -> float:
    """Megabytes a CPU second, without what a program takes to start."""
    return megabytes / (whole["cpu_seconds"] - start["cpu_seconds"])


def table(found: dict) -> str:
    """The numbers for people."""
    lines = [f"{'':14} {'MB':>6} {'CPU s':>7} {'start':>6} {'MB/s net':>9} {'MB of memory':>13}"]
    for name, start, size in ((OURS, "start of ours", "whole"), (THEIRS, "start of theirs", "part")):
        turns = found["turns"][name]
        lines.append(
            f"{name:14} {found['megabytes'][size]:6.1f} {median(t['cpu_seconds'] for t in turns):7.2f}"
            f" {median(t['cpu_seconds'] for t in found['turns'][start]):6.2f}"
            f" {median(found['megabytes_per_cpu_second'][name]):9.2f} {max(t['megabytes'] for t in turns):13.0f}"
        )
    lines.append(f"the same bytes; ours packs {found['ratio']:.1f} times as much in a CPU second, starts not counted")
    return "\n".join(lines)
