"""A token after a token, and reading 256, on one thread: CPU time of ours and of the package rwkv, at equal weights.

The peer takes one row at a time; eight of ours together stand beside eight calls of it. Logits are compared before
anything is timed.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from benchmarks.train import Worker, conditions
from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.model.family import build

WORST = 2e-5  # largest difference of logits, as a share of the largest logit
TRAINED = "trained"  # in fp32, with numbers of more digits than those of bf16, which released weights have
KEPT = ("fp32", TRAINED, "bf16", "int8")
FORMS = [(kind, rows) for rows in (1, 8) for kind in KEPT]


@dataclass(frozen=True)
class Case:
    """The sizes of a model, and how many tokens a turn has."""

    n_layer: int = 6
    n_embd: int = 256
    vocab_size: int = 1001
    tokens: int = 50
    family: str = "rwkv7"


CASES = {"small": Case(), "large": Case(12, 768, 65536, 8)}


def prepare(case: Case, folder: Path) -> None:
    """The same random weights, of bf16 as released ones are, for both programs, in their formats."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {"d_decay": 64, "d_aaa": 64, "d_mv": 32, "d_gate": 128} if case.family == "rwkv7" else {}
    sizes = {"n_layer": case.n_layer, "n_embd": case.n_embd, "vocab_size": case.vocab_size}
    model = build(RwkvConfig(family=case.family, **sizes, **ranks))
    draw, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in model.state_dict().items():
        scale = tensor.shape[-1] ** -0.5 if tensor.squeeze().dim() > 1 else 0.1
        drawn = torch.randn(tensor.shape, generator=draw) * scale + float("ln" in name and "weight" in name)
        tensors[name] = drawn.bfloat16().float()
    save_file(tensors, folder / "model.safetensors")
    for name in ("v0", "v1", "v2") if case.family == "rwkv7" else ():  # never used, but the peer wants them
        tensors[f"blocks.0.att.{name}"] = tensors[f"blocks.1.att.{name}"].clone()
    torch.save(tensors, folder / "model.pth")
    (folder / "family").write_text(case.family)


def measure(peer: Path, folder: Path, rounds: int, case: Case) -> dict:
    """Logits of both, then CPU seconds in turns. Raises SystemExit when the logits differ."""
    folder = folder / f"decode-{case.family}-{case.n_layer}x{case.n_embd}"
    prepare(case, folder)
    ours = Worker(sys.executable, "ours_decode.py", folder)
    theirs = Worker(peer, "rwkv_decode.py", folder)
    found, wanted = (worker.ask("logits")["logits"] for worker in (ours, theirs))
    error = max(abs(a - b) for a, b in zip(found, wanted, strict=True)) / max(map(abs, wanted))
    if error > WORST:
        raise SystemExit(f"the logits differ by {error:.1e}, so there is nothing to compare")
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        told = theirs.ask(f"step {case.tokens}") | {}
        seconds.setdefault("rwkv", []).append(told["cpu_seconds"] / case.tokens)
        for kind, rows in FORMS:
            told = ours.ask(f"step {case.tokens} {kind} {rows}")
            seconds.setdefault(f"{kind} x {rows}", []).append(told["cpu_seconds"] / case.tokens / rows)
        seconds.setdefault("rwkv reading", []).append(theirs.ask("read")["cpu_seconds"])
        for kind in KEPT:
            seconds.setdefault(f"{kind} reading", []).append(ours.ask(f"read {kind}")["cpu_seconds"])
    ours.close(), theirs.close()
    mine = [name for name in seconds if not name.startswith("rwkv")]
    pairs = {name: "rwkv reading" if name.endswith("reading") else "rwkv" for name in mine}
    ratios = {a: [t / o for t, o in zip(seconds[b], seconds[a], strict=True)] for a, b in pairs.items()}
    return {
        "what": "decode",
        "case": asdict(case),
        "error": error,
        "cpu_seconds": seconds,
        "ratio": {name: median(values) for name, values in ratios.items()},
        "ratios": ratios,
        **conditions(),
    }


def table(found: dict) -> str:
    """The numbers for people."""
    case = found["case"]
    head = f"{case['n_layer']} layers of {case['n_embd']}, {case['vocab_size']:,} ids"
    if (family := case.get("family", "rwkv7")) != "rwkv7":
        head = f"RWKV-{family[-1]}, {head}"
    lines = [
        f"| {head} | CPU ms | times as fast |",
        "| --- | --- | --- |",
    ]
    for name, seconds in found["cpu_seconds"].items():
        ratios = found["ratios"].get(name)
        said = f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})" if ratios else "1"
        what = "256 tokens read" if "reading" in name else "a token"
        name = name.removesuffix(" reading").replace(TRAINED, "fp32 as trained")
        who = "rwkv 0.8.32" if name == "rwkv" else f"ours, {name}" if name != "reading" else "ours"
        lines.append(f"| {who}: {what} | {1e3 * median(seconds):.2f} | {said} |")
    return "\n".join(lines)
