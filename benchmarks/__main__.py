"""Measure rwkvpipe beside a peer on the same weights and data, or its families beside each other, in turns.

python -m benchmarks train [--size large]
python -m benchmarks tune [--size large]
python -m benchmarks families [--size large]
python -m benchmarks busy
python -m benchmarks precision
python -m benchmarks demo
python -m benchmarks perplexity MODEL TEXT
python -m benchmarks op [--operator wkv6]
python -m benchmarks product
python -m benchmarks decode [--size large] [--family rwkv6]
python -m benchmarks infer
python -m benchmarks same
python -m benchmarks tokenize [FILE ...]
python -m benchmarks pack [FILE ...]
python -m benchmarks bpe [FILE ...]
python -m benchmarks memory [--gigabytes 2] [FILE ...]
python -m benchmarks gpu
python -m benchmarks registers
python -m benchmarks counts
python -m benchmarks sanitize
python -m benchmarks page
"""

import argparse
import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import (
    bpe,
    busy,
    counts,
    decode,
    demo,
    families,
    gpu,
    infer,
    memory,
    op,
    pack,
    page,
    peers,
    perplexity,
    precision,
    product,
    registers,
    same,
    sanitize,
    tables,
    tokenize,
    train,
    tune,
)
from rwkvpipe.model.family import FAMILIES


def _python(given: Namespace, peer: str) -> Path:
    return given.peer_python or peers.set_up(peer)


def _gpu(given: Namespace) -> dict:
    clones = {"RWKV-LM": given.rwkv_lm, "Albatross": given.albatross}
    if given.dry:
        print(gpu.table(gpu.measure("dry", dry=True, clones=clones)))
        sys.exit(0)
    if not torch.cuda.is_available():
        print("there is no NVIDIA GPU here, so there is nothing to measure", file=sys.stderr)
        sys.exit(2)
    return gpu.measure(torch.cuda.get_device_name(), clones=clones)


def _perplexity(given: Namespace) -> dict:
    if len(given.files) != 2:
        raise SystemExit("perplexity: name the weights of a model of bytes, and a text")
    return perplexity.measure(*given.files)


def _decode(given: Namespace) -> dict:
    case = replace(decode.CASES[given.size], family=given.family)
    return decode.measure(_python(given, "rwkv"), given.out, given.rounds, case)


def _room(given: Namespace) -> Path:
    return Path(tempfile.mkdtemp(dir=given.out))


MEASURES: dict[str, Callable[[Namespace], dict]] = {
    "train": lambda g: train.measure(_python(g, "rwkv-trainer"), g.out, g.rounds, train.CASES[g.size]),
    "tune": lambda g: tune.measure(_python(g, "rwkvtune"), g.out, g.rounds, train.CASES[g.size]),
    "families": lambda g: families.measure(g.rounds, train.CASES[g.size]),
    "busy": lambda g: busy.measure(_python(g, "rwkv-trainer"), g.out, g.rounds, train.CASES[g.size]),
    "precision": lambda g: precision.measure(_room(g)),
    "demo": lambda g: demo.measure(_room(g), g.rounds),
    "perplexity": _perplexity,
    "op": lambda g: op.measure(g.operator, g.rounds),
    "product": lambda g: product.measure(g.rounds),
    "decode": _decode,
    "infer": lambda g: infer.measure(_python(g, "rwkv"), g.out, g.rounds),
    "same": lambda g: same.measure(),
    "tokenize": lambda g: tokenize.measure(_python(g, "pyrwkv-tokenizer"), g.out, g.rounds, g.files),
    "pack": lambda g: pack.measure(_python(g, "rwkv"), g.out, g.rounds, g.files),
    "bpe": lambda g: bpe.measure(dict.fromkeys(bpe.PEERS, _python(g, "data")), g.out, g.rounds, g.files),
    "memory": lambda g: memory.measure(g.out, g.gigabytes, g.files, g.case or list(memory.CASES)),
    "gpu": _gpu,
}

REPORTS = {"registers": registers, "counts": counts}


def main() -> None:
    """Print a table and keep the numbers in a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*MEASURES, *REPORTS, "sanitize", "page"], help="what is measured")
    parser.add_argument("files", nargs="*", type=Path, help="the text; left out, Python's library and papers")
    parser.add_argument("--peer-python", type=Path, help="a Python that has the peer; left out, one is set up")
    parser.add_argument("--gigabytes", type=float, default=2, help="memory: of input")
    parser.add_argument("--case", action="append", choices=memory.CASES, help="memory: only these")
    parser.add_argument("--operator", choices=op.OPERATORS, default="wkv7", help="op: which")
    what = "train, tune, families, busy, decode: of the model"
    parser.add_argument("--size", choices=["small", "large"], default="small", help=what)
    parser.add_argument("--family", choices=FAMILIES, default="rwkv7", help="decode: of the model")
    parser.add_argument("--dry", action="store_true", help="gpu: of tiny things on the processor; nothing is kept")
    parser.add_argument("--rwkv-lm", type=Path, help="gpu: a clone of RWKV-LM")
    parser.add_argument("--albatross", type=Path, help="gpu: a clone of Albatross")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for the numbers")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.what == "page":
        page.write(given.out)
    elif given.what == "sanitize":
        sys.exit(sanitize.run())
    elif given.what in REPORTS:
        report = REPORTS[given.what]
        found = report.measure()
        report.write(found)
        tables.write()
        print(report.table(found))
    else:
        found = MEASURES[given.what](given)
        print(getattr(sys.modules["benchmarks"], given.what).table(found))
        with open(given.out / f"{given.what}.jsonl", "a") as file:  # a line for each run
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
