"""The whole workflow, run in other ways: with any number of cores, killed at random moments, the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "run": "k",
    "tokenizers": {"b": {"kind": "bytes"}},
    "corpora": {
        "sums": {"synthetic": "counting.documents", "count": 300, "valid": 0.1, "tokenizer": "b"},
        "talks": {"synthetic": "counting.chats", "count": 100, "tokenizer": "b", "format": "chat", "valid": 0.1},
    },
    "benchmarks": {"pick": {"task": "choice", "synthetic": "counting.exam", "limit": 12}},
    "checkpoints": {"every": 2},
    "stages": [
        {
            "name": "base",
            "kind": "pretrain",
            "data": "sums",
            "model": {"n_layer": 2, "n_embd": 64, "head_size": 32},
            "train": {"steps": 8, "ctx_len": 64, "batch": 8, "log_every": 1, "valid_every": 4},
        },
        {
            "name": "chat",
            "kind": "sft",
            "start": "base",
            "data": "talks",
            "lora": {"rank": 2},
            "train": {"steps": 4, "ctx_len": 64, "batch": 4, "log_every": 1},
            "bench": ["pick"],
        },
    ],
}
TARGETS = ["results/k/chat/bench/pick.json", "results/k/chat/model.safetensors"]


def start(folder: Path, cores: int) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(CONFIG))
    line = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--nocolor", "--cores", str(cores)]
    with open(folder / "said", "a") as said:
        return subprocess.Popen(
            [*line, "--", *TARGETS],
            cwd=folder, env={**os.environ, "RWKVPIPE_GPUS": ""}, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip


def harvest(folder: Path) -> dict[str, object]:
    """What a run has made, by name; logs say when and how, and rows of metrics how fast: that may differ."""
    found: dict[str, object] = {}
    for path in sorted(path for path in (folder / "results").rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [
                {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "memory_mb")} for row in rows
            ]
        elif not {"log", ".locks"} & set(path.parts):
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> dict[str, object]:
    """What one core makes."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, 1).wait(600) == 0, (folder / "said").read_text()
    return harvest(folder)


@pytest.mark.slow
def test_two_cores_make_what_one_makes_though_all_is_killed_on_the_way(wanted, tmp_path):
    lots, kills = random.Random(7), 0
    for _ in range(5):
        process = start(tmp_path, 2)
        try:
            process.wait(lots.uniform(2, 7))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # Snakemake and all its jobs
            process.wait()
            kills += 1
    # nothing but the same command: no lock to remove, nothing incomplete to name
    assert start(tmp_path, 2).wait(600) == 0, (tmp_path / "said").read_text()
    assert kills >= 2 and harvest(tmp_path) == wanted


@pytest.mark.slow
def test_eight_cores_make_what_one_makes(wanted, tmp_path):
    assert start(tmp_path, 8).wait(600) == 0, (tmp_path / "said").read_text()
    assert harvest(tmp_path) == wanted
