"""Processes that train together come to what one comes to, stop together and say in one line why."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkvpipe import dpo, grpo, pretrain, sft
from rwkvpipe.base.config import RolloutConfig, RwkvConfig, Settings
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.base.files import write_json, write_jsonl
from rwkvpipe.data.binidx import BinidxWriter
from rwkvpipe.model.family import build
from rwkvpipe.train import dist
from rwkvpipe.train.dist import Rank
from rwkvpipe.train.policy import Rollout, grpo_losses
from rwkvpipe.train.record import MEASURED
from rwkvpipe.weights import store

ROOT = Path(__file__).resolve().parents[2]
VERBS = {"pretrain": pretrain, "sft": sft, "dpo": dpo, "grpo": grpo}
TRAIN = {"ctx_len": 16, "batch": 5, "lr": 0.01, "warmup": 1, "log_every": 1}
STAGES = {
    "pretrain": {"kind": "pretrain", "train": TRAIN | {"steps": 3, "valid_every": 2, "chunk": 7}},
    "sft": {
        "kind": "sft",
        "train": TRAIN | {"steps": 4, "l2_wrap": 1e-4},
        "lora": {"rank": 2, "full": ["ln1"], "dropout": 0.2},
    },
    "grpo": {
        "kind": "grpo",
        "train": TRAIN | {"steps": 2, "batch": 3, "eps": 1e-4},  # above the rounding of sums in another order
        "rollout": {"samples": 3, "iterations": 2, "beta": 0.1, "sampling": {"max_tokens": 4}},
        "prompt": "{question}=",
    },
    "dpo": {"kind": "dpo", "train": TRAIN | {"steps": 3}, "lora": {"rank": 2, "full": ["ln1"]}},
}
FILES = {"dpo": "pairs.jsonl", "grpo": "questions.jsonl"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    stream = np.random.default_rng(0)
    (tmp_path / "corpus").mkdir()
    for part, count in (("train", 30), ("valid", 7)):
        with BinidxWriter(tmp_path / "corpus" / part, np.uint16) as writer:
            for _ in range(count):
                ids = stream.integers(1, 250, int(stream.integers(4, 15)))
                writer.add([*map(int, ids), 0], [0, 0, *[1] * (len(ids) - 1)])
    write_json(tmp_path / "corpus/corpus.json", {"vocab_size": 256})
    rows = [{"question": f"{n}+1", "answer": f"{n + 1}"} for n in range(5)]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    rows = [{"prompt": f"{n}=", "chosen": f"{n}" * (n + 1), "rejected": f"{n + 2}"} for n in range(7)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    model = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=256))
    model.initialise(0)
    store.write_tensors(tmp_path / "start.safetensors", model.state_dict())
    return tmp_path


def words(home, kind, name, state=False, spec=None, **train) -> list[str]:
    asked = STAGES[kind] | (spec or {}) | {"train": STAGES[kind]["train"] | train, "seed": 5}
    if kind == "grpo":  # a task that a new model never does would teach nothing
        judge = "def even(completion_ids):\n    return [sum(ids) % 5 for ids in completion_ids]\n"
        (home / "judge.py").write_text(judge)
        asked["rollout"] = asked["rollout"] | {"reward": f"{home}/judge.py:even"}
    asked |= {"state": True, "lora": None} if state else {}
    path = home / f"{kind}-{name}.json"
    write_json(path, Settings.model_validate(asked).model_dump(mode="json"))
    out = home / name / ("adapter.safetensors" if state or asked.get("lora") else "model.safetensors")
    data = home / FILES.get(kind, "corpus")
    words = [path, "--model", home / "start.safetensors", "--data", data, "--micro-batch", 2, "--out", out]
    return [str(word) for word in [*words, *(("--tokenizer", "bytes") if kind in FILES else ())]]


def start(count, kind, given, **env) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "rwkvpipe.launch", "--threads", str(count), "--ranks", str(count), "0", kind, *given],
        cwd=ROOT, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def result(given):
    out = Path(given[given.index("--out") + 1])
    rows = [json.loads(line) for line in (out.parent / "metrics.jsonl").read_text().splitlines()]
    return store.read_tensors(out)[0], rows


def same(given, wanted) -> None:
    tensors, rows = result(given)
    for name, value in wanted[0].items():
        assert (tensors[name] - value).abs().max() <= 1e-6, name
    for row, other in zip(rows, wanted[1], strict=True):
        for name in row.keys() - set(MEASURED):
            assert row[name] == pytest.approx(other[name], rel=1e-6, abs=2e-5), (row["step"], name)


def until(process, reached) -> None:
    end = time.monotonic() + 300
    while not reached():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)


def without_the_second(process) -> str:
    """What is said when the second process that trains is killed."""
    return without_one(process, 1)


def without_one(process, index) -> str:
    """What is said when one of the processes that train is killed."""
    below = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in below}
    os.kill(next(pid for pid, values in environments.items() if b"RANK=%d" % index in values), signal.SIGKILL)
    return process.communicate(timeout=300)[1]


@pytest.mark.parametrize(("kind", "count"), [("pretrain", 2), ("grpo", 2)])
def test_processes_together_end_where_one_ends(home, kind, count):
    alone, shared = words(home, kind, "alone"), words(home, kind, "shared")
    VERBS[kind].main(alone)
    process = start(count, kind, shared)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert said.count("device cpu, 2 processes") == 1  # one speaks for all
    same(shared, result(alone))


@pytest.mark.large
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_adapters_and_preferences_too(home, kind):
    test_processes_together_end_where_one_ends(home, kind, 2)


@pytest.mark.parametrize(("kind", "cut", "train"), [
    ("pretrain", "weights", {"valid_every": 1, "watch": {"best": True}}),
    pytest.param("pretrain", "weights", {"chunk": None, "valid_every": 2}, marks=pytest.mark.large),
    pytest.param("sft", "weights", {"valid_every": 1, "watch": {"best": True}}, marks=pytest.mark.large),
    pytest.param("sft", "gradients", {"chunk": 3, "bptt": "full", "valid_every": 2}, marks=pytest.mark.large),
    pytest.param("sft", "weights", {"chunk": 3, "rows": "packed"}, marks=pytest.mark.large),
    pytest.param("pretrain", "gradients", {"bptt": "full"}, marks=pytest.mark.large),
    pytest.param("pretrain", "gradients", {"chunk": None}, marks=pytest.mark.large),
])  # fmt: skip
def test_a_model_cut_among_processes_ends_where_a_whole_one_ends(home, kind, cut, train):
    alone, shared = words(home, kind, "alone", **train), words(home, kind, "shared", **train)
    VERBS[kind].main(alone)
    process = start(2, kind, [*shared, "--shard", cut, "--recompute"])
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    same(shared, result(alone))
    if "watch" in train:
        best = "best_adapter.safetensors" if kind == "sft" else "best.safetensors"
        found, wanted = (store.read_tensors(home / name / best)[0] for name in ("shared", "alone"))
        assert found.keys() == wanted.keys() and max((found[n] - wanted[n]).abs().max() for n in found) <= 1e-6


LORA = {"rank": 2, "full": ["ln1"]}
ASKED = STAGES["grpo"]["rollout"]


OFTEN = [
    ("grpo", "weights", {"rollout": ASKED | {"top_entropy": 0.5, "kl_equal": False, "entropy": 0.01}}),
    ("dpo", "weights", {}),
]
SELDOM = [
    ("grpo", "gradients", {"rollout": ASKED | {"sync": 1, "mixup": 0.5, "slices": 3, "loss": "bnpo"}}),
    ("grpo", "weights", {"lora": LORA, "rollout": ASKED | {"loss_mask": "hooks.py:weigh"}}),
    ("grpo", "gradients", {"lora": {"rank": 2, "quantise": "int8"}, "rollout": ASKED | {"mask_truncated": True}}),
    ("dpo", "gradients", {"lora": None}),
]
COMPARED = [pytest.param(*case, marks=pytest.mark.slow) for case in OFTEN]
COMPARED += [pytest.param(*case, marks=pytest.mark.large) for case in SELDOM]


@pytest.mark.parametrize(("kind", "cut", "spec"), COMPARED)
def test_models_that_are_compared_and_written_with_may_be_cut_too(home, kind, cut, spec):
    (home / "hooks.py").write_text("def weigh(completion_ids):\n    return (completion_ids % 3) * 0.5\n")
    if "rollout" in spec and "loss_mask" in spec["rollout"]:
        spec = spec | {"rollout": spec["rollout"] | {"loss_mask": f"{home}/hooks.py:weigh"}}
    alone, shared = words(home, kind, "alone", spec=spec, steps=4), words(home, kind, "shared", spec=spec, steps=4)
    VERBS[kind].main(alone)
    process = start(2, kind, [*shared, "--shard", cut])
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    same(shared, result(alone))


@pytest.mark.large
@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_initial_states_are_tuned_beside_a_model_that_is_cut(home, kind):
    stream, tensors = torch.Generator().manual_seed(1), store.read_tensors(home / "start.safetensors")[0]
    moved = {name: value + 0.05 * torch.randn(value.shape, generator=stream) for name, value in tensors.items()}
    store.write_tensors(home / "start.safetensors", moved)  # a new model's time mix gives nothing, so learns nothing
    alone, shared = words(home, kind, "alone", state=True, chunk=5), words(home, kind, "shared", state=True, chunk=5)
    VERBS[kind].main(alone)
    process = start(2, kind, [*shared, "--shard", "weights"])
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    same(shared, result(alone))
    assert all(name.endswith("time_state") and value.any() for name, value in result(shared)[0].items())


@pytest.mark.large
def test_a_cut_model_is_stopped_and_goes_on_on_another_number_of_processes(home):
    train = {"chunk": None, "steps": 40}
    alone, shared = words(home, "pretrain", "alone", **train), words(home, "pretrain", "shared", **train)
    pretrain.main(alone)
    process, log = start(2, "pretrain", [*shared, "--shard", "weights"]), home / "shared/checkpoints/log.jsonl"
    until(process, lambda: log.exists() and log.read_bytes().count(b"\n") > 3)
    process.terminate()
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 75, said
    shutil.copytree(home / "shared", home / "other")
    step = int(re.search(r"stopped after step (\d+) of 40", said)[1])
    process = start(2, "pretrain", [*shared, "--shard", "weights"])
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and f"going on after step {step} of 40" in said, said
    other = words(home, "pretrain", "other", **train)
    pretrain.main(other)  # alone, and whole
    for given in (shared, other):
        rows, wanted = result(given)[1], result(alone)[1]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in wanted], abs=1e-3)


MANY = {"pretrain": ["pretrain"], "sft": ["sft"], "dpo": ["dpo"], "grpo": ["grpo"]}
MANY |= {"pretrain, cut": ["pretrain", "--shard", "weights"], "sft, cut": ["sft", "--shard", "gradients"]}
MANY |= {"dpo, cut": ["dpo", "--shard", "gradients"], "grpo, cut": ["grpo", "--shard", "weights"]}


@pytest.mark.large
@pytest.mark.parametrize("name", MANY)
def test_of_two_processes_either_may_be_killed_at_any_moment(home, capsys, name):
    (kind, *more), lots = MANY[name], random.Random(name)
    end = ["--save-every", "2", *more]
    train = {"steps": 12 if kind == "grpo" else 60, "chunk": None, "log_every": 1, "valid_every": 0}
    whole = words(home, kind, "whole", **train) + end
    process = start(2, kind, whole)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    tensors, rows = result(whole)
    for victim in (0, 1):
        given, line = words(home, kind, f"cut{victim}", **train) + end, lots.randrange(2, train["steps"] - 4)
        process, log = start(2, kind, given), home / f"cut{victim}/checkpoints/log.jsonl"
        until(process, lambda log=log, line=line: log.exists() and log.read_bytes().count(b"\n") >= line)
        said = without_one(process, victim)
        assert process.returncode == 137 and "Traceback" not in said, said
        assert said.splitlines()[-1].startswith(f"error: process {victim + 1} of 2 was killed (SIGKILL), so all were")
        process = start(2, kind, given)
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0 and "going on after step" in said, said
        found, again = result(given)
        assert found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n]) for n in found)
        assert [{k: v for k, v in row.items() if k not in MEASURED} for row in again] == [
            {k: v for k, v in row.items() if k not in MEASURED} for row in rows
        ]
        with capsys.disabled():
            sys.stdout.write(f"| {name} | process {victim + 1} of 2 after line {line} | the same bits |\n")


@pytest.mark.large
def test_a_cut_model_stops_in_one_line_when_a_process_is_gone(home):
    given = words(home, "pretrain", "shared", chunk=None, steps=100_000)
    process, log = start(2, "pretrain", [*given, "--shard", "weights"]), home / "shared/checkpoints/log.jsonl"
    until(process, lambda: log.exists() and log.read_bytes().count(b"\n") > 3)
    said = without_the_second(process)
    assert process.returncode == 137 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("error: process 2 of 2 was killed (SIGKILL), so all were stopped")


@pytest.mark.slow
def test_a_stop_ends_all_after_the_same_step_and_what_follows_has_the_same_bits(home):
    whole, shared = words(home, "sft", "whole", steps=60), words(home, "sft", "shared", steps=60)
    process, log = start(2, "sft", shared), home / "shared/checkpoints/log.jsonl"
    until(process, lambda: log.exists() and log.read_bytes().count(b"\n") > 3)
    process.terminate()
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 75, said
    step = int(re.search(r"stopped after step (\d+) of 60", said)[1])
    assert step == len(log.read_text().splitlines())
    shutil.copytree(home / "shared", home / "other")
    for given in (shared, whole):
        process = start(2, "sft", given)
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
        assert (f"going on after step {step} of 60" in said) == (given is shared)
    tensors, rows = result(whole)
    again, found = result(shared)
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
    assert [row["loss"] for row in found] == [row["loss"] for row in rows]
    other = words(home, "sft", "other", steps=60)
    sft.main(other)  # alone it goes on as well
    assert [row["loss"] for row in result(other)[1]] == pytest.approx([row["loss"] for row in rows], abs=0.05)


def test_one_that_is_killed_ends_all_with_one_line_and_the_rest_goes_on(home):
    given = words(home, "sft", "shared", steps=100_000)
    process, log = start(2, "sft", [*given, "--save-every", "2"]), home / "shared/checkpoints/log.jsonl"
    until(process, lambda: log.exists() and log.read_bytes().count(b"\n") > 3)
    said = without_the_second(process)
    assert process.returncode == 137
    assert said.splitlines()[-1] == (
        "error: process 2 of 2 was killed (SIGKILL), so all were stopped; the same command goes on from the last"
        " resume point"
    )
    assert "Traceback" not in said
    assert list(log.parent.glob("step-*.json"))


def test_what_one_of_them_refuses_is_said_once(home):
    given = words(home, "sft", "shared")
    (home / "corpus/train.mask").unlink()
    process = start(2, "sft", given)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 2
    assert said.count("error:") == 1 and "Traceback" not in said


@pytest.mark.parametrize(("words", "line"), [
    (["2", "bench"], "bench runs in one process"),
    (["--ranks", "0", "0", "sft"], "--ranks: 0 processes"),
    (["--ranks", "3", "2", "sft"], "--ranks: 3 processes on 2 GPUs"),
])  # fmt: skip
def test_numbers_of_processes_that_cannot_be_are_refused(words, line):
    from rwkvpipe import launch

    with pytest.raises(ConfigError, match=line):
        launch.main(words)


def test_an_environment_at_odds_is_refused(monkeypatch):
    for count, index, line in (("2", "2", "RANK: 2 is not below"), ("x", "0", "WORLD_SIZE: 'x'")):
        monkeypatch.setenv("WORLD_SIZE", count)
        monkeypatch.setenv("RANK", index)
        with pytest.raises(ConfigError, match=line):
            dist.start()


@pytest.mark.parametrize("lockstep", [False, True])
def test_a_rollout_in_which_nothing_counts_makes_no_gradient(lockstep):
    model = build(RwkvConfig(n_layer=1, n_embd=32, head_size=16, vocab_size=20))
    nothing, first = torch.zeros(4, 3), torch.full((4,), 2)
    rollout = Rollout(torch.ones(4, 5, dtype=torch.long), first, nothing, torch.ones(4), nothing)
    losses = grpo_losses(RolloutConfig(), 2, rank=Rank(0, 2, torch.device("cpu"), lockstep=lockstep))
    assert list(losses(model, rollout)) == []  # gradients of 0 would let the moments go on moving weights


def test_rows_are_shared_out_and_none_is_left():
    for rows in range(1, 20):
        for micro_batch in (1, 3, 8):
            for count in (1, 2, 3, 8):
                parts = [list(Rank(n, count, torch.device("cpu")).mine(rows, micro_batch)) for n in range(count)]
                found = sorted(row for part in parts for cut in part for row in range(cut.start, cut.stop))
                assert found == list(range(rows))
                assert all(cut.stop - cut.start <= micro_batch for part in parts for cut in part)
                assert rows < count or all(len(part) > 0 for part in parts[: -(-rows // (-(-rows // count)))])
                ranks = [Rank(n, count, torch.device("cpu"), lockstep=True) for n in range(count)]
                even = [list(rank.mine(rows, micro_batch)) for rank in ranks]
                assert len({len(part) for part in even}) == 1
                assert [[cut for cut in part if cut.start < cut.stop] for part in even] == parts
