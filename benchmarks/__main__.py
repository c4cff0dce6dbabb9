"""Measure rwkvpipe beside a peer, on the same weights and data, in turns.

python -m benchmarks train
"""

import argparse
import json
from pathlib import Path

from benchmarks import peers, train


def main() -> None:
    """Print a table and keep the numbers in a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["train"], help="train: one step of training")
    parser.add_argument("--peer-python", type=Path, help="a Python that has the peer; left out, one is set up")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for the numbers")
    given = parser.parse_args()
    python = given.peer_python or peers.set_up("rwkv-trainer")
    found = train.measure(python, given.out, given.rounds)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "train.json").write_text(json.dumps(found, indent=1) + "\n")
    print(train.table(found))


if __name__ == "__main__":
    main()
