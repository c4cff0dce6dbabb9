"""A step of training while the machine has other work: wall time on one thread and on two, with 0, 1 and 2 others busy.

Threads that wait for each other by turning in circles can lose a hundredfold there. Ours sleep; beside them stand the
same model by torch alone (RWKVPIPE_KERNELS=torch) and rwkv-trainer. A program whose step outlasts LIMIT is ended.
"""

import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.page import rows
from benchmarks.train import Case, Worker, conditions, prepare
from rwkvpipe.launch import surroundings

OTHERS = (0, 1, 2)
THREADS = (1, 2)
LIMIT = 60.0  # seconds
AWAKE = 1.0  # seconds of steps before one is measured: threads have slept while others had their turn


@contextmanager
def beside(count: int):
    """So many processes that compute all the time."""
    some = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for each in some:
            each.kill()
            each.wait()


def step(worker: Worker) -> float | None:
    """Seconds of a step as in training, after others; None where one took longer than LIMIT, now or before."""
    until = time.monotonic() + AWAKE
    try:
        while time.monotonic() < until:
            worker.ask("step", LIMIT)
        return worker.ask("step", LIMIT)["seconds"]
    except EOFError:
        return None


def measure(peer: Path, folder: Path, rounds: int, case: Case) -> dict:
    """Seconds of a step of each program, with each number of threads, in turns, by how many others are busy."""
    prepare(case, folder / "train")
    started = surroundings("pretrain")  # as jobs are
    pages = {name: value for name, value in started.items() if name.startswith("GLIBC")}  # but not how threads wait
    programs = {
        "rwkvpipe": (sys.executable, "ours.py", started),
        "rwkvpipe by torch": (sys.executable, "ours.py", started | {"RWKVPIPE_KERNELS": "torch"}),
        "rwkv-trainer": (peer, "rwkv_trainer_step.py", pages),
    }
    workers = {
        f"{name}, {count}": Worker(python, script, folder / "train", "fp32", threads=count, **environment)
        for name, (python, script, environment) in programs.items()
        for count in THREADS
    }
    alone = {name: worker for name, worker in workers.items() if name.endswith(f", {THREADS[0]}")}
    losses = {name: worker.ask("loss")["loss"] for name, worker in alone.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise SystemExit(f"the losses differ, so there is nothing to compare: {losses}")
    found = {}
    for others in OTHERS:
        with beside(others):
            turns = [{name: step(worker) for name, worker in workers.items()} for _ in range(rounds)]
        found[str(others)] = {name: [turn[name] for turn in turns] for name in workers}
    for worker in workers.values():
        worker.close()
    return {"what": "busy", "case": asdict(case), "seconds": found, **conditions()}


def _said(seconds: list[float | None]) -> str:
    return f"over {LIMIT:.0f}" if None in seconds else f"{median(seconds):.2f} (to {max(seconds):.2f})"


def table(found: dict) -> str:
    """The numbers for people: seconds of a step, the median and the longest, and what the second thread is worth."""
    case, body = found["case"], []
    for others, seconds in found["seconds"].items():
        for name in dict.fromkeys(each.rpartition(", ")[0] for each in seconds):
            one, two = (seconds[f"{name}, {count}"] for count in THREADS)
            ended = None in [*one, *two]
            ratio = "" if ended else f"{median(a / b for a, b in zip(one, two, strict=True)):.2f}"
            body.append([others, name, _said(one), _said(two), ratio])
    model = f"{case['n_layer']} layers of {case['n_embd']}, {case['batch']} rows of {case['ctx_len']}"
    return rows(["others busy", model, "s on one thread", "s on two", "times as fast on two"], body).rstrip("\n")
