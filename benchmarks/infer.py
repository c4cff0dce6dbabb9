"""Reading a prompt and writing on, on one thread: CPU time of ours and of the package rwkv, with the same weights.

The package has one row; ours is measured with one and with eight. Both take the likeliest token. Their logits after
the prompt are compared before anything is timed.
"""

import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from benchmarks.train import Worker
from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.model.family import build
from rwkvpipe.weights import store

ROWS = 8
KINDS = ("read", "write", "rows")


@dataclass(frozen=True)
class Case:
    """What reads and writes."""

    n_layer: int = 6
    n_embd: int = 512
    vocab_size: int = 65536
    prompt: int = 128
    tokens: int = 24


def prepare(case: Case, folder: Path) -> None:
    """Weights for both programs, and the prompt's ids."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build(RwkvConfig(n_layer=case.n_layer, n_embd=case.n_embd, vocab_size=case.vocab_size))
    model.initialise(0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # what starts at zero would hide a difference
        for tensor in model.parameters():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=draw))
    tensors = model.state_dict()
    store.write(folder / "model.safetensors", model.config, tensors)
    torch.save({name: value.squeeze() for name, value in tensors.items()}, folder / "model.pth")
    ids = torch.randint(1, case.vocab_size, (case.prompt,), generator=draw).tolist()
    (folder / "case.json").write_text(json.dumps(asdict(case) | {"ids": ids, "rows": ROWS}))


def measure(peer: Path, folder: Path, rounds: int) -> dict:
    """Tokens a CPU second, in turns. Raises SystemExit when the logits differ."""
    case, folder = Case(), folder / "infer"
    prepare(case, folder)
    workers = {
        "rwkvpipe": Worker(sys.executable, "infer_ours.py", folder),
        "rwkv": Worker(peer, "infer_rwkv.py", folder),
    }
    first = {name: worker.ask("logits")["logits"] for name, worker in workers.items()}
    apart = max(abs(a - b) for a, b in zip(first["rwkvpipe"], first["rwkv"], strict=True))
    if apart > 1e-3:
        raise SystemExit(f"the logits are {apart} apart, so there is nothing to compare")
    rates: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in workers}
    for turn in range(rounds + 1):
        for kind in KINDS:
            for name, worker in workers.items():
                if (kind, name) != ("rows", "rwkv"):
                    answer = worker.ask(kind)
                    if turn:  # the first warms up
                        rates[name][kind].append(answer["tokens"] / answer["cpu_seconds"])
    for worker in workers.values():
        worker.close()
    theirs = {"read": "read", "write": "write", "rows": "write"}
    pairs = {kind: zip(rates["rwkvpipe"][kind], rates["rwkv"][theirs[kind]], strict=True) for kind in KINDS}
    return {
        "case": asdict(case),
        "rates": rates,
        "ratios": {kind: [a / b for a, b in pairs[kind]] for kind in KINDS},
        "logits_apart": apart,
        "machine": platform.processor() or platform.machine(),
        "torch": version("torch"),
    }


def table(found: dict) -> str:
    """The numbers for people."""
    case = ", ".join(f"{name} {value}" for name, value in found["case"].items())
    lines = [f"tokens a CPU second, one thread, fp32: {case}; logits {found['logits_apart']:.1e} apart"]
    words = {"read": "reading a prompt", "write": "writing, one row", "rows": f"writing, {ROWS} rows"}
    for kind, what in words.items():
        ours, ratios = found["rates"]["rwkvpipe"][kind], found["ratios"][kind]
        theirs = found["rates"]["rwkv"]["write" if kind == "rows" else kind]
        lines.append(
            f"{what:17} ours {median(ours):9.1f}  rwkv {median(theirs):9.1f}"
            f"  {median(ratios):6.2f} times ({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} turns)"
        )
    return "\n".join(lines)
