"""Measure rwkvpipe beside a peer on the same weights and data, or its families beside each other, in turns.

python -m benchmarks train
python -m benchmarks families
python -m benchmarks op [--operator wkv6]
python -m benchmarks decode [--size large] [--family rwkv6]
python -m benchmarks infer
python -m benchmarks same
python -m benchmarks tokenize [FILE ...]
python -m benchmarks pack [FILE ...]
python -m benchmarks bpe [FILE ...]
python -m benchmarks memory [--gigabytes 2] [FILE ...]
python -m benchmarks gpu
python -m benchmarks registers
python -m benchmarks page
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import (
    bpe,
    decode,
    families,
    gpu,
    infer,
    memory,
    op,
    pack,
    page,
    peers,
    registers,
    same,
    tables,
    tokenize,
    train,
)
from rwkvpipe.model.family import FAMILIES


def main() -> None:
    """Print a table and keep the numbers in a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    what = [
        "train",
        "op",
        "decode",
        "infer",
        "same",
        "families",
        "tokenize",
        "pack",
        "bpe",
        "memory",
        "gpu",
        "registers",
        "page",
    ]
    parser.add_argument("what", choices=what, help="a step of training; the operator; text to ids, and to files")
    parser.add_argument("files", nargs="*", type=Path, help="the text; left out, Python's library and papers")
    parser.add_argument("--peer-python", type=Path, help="a Python that has the peer; left out, one is set up")
    parser.add_argument("--gigabytes", type=float, default=2, help="memory: of input")
    parser.add_argument("--case", action="append", choices=memory.CASES, help="memory: only these")
    parser.add_argument("--operator", choices=op.OPERATORS, default="wkv7", help="op: which")
    parser.add_argument("--size", choices=["small", "large"], default="small", help="train, decode: of the model")
    parser.add_argument("--family", choices=FAMILIES, default="rwkv7", help="decode: of the model")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for the numbers")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.what == "page":
        page.write(given.out)
        return
    if given.what == "registers":
        found = registers.measure()
        registers.write(found)
        tables.write()
        print(registers.table(found))
        return
    if given.what == "tokenize":
        python = given.peer_python or peers.set_up("pyrwkv-tokenizer")
        found = tokenize.measure(python, given.out, given.rounds, given.files)
        print(tokenize.table(found))
    elif given.what == "gpu":
        if not torch.cuda.is_available():
            print("there is no NVIDIA GPU here, so there is nothing to measure", file=sys.stderr)
            sys.exit(2)
        found = gpu.measure(torch.cuda.get_device_name())
        print(gpu.table(found))
    elif given.what == "pack":
        python = given.peer_python or peers.set_up("rwkv")
        found = pack.measure(python, given.out, given.rounds, given.files)
        print(pack.table(found))
    elif given.what == "bpe":
        python = given.peer_python or peers.set_up("data")
        found = bpe.measure(dict.fromkeys(bpe.PEERS, python), given.out, given.rounds, given.files)
        print(bpe.table(found))
    elif given.what == "memory":
        found = memory.measure(given.out, given.gigabytes, given.files, given.case or list(memory.CASES))
        print(memory.table(found))
    elif given.what == "infer":
        python = given.peer_python or peers.set_up("rwkv")
        found = infer.measure(python, given.out, given.rounds)
        print(infer.table(found))
    elif given.what == "same":
        found = same.measure()
        print(same.table(found))
    elif given.what == "families":
        found = families.measure(given.rounds)
        print(families.table(found))
    elif given.what == "op":
        found = op.measure(given.operator, given.rounds)
        print(op.table(found))
    elif given.what == "decode":
        python = given.peer_python or peers.set_up("rwkv")
        found = decode.measure(python, given.out, given.rounds, replace(decode.CASES[given.size], family=given.family))
        print(decode.table(found))
    else:
        python = given.peer_python or peers.set_up("rwkv-trainer")
        found = train.measure(python, given.out, given.rounds, train.CASES[given.size])
        print(train.table(found))
    with open(given.out / f"{given.what}.jsonl", "a") as file:  # a line for each run
        file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
