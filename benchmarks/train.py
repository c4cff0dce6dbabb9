"""One step of training (forward, backward, clip, AdamW) on one thread: CPU time of ours and of rwkv-trainer.

The peer runs its torch fallback, the only form it has on a CPU. Both start from the same weights and read the same
tokens; their losses are compared before anything is timed.
"""

import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.model.family import build

WORKERS = Path(__file__).parent / "workers"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}


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


class Worker:
    """A program that answers one line of JSON for each line it is told."""

    def __init__(self, python: Path | str, script: str, *words: Path | str):
        words = [str(python), str(WORKERS / script), *map(str, words)]
        environment = {**ONE_THREAD, "PYTHONPATH": str(Path.cwd())}
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, what: str) -> dict:
        """Tell it `loss` or `step`; lines that are no JSON are the peer's own talk."""
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"the worker of {self.process.args[1]} ended")

    def close(self) -> None:
        """Let it end."""
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


def measure(peer: Path, folder: Path, rounds: int) -> dict:
    """Losses of both, then CPU seconds of a step, in turns. Raises SystemExit when the losses differ."""
    case = Case()
    prepare(case, folder / "train")
    workers = {
        "rwkvpipe": Worker(sys.executable, "ours.py", folder / "train"),
        "rwkv-trainer": Worker(peer, "rwkv_trainer_step.py", folder / "train"),
    }
    losses = {name: worker.ask("loss")["loss"] for name, worker in workers.items()}
    if abs(losses["rwkvpipe"] - losses["rwkv-trainer"]) > 1e-4:
        raise SystemExit(f"the losses differ, so there is nothing to compare: {losses}")
    for worker in workers.values():
        worker.ask("step")  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds[name].append(worker.ask("step")["cpu_seconds"])
    for worker in workers.values():
        worker.close()
    ratios = [ours / theirs for ours, theirs in zip(seconds["rwkvpipe"], seconds["rwkv-trainer"], strict=True)]
    return {
        "case": asdict(case),
        "loss": losses,
        "cpu_seconds": seconds,
        "ratio": median(ratios),
        "ratios": ratios,
        "machine": platform.processor() or platform.machine(),
        "torch": version("torch"),
    }


def table(found: dict) -> str:
    """The numbers for people."""
    case = found["case"]
    tokens = case["batch"] * case["ctx_len"]
    lines = [
        "a step of training, one thread, fp32: " + ", ".join(f"{name} {value}" for name, value in case.items()),
        f"{'':14} {'loss':>9} {'CPU s':>8} {'tokens/s':>9}",
    ]
    for name, seconds in found["cpu_seconds"].items():
        middle = median(seconds)
        lines.append(f"{name:14} {found['loss'][name]:9.6f} {middle:8.3f} {tokens / middle:9.0f}")
    low, high, turns = min(found["ratios"]), max(found["ratios"]), len(found["ratios"])
    lines.append(f"ours takes {found['ratio']:.4f} of the peer's time ({low:.4f} to {high:.4f} in {turns} turns)")
    return "\n".join(lines)
