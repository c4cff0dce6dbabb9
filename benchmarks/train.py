"""One step of training (forward, backward, clip, AdamW) on one thread: CPU time of ours and of a peer.

Peers run torch operations token by token, the only form they have on a CPU. Both programs start from the same weights
and read the same tokens; their losses are compared before anything is timed.
"""

import json
import os
import platform
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.kernel import build as kernels
from rwkvpipe.launch import surroundings
from rwkvpipe.model.family import build

WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True)
class Case:
    """What is trained. The ranks are those that the peer has built in."""

    n_layer: int = 3
    n_embd: int = 128
    head_size: int = 64
    vocab_size: int = 512
    ctx_len: int = 256
    batch: int = 8
    lr: float = 1e-4


# of each of our trainings its precision, and the most that its loss may differ from the peer's
OURS = {"rwkvpipe": ("fp32", 1e-4), "rwkvpipe, bf16": ("bf16", 5e-3)}
STEPS = {"rwkv-trainer": "rwkv_trainer_step.py", "rwkvtune": "rwkvtune_step.py"}
CASES = {"small": Case(), "large": Case(6, 256, vocab_size=1001, ctx_len=512, batch=2)}


def machine() -> str:
    """The processor's name, as its system has it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def conditions() -> dict:
    """On what something is measured."""
    return {
        "kernel": f"{kernels.level()}, {kernels.why_not()}",
        "machine": machine(),
        "load": os.getloadavg()[0],
        "torch": version("torch"),
    }


class Worker:
    """A program that answers one line of JSON for each line it is told."""

    def __init__(self, python: Path | str, script: str, *words: Path | str, threads: int = 1, **more: str):
        words = [str(python), str(WORKERS / script), *map(str, words)]
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path.cwd())} | more
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, what: str, limit: float | None = None) -> dict:
        """Tell it `loss` or `step`; lines that are no JSON are the peer's own talk. After `limit` seconds it is ended.

        Raises EOFError where it has ended.
        """
        timer = threading.Timer(threading.TIMEOUT_MAX if limit is None else limit, self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith("{"):
                    return json.loads(line)
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        raise EOFError(f"the worker of {self.process.args[1]} ended")

    def peak(self) -> float:
        """Megabytes that it held at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def close(self) -> None:
        """Let it end."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def prepare(case: Case, folder: Path) -> None:
    """Weights, tokens and sizes, as both programs read them."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {"d_decay": 64, "d_aaa": 64, "d_mv": 32, "d_gate": 128}
    sizes = {name: getattr(case, name) for name in ("n_layer", "n_embd", "head_size", "vocab_size")}
    model = build(RwkvConfig(**sizes, **ranks))
    model.initialise(0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # what starts at zero would hide a difference
        for tensor in model.parameters():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=draw))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    ids = torch.randint(case.vocab_size, (case.batch, case.ctx_len + 1), generator=draw)
    save_file({"ids": ids}, folder / "ids.safetensors")
    (folder / "case.json").write_text(json.dumps(asdict(case) | ranks))


def measure(python: Path, folder: Path, rounds: int, case: Case, peer: str = "rwkv-trainer") -> dict:
    """Losses of both, then CPU seconds of a step, in turns. Raises SystemExit when the losses differ.

    `python` is that of an environment that has the peer.
    """
    prepare(case, folder / "train")
    started = surroundings("pretrain")  # all as jobs are
    workers = {
        name: Worker(sys.executable, "ours.py", folder / "train", precision, **started)
        for name, (precision, _) in OURS.items()
    }
    workers[peer] = Worker(python, STEPS[peer], folder / "train", **started)
    losses = {name: worker.ask("loss")["loss"] for name, worker in workers.items()}
    if any(abs(losses[name] - losses[peer]) > far for name, (_, far) in OURS.items()):
        raise SystemExit(f"the losses differ, so there is nothing to compare: {losses}")
    for worker in workers.values():
        worker.ask("step")  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds[name].append(worker.ask("step")["cpu_seconds"])
    peaks = {name: worker.peak() for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds[peer], strict=True)] for name in OURS}
    return {
        "what": "train" if peer == "rwkv-trainer" else "tune",
        "case": asdict(case),
        "loss": losses,
        "cpu_seconds": seconds,
        "ratio": {name: median(values) for name, values in ratios.items()},
        "ratios": ratios,
        "megabytes": peaks,
        **conditions(),
    }


def table(found: dict) -> str:
    """The numbers for people."""
    case = found["case"]
    tokens = case["batch"] * case["ctx_len"]
    lines = [
        f"| {case['n_layer']} layers of {case['n_embd']}, {case['batch']} rows of {case['ctx_len']} | loss | CPU s"
        " | tokens a CPU s | MB | times as fast |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, seconds in found["cpu_seconds"].items():
        middle = median(seconds)
        times = [1 / ratio for ratio in found["ratios"].get(name, [1])]
        said = f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})" if len(times) > 1 else "1"
        held = f"{found['megabytes'][name]:,.0f}"
        rate = f"{tokens / middle:,.0f}"
        lines.append(f"| {name} | {found['loss'][name]:.6f} | {middle:.3f} | {rate} | {held} | {said} |")
    return "\n".join(lines)
