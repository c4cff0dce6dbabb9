"""Killed at any moment, run again: the same bytes, every step once, nothing left behind.

One server process loads torch once and forks a process for each run. That counts the moments at which a kill may hurt
(files opened, renamed, removed; steps and rollouts begun and ended) and kills itself at one of them; other runs are
killed from outside after a random time.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WATCHED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")
EVENTS, TIMES = 6, 2  # kills of each case at a counted moment, and after a time


def serve() -> None:
    """Read runs from standard input, one JSON object a line, and answer each with how it ended."""
    import torch

    from rwkvpipe import bench, grpo, merge, pack, pretrain, sft  # noqa: F401
    from rwkvpipe.tasks import choice
    from rwkvpipe.train import dist, loop, rollout

    torch.set_num_threads(1)
    with torch.device("meta"):  # loads a good part of torch
        torch.nn.Linear(2, 2)(torch.zeros(2, 2))
    choice.BLOCK = 3
    rollout.reward = lambda name: lambda row, text: float(text.encode()[:1] > b"@")
    for line in sys.stdin:
        asked = json.loads(line)
        reader, writer = os.pipe()
        began, pid = time.monotonic(), os.fork()
        if not pid:
            dist.PARENT = os.getppid()  # as if it had started like any program
            play(asked, writer, loop, rollout)
        os.close(writer)
        if asked.get("after"):
            time.sleep(asked["after"])
            os.kill(pid, asked.get("signal", signal.SIGKILL))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        told = os.read(reader, 100).split()
        os.close(reader)
        answer = {"status": status, "seconds": time.monotonic() - began, "told": [float(word) for word in told]}
        print(json.dumps(answer), flush=True)


def play(asked: dict, writer: int, loop, rollout) -> None:
    """Be a verb; at moment number `asked["event"]` send a signal to itself. Tells moments and time after the signal."""
    from rwkvpipe.base.errors import run

    count, signalled, leave = 0, 0.0, os._exit

    def tick(*_) -> None:
        nonlocal count, signalled
        count += 1
        if count == asked.get("event"):
            signalled = time.monotonic()
            os.kill(os.getpid(), asked.get("signal", signal.SIGKILL))

    def ticked(function):
        def counted(*args, **kwargs):
            tick()
            try:
                return function(*args, **kwargs)
            finally:
                tick()

        return counted

    def end(status: int) -> None:
        os.write(writer, f"{count} {time.monotonic() - signalled}".encode())
        leave(status)

    os._exit = end
    loop._gradient = ticked(loop._gradient)
    rollout.Sampler.sample = ticked(rollout.Sampler.sample)
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [asked["verb"], *asked["words"]]
    sys.addaudithook(lambda event, _: tick() if event in WATCHED else None)
    run(sys.modules[f"rwkvpipe.{asked['verb']}"].main)


class Server:
    """The other end of `serve`."""

    def __init__(self):
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RWKVPIPE_DEVICE": "cpu"},
        )  # fmt: skip

    def run(self, verb: str, words: list, log: Path, **how) -> dict:
        """Status (negative: the signal), seconds, moments, and what it said."""
        asked = {"verb": verb, "words": [str(word) for word in words], "log": str(log), **how}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer | {"said": log.read_text()}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(20)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()


TRAIN = {"ctx_len": 16, "batch": 4, "lr": 0.01, "warmup": 1}
LORA = {"rank": 2, "full": ["ln1"]}
STAGES = {
    "pretrain": {"kind": "pretrain", "train": TRAIN | {"steps": 14, "log_every": 3, "valid_every": 7}},
    "sft": {"kind": "sft", "train": TRAIN | {"steps": 12, "ctx_len": 64, "log_every": 1}, "lora": LORA | {"dropout": 0.1}},
    "grpo": {
        "kind": "grpo",
        "train": TRAIN | {"steps": 6, "ctx_len": 40, "batch": 2, "log_every": 1},
        "rollout": {"samples": 4, "sampling": {"max_tokens": 5}},
        "prompt": "{question}=",
    },
}
STAGES["grpo_again"] = STAGES["grpo"] | {
    "lora": {"rank": 2},
    "rollout": {"samples": 4, "sampling": {"max_tokens": 5}, "iterations": 3, "beta": 0.1},
}
TALK = {"synthetic": "counting.chats", "count": 300, "tokenizer": "t", "format": "chat", "valid": 0.1}


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """What the runs read: weights, an adapter, corpora, questions, settings."""
    import torch

    from rwkvpipe import pack
    from rwkvpipe.base.config import LoraConfig, RwkvConfig
    from rwkvpipe.base.files import digest, write_json, write_jsonl
    from rwkvpipe.model.family import build
    from rwkvpipe.tokenizer.byte import ByteTokenizer
    from rwkvpipe.tokenizer.load import save_tokenizer
    from rwkvpipe.train.stage import write_adapter
    from rwkvpipe.weights import store
    from rwkvpipe.weights.lora import inject

    home = tmp_path_factory.mktemp("ground")
    model = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=257))
    model.initialise(0)
    with torch.no_grad():
        model.head.weight.mul_(0.3)
    store.write(home / "start.safetensors", model.config, model.state_dict())
    asked = LoraConfig(rank=2)
    inject(model, asked)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1)
    write_adapter(home / "adapter.safetensors", model, asked, base=digest(home / "start.safetensors"))
    save_tokenizer(home / "t", ByteTokenizer(1))
    for name, spec in {"talks": TALK, "texts": TALK | {"synthetic": "counting.documents", "format": "text"}}.items():
        pack.main(["--spec", json.dumps(spec), "--tokenizer", str(home / "t"), "--out", str(home / name)])
    rows = [{"question": f"{n}+{n * n}", "answer": str(n + 4), "options": ["2", "three", str(n + 4)]} for n in range(16)]
    write_jsonl(home / "q.jsonl", rows)
    for name, settings in STAGES.items():
        write_json(home / f"{name}.json", settings | {"seed": 5})
    return home


def words(ground: Path, case: str, out: Path) -> tuple[str, list]:
    """Verb and command line of a case whose results lie in `out`."""
    model = ["--model", ground / "start.safetensors"]
    if case in STAGES:
        result = out / ("adapter.safetensors" if "lora" in STAGES[case] else "model.safetensors")
        end = ["--micro-batch", 3, "--save-every", 3, "--out", result]
        kind = STAGES[case]["kind"]
        data = {"pretrain": ground / "texts", "sft": ground / "talks", "grpo": ground / "q.jsonl"}[kind]
        vocabulary = ["--tokenizer", ground / "t"] if kind == "grpo" else []
        return kind, [ground / f"{case}.json", *model, *vocabulary, "--data", data, *end]
    if case == "merge":
        return case, [*model, "--adapter", ground / "adapter.safetensors", "--out", out / "model.safetensors"]
    if case == "pack":
        return case, ["--spec", json.dumps(TALK), "--tokenizer", ground / "t", "--out", out / "corpus"]
    task = case.removeprefix("bench_")
    spec = {"task": task, "path": "q", "prompt": "{question}="}
    spec |= {"sampling": {"max_tokens": 6, "temperature": 1.0}} if task == "answer" else {}
    end = ["--questions", ground / "q.jsonl", "--rows", 4, "--out", out / "x.answers.jsonl"]
    return "bench", ["--spec", json.dumps(spec), *model, "--tokenizer", ground / "t", *end]


def harvest(out: Path) -> dict[str, object]:
    """Everything in a folder by name: bytes, and of metrics all but the times."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        if path.is_dir():
            continue
        found[str(path.relative_to(out))] = path.read_bytes()
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            timeless = [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]
            found[str(path.relative_to(out))] = timeless
    return found


CASES = [*STAGES, "merge", "pack", "bench_answer", "bench_choice"]


@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_moments_it_ends_in_the_same_bytes(server, ground, tmp_path, case):
    verb, line = words(ground, case, tmp_path / "whole")
    whole = server.run(verb, line, tmp_path / "log")
    assert whole["status"] == 0, whole["said"]
    wanted, moments = harvest(tmp_path / "whole"), int(whole["told"][0])
    lots = random.Random(case)
    # one in each of as many parts of the run, so that they are spread
    kills = [{"event": 1 + int((n + lots.random()) * moments / EVENTS)} for n in range(EVENTS)]
    kills += [{"after": 0.01 + lots.random() * whole["seconds"]} for _ in range(TIMES)]
    hit = 0
    for number, kill in enumerate(kills):
        out = tmp_path / str(number)
        verb, line = words(ground, case, out)
        first = server.run(verb, line, tmp_path / "log", **kill)
        hit += first["status"] == -signal.SIGKILL
        if number % 3 == 2:  # and once more on the way
            server.run(verb, line, tmp_path / "log", event=1 + int(lots.random() * moments))
        again = server.run(verb, line, tmp_path / "log")
        assert again["status"] == 0, (kill, again["said"])
        found = harvest(out)
        assert found.keys() == wanted.keys(), kill
        for name, value in wanted.items():
            assert found[name] == value, (kill, name)
    assert hit >= EVENTS - 1


if __name__ == "__main__":
    serve()
