"""What bf16 does to a training: held-out losses of the demo's first stage, cut short, from several seeds.

Each training is a run of the programs themselves, in fp32 and with products rounded to bf16: by our own kernel, or
where the processor has no product of bf16 in fp32, and by PyTorch with the processor's, whose results are rounded, too;
and with whole numbers of 12 bits in the place of bf16. The seed decides the weights to begin with and the order of the
rows; the corpus is the same.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import mean

from benchmarks.page import rows
from benchmarks.train import conditions

SEEDS = (1, 2, 3)
STEPS, EVERY, DOCUMENTS = 240, 40, 20000
TRAIN = {"steps": STEPS, "ctx_len": 128, "batch": 16, "lr": 8e-3, "lr_final": 1e-4, "schedule": "wsd", "decay": 0.4}
TRAIN |= {"weight_decay": 0.1, "log_every": EVERY, "valid_every": EVERY}
MODEL = {"n_layer": 2, "n_embd": 64, "head_size": 32}
WAYS = {
    "fp32": ("fp32", "torch"),
    "bf16": ("bf16", "bf16+own"),
    "bf16, results rounded": ("bf16", "bf16"),
    "whole numbers": ("bf16", "whole"),
}
START = """
import sys
from rwkvpipe import pretrain
from rwkvpipe.kernel import choice, product
choice.settle = lambda model, began=None, rounded=False: product.choose({name!r}) or {name!r}
product.SPREAD = 0  # whatever is to be rounded is
pretrain.main(sys.argv[1:])
"""


def run(*words: str | Path, **more: str) -> float:
    """CPU seconds of a program on one thread, with `more` in its environment."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RWKVPIPE_DEVICE": "cpu"} | more
    subprocess.run([sys.executable, *map(str, words)], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def corpus(folder: Path) -> None:
    """The demo's sums and their letters."""
    made = f"arithmetic.documents:42:{DOCUMENTS}"
    spec = {"synthetic": "arithmetic.documents", "count": DOCUMENTS, "tokenizer": "letters", "valid": 0.02}
    letters = json.dumps({"kind": "trie", "corpora": ["sums"]})
    run("-m", "rwkvpipe.vocab", "--spec", letters, "--synthetic", made, "--out", folder / "letters")
    words = ("--spec", json.dumps(spec), "--seed", "42", "--tokenizer", folder / "letters", "--out", folder / "sums")
    run("-m", "rwkvpipe.pack", *words)


def train(folder: Path, way: str, seed: int) -> dict:
    """Held-out losses of one training, and its CPU seconds."""
    precision, name = WAYS[way]
    room = folder / f"{seed}-{way.replace(', ', '-').replace(' ', '-')}"
    room.mkdir()
    asked = {"kind": "pretrain", "seed": seed, "model": MODEL, "train": TRAIN | {"precision": precision}}
    (room / "settings.json").write_text(json.dumps(asked))
    start, out = room / "init.safetensors", room / "model.safetensors"
    run("-m", "rwkvpipe.init", room / "settings.json", "--tokenizer", folder / "letters", "--out", start)
    words = (room / "settings.json", "--model", start, "--data", folder / "sums", "--micro-batch", "16", "--out", out)
    seconds = run("-c", START.format(name=name), *words)
    lines = [json.loads(line) for line in (room / "metrics.jsonl").read_text().splitlines()]
    return {"losses": [line["valid_loss"] for line in lines if "valid_loss" in line], "cpu_seconds": seconds}


def measure(folder: Path) -> dict:
    """Trainings from each seed, in each way."""
    corpus(folder)
    found = {way: [] for way in WAYS}
    for seed in SEEDS:
        for way in WAYS:
            found[way].append(train(folder, way, seed))
            print(seed, way, found[way][-1], flush=True)
    case = {**MODEL, **TRAIN, "documents": DOCUMENTS, "seeds": len(SEEDS)}
    return {"what": "precision", "case": case, "ways": found, **conditions()}


def table(found: dict) -> str:
    """The numbers for people: means over the seeds, and between which losses they lie."""
    ways, case = found["ways"], found["case"]
    body = []
    for number, step in enumerate(range(case["valid_every"], case["steps"] + 1, case["valid_every"])):
        losses = [[each["losses"][number] for each in ways[way]] for way in ways]
        body.append([str(step), *(f"{mean(some):.3f} ({min(some):.3f} to {max(some):.3f})" for some in losses)])
    body.append(["CPU s", *(f"{mean(each['cpu_seconds'] for each in ways[way]):.0f}" for way in ways)])
    return rows(["step", *ways], body).rstrip("\n")
