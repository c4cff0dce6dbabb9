"""Reading a prompt and writing on, on one thread: CPU time of ours and of the package rwkv, with the same weights.

The package has one row; ours is measured with one and with eight. Both take the likeliest token; ours draws, too, with
cuts and penalties. Beside it stand the kernels alone, without the engine. Their logits after the prompt are compared
before anything is timed. How many steps refilled slots take, and how much memory, is measured beside what is computed.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.train import Worker, conditions
from rwkvpipe.base.config import RwkvConfig, SamplingConfig
from rwkvpipe.infer.engine import Engine
from rwkvpipe.model.family import build
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.weights import store

ROWS = 8
HELD = (1, 16)  # rows whose memory is measured
KINDS = ("read", "write", "rows", "drawn", "drawn rows", "kernel", "kernel rows")
PEERS = dict.fromkeys(KINDS[1:5], "write") | {"read": "read"}  # what of the peer's stands beside
ALONE = {"write": "kernel", "rows": "kernel rows", "drawn": "kernel", "drawn rows": "kernel rows"}
WORDS = {
    "read": "reading a prompt",
    "write": "writing, one row",
    "rows": f"writing, {ROWS} rows",
    "drawn": "drawing by lot, one row",
    "drawn rows": f"drawing by lot, {ROWS} rows",
}


@dataclass(frozen=True)
class Case:
    """What reads and writes."""

    n_layer: int = 6
    n_embd: int = 512
    vocab_size: int = 65536
    prompt: int = 128
    tokens: int = 40


def prepare(case: Case, folder: Path) -> None:
    """Weights for both programs, and the prompt's ids."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build(RwkvConfig(n_layer=case.n_layer, n_embd=case.n_embd, vocab_size=case.vocab_size))
    model.initialise(0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # what starts at zero would hide a difference
        for tensor in model.parameters():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=draw))
        model.head.weight.mul_(8)  # some ids are likelier by far than others, as in models that have learned
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
                if name == "rwkvpipe" or kind in ("read", "write"):
                    answer = worker.ask(kind)
                    if turn:  # the first warms up
                        rates[name][kind].append(answer["tokens"] / answer["cpu_seconds"])
    for worker in workers.values():
        worker.close()
    ours, theirs = rates["rwkvpipe"], rates["rwkv"]
    return {
        "what": "infer",
        "case": asdict(case),
        "rates": rates,
        "ratios": {kind: _ratios(ours[kind], theirs[other]) for kind, other in PEERS.items()},
        "shares": {kind: _ratios(ours[kind], ours[other]) for kind, other in ALONE.items()},
        "refilled": refilled(),
        "memory": {rows: held(folder, rows) for rows in HELD},
        "logits_apart": apart,
        **conditions(),
    }


def _ratios(ours: list[float], others: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, others, strict=True)]


def refilled() -> dict:
    """Steps for texts of ragged lengths, eight at a time, beside the least that there can be."""
    model = build(RwkvConfig(n_layer=2, n_embd=64, vocab_size=257))
    model.initialise(0)
    engine, slots = Engine(model.eval(), ByteTokenizer(1), ROWS), []
    made = engine.slots
    engine.slots = lambda *given: slots.append(made(*given)) or slots[-1]
    sampling = SamplingConfig(max_tokens=200, stop=("a", "b", "c"), seed=1)
    lengths = [len(one.ids) - 1 for one in engine.generate([f"prompt {n}" for n in range(200)], sampling)]
    return {
        "texts": len(lengths),
        "mean": sum(lengths) / len(lengths),
        "longest": max(lengths),
        "steps": slots[0].steps,
        "ideal": max(math.ceil(sum(lengths) / ROWS), max(lengths)),
        # as many at a time, and the next when the longest of them is over
        "waiting": sum(max(lengths[n : n + ROWS]) for n in range(0, len(lengths), ROWS)),
    }


def held(folder: Path, rows: int) -> dict:
    """Megabytes that so many rows take at most, as computed and as measured, while they read and draw."""
    worker = Worker(sys.executable, "infer_ours.py", folder)
    worker.ask("logits")
    told = worker.ask(f"hold {rows}")
    worker.close()
    return {"computed": told["bytes"] / 2**20, "measured": told["held"] / 2**20}


def table(found: dict) -> str:
    """The numbers for people."""
    case = found["case"]
    head = f"{case['n_layer']} layers of {case['n_embd']}, {case['vocab_size']:,} ids"
    lines = [
        f"| {head} | tokens a CPU second | times rwkv 0.8.32 | of the kernels alone |",
        "| --- | --- | --- | --- |",
    ]
    for kind, what in WORDS.items():
        rate, ratios = median(found["rates"]["rwkvpipe"][kind]), found["ratios"][kind]
        share = f"{100 * median(found['shares'][kind]):.0f} %" if kind in found["shares"] else ""
        said = f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        lines.append(f"| {what} | {rate:,.0f} | {said} | {share} |")
    steps = found["refilled"]
    lines += ["", f"| {steps['texts']} texts of {steps['mean']:.0f} tokens, the longest {steps['longest']} | steps |"]
    lines += ["| --- | --- |", f"| the least for {ROWS} rows | {steps['ideal']} |"]
    lines += [f"| slots refilled at once | {steps['steps']} |", f"| {ROWS} at a time | {steps['waiting']} |"]
    lines += ["", "| rows, prompts of 300 tokens | MB computed | MB measured |", "| --- | --- | --- |"]
    lines += [f"| {rows} | {one['computed']:.0f} | {one['measured']:.0f} |" for rows, one in found["memory"].items()]
    return "\n".join(lines)
