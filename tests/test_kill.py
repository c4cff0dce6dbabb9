"""Killed at any moment, run again: the same bytes, every step once, nothing left behind.

One server process loads torch once and forks a process for each run. That counts the moments at which a kill may hurt
(files opened, renamed, removed; steps and rollouts begun and ended) and kills itself at one of them; other runs are
killed from outside after a random time.
"""

import ctypes
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("seconds", "tokens_per_second", "memory_mb")  # what no two runs have alike
WATCHED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")
EVENTS, TIMES = 6, 2  # kills of each case at a counted moment, and after a time


def serve() -> None:
    """Read runs from standard input, one JSON object a line, and answer each with how it ended."""
    import torch

    from rwkvpipe import bench, dpo, generate, grpo, merge, pack, pretrain, sft  # noqa: F401
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
        second = os.fork() if pid and "beside" in asked else None
        if not pid or second == 0:
            asked["log"] = asked["beside"] if second == 0 else asked["log"]
            dist.PARENT = os.getppid()  # as if it had started like any program
            play(asked, writer, loop, rollout)
        os.close(writer)
        if asked.get("after"):
            time.sleep(asked["after"])
            os.kill(pid, asked.get("signal", signal.SIGKILL))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if second:
            status = status or os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
        told = os.read(reader, 100).split()
        os.close(reader)
        answer = {"status": status, "seconds": time.monotonic() - began, "told": [float(word) for word in told]}
        print(json.dumps(answer), flush=True)


def play(asked: dict, writer: int, loop, rollout) -> None:
    """Be a verb; at the moments `asked["events"]` meet what is asked. Tells moments and seconds after them."""
    from rwkvpipe.base.errors import run

    count, signalled, leave, busy = 0, 0.0, os._exit, False

    def tick(*_) -> None:
        nonlocal count, signalled, busy
        if busy:
            return
        count += 1
        if count in asked.get("events", ()):
            signalled = signalled or time.monotonic()
            if "vanish" in asked:
                busy = True
                shutil.rmtree(asked["vanish"], ignore_errors=True)
                busy = False
            else:
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
    if "limit" in asked:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["limit"], resource.RLIM_INFINITY))
    if asked.get("humble"):  # rights of files count for root too
        call = ctypes.CDLL(None).capset
        call((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
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
        self.process.wait(120)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()


TRAIN = {"ctx_len": 16, "batch": 4, "lr": 0.01, "warmup": 1}
LORA = {"rank": 2, "full": ["ln1"]}
STAGES = {
    "pretrain": {"kind": "pretrain", "train": TRAIN | {"steps": 14, "log_every": 3, "valid_every": 7}},
    "sft": {
        "kind": "sft",
        "train": TRAIN | {"steps": 12, "ctx_len": 64, "log_every": 1},
        "lora": LORA | {"kind": "dora", "dropout": 0.1},
    },
    "grpo": {
        "kind": "grpo",
        "train": TRAIN | {"steps": 6, "ctx_len": 40, "batch": 2, "log_every": 1},
        "rollout": {"samples": 4, "sampling": {"max_tokens": 5}},
        "prompt": "{question}=",
    },
}
STAGES["grpo_again"] = STAGES["grpo"] | {
    "lora": {"rank": 2, "kind": "pissa"},
    "rollout": {"samples": 4, "sampling": {"max_tokens": 5}, "iterations": 3, "beta": 0.1},
}
STAGES["dpo"] = {
    "kind": "dpo",
    "train": TRAIN | {"steps": 8, "ctx_len": 40, "batch": 3, "log_every": 1},
    "state": True,
}
ADAPTERS = {
    "whole": {},
    "lora": {"lora": LORA},
    "pissa": {"lora": LORA | {"kind": "pissa"}},
    "dora": {"lora": LORA | {"kind": "dora"}},
    "disha": {"lora": LORA | {"kind": "disha"}},
    "int8": {"lora": LORA | {"quantise": "int8"}},
    "nf4": {"lora": LORA | {"quantise": "nf4"}},
    "state": {"state": True},
}
SHORT = {"pretrain": 6, "sft": 5, "dpo": 4, "grpo": 3}
LEARNING = {
    "plain": {},
    "best": {"valid_every": 2, "watch": {"best": True}},
    "chunks": {"chunk": 5, "bptt": "full"},
    "packed": {"rows": "packed"},
}
# every kind of stage with every kind of adapter, and every way to read rows; only `make large` kills them
EVERY = {
    f"{kind} {name}": {key: value for key, value in STAGES[kind].items() if key not in ("lora", "state")}
    | {"train": STAGES[kind]["train"] | {"steps": steps, "log_every": 1, "valid_every": 0}}
    | adapter
    for kind, steps in SHORT.items()
    for name, adapter in ADAPTERS.items()
}
EVERY |= {
    f"{kind} {name}": EVERY[f"{kind} lora"] | {"train": EVERY[f"{kind} lora"]["train"] | train}
    for kind in ("pretrain", "sft")
    for name, train in LEARNING.items()
    if train
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
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.head.weight.mul_(0.3)
        for value in model.parameters():  # a new model's matrices of zeros hide whole adapters
            value.add_(0.05 * torch.randn(value.shape, generator=stream))
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
    rows = [{"question": f"{n}+{n * n}", "answer": str(n + 4), "options": ["two", str(n + 4)]} for n in range(16)]
    write_jsonl(home / "q.jsonl", rows)
    pairs = [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": str(3 * n + 1)} for n in range(9)]
    write_jsonl(home / "pairs.jsonl", pairs)
    for name, settings in (STAGES | EVERY).items():
        write_json(home / f"{name}.json", settings | {"seed": 5})
    return home


def words(ground: Path, case: str, out: Path) -> tuple[str, list]:
    """Verb and command line of a case whose results lie in `out`."""
    model = ["--model", ground / "start.safetensors"]
    if asked := (STAGES | EVERY).get(case):
        apart = "lora" in asked or "state" in asked
        result = out / ("adapter.safetensors" if apart else "model.safetensors")
        end = ["--micro-batch", 3, "--save-every", 3 if case in STAGES else 1, "--out", result]
        kind = asked["kind"]
        data = {"pretrain": ground / "texts", "sft": ground / "talks", "grpo": ground / "q.jsonl"}
        data = (data | {"dpo": ground / "pairs.jsonl"})[kind]
        vocabulary = ["--tokenizer", ground / "t"] if kind in ("grpo", "dpo") else []
        return kind, [ground / f"{case}.json", *model, *vocabulary, "--data", data, *end]
    if case == "merge":
        return case, [*model, "--adapter", ground / "adapter.safetensors", "--out", out / "model.safetensors"]
    if case == "pack":
        return case, ["--spec", json.dumps(TALK), "--tokenizer", ground / "t", "--out", out / "corpus"]
    if case == "generate":
        spec = {"prompts": [f"{n}+{n}=" for n in range(40)], "sampling": {"max_tokens": 6, "temperature": 1.0}}
        return case, ["--spec", json.dumps(spec), *model, "--tokenizer", ground / "t", "--out", out / "samples.jsonl"]
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
            timeless = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
            found[str(path.relative_to(out))] = timeless
    return found


KILLED = [*STAGES, "merge", "pack", "bench_answer", "bench_choice", "generate"]
CASES = [name for name in KILLED if name not in ("dpo", "generate")]  # the others stand for them


class Case:
    """One case of CASES: its undisturbed run, and runs that are disturbed."""

    def __init__(self, server: Server, ground: Path, folder: Path, name: str):
        self.server, self.ground, self.folder, self.name = server, ground, folder, name
        whole = self.run(folder / "whole")
        assert whole["status"] == 0, whole["said"]
        self.wanted, self.moments, self.seconds = harvest(folder / "whole"), int(whole["told"][0]), whole["seconds"]
        self.lots = random.Random(name)

    def run(self, out: Path, *more: object, **how) -> dict:
        verb, given = words(self.ground, self.name, out)
        return self.server.run(verb, [*given, *more], self.folder / "log", **how)

    def moment(self, part: int = 0, parts: int = 1) -> int:
        """A random moment within one of `parts` equal parts of the run."""
        return 1 + int((part + self.lots.random()) * self.moments / parts)

    def same(self, out: Path, what: object) -> str:
        """Run to the end; everything is as if nothing had happened. Returns what that run said."""
        again = self.run(out)
        assert again["status"] == 0, (what, again["said"])
        found = harvest(out)
        assert found.keys() == self.wanted.keys(), what
        for name, value in self.wanted.items():
            assert found[name] == value, (what, name)
        return again["said"]


@pytest.fixture(scope="module")
def cases(server, ground, tmp_path_factory):
    """The cases by name, each begun when it is first asked for."""
    known: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in known:
            known[name] = Case(server, ground, tmp_path_factory.mktemp(name), name)
        return known[name]

    return get


def error(said: str) -> str:
    """The one line that says what is wrong; what came before it are events, which begin with the time."""
    lines = said.splitlines()
    assert lines and lines[-1].startswith("error: "), said
    assert all(line[:9].count(":") == 2 for line in lines[:-1]), said
    return lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_at_random_moments_it_ends_in_the_same_bytes(cases, tmp_path, name):
    case, hit = cases(name), 0
    # one in each of as many parts of the run, so that they are spread
    kills = [{"events": [case.moment(part, EVENTS)]} for part in range(EVENTS)]
    kills += [{"after": 0.01 + case.lots.random() * case.seconds} for _ in range(TIMES)]
    for number, kill in enumerate(kills):
        out = tmp_path / str(number)
        hit += case.run(out, **kill)["status"] == -signal.SIGKILL
        if number % 3 == 2:  # and once more on the way
            case.run(out, events=[case.moment()])
        case.same(out, kill)
    assert hit >= EVENTS - 1


@pytest.mark.large
@pytest.mark.parametrize("name", EVERY)
def test_every_kind_of_stage_and_adapter_killed_ends_in_the_same_bytes(cases, tmp_path, capsys, name):
    case = cases(name)
    for part in range(3):
        moment = case.moment(part, 3)
        killed = case.run(tmp_path / f"{part}", events=[moment])
        assert killed["status"] == -signal.SIGKILL, killed["said"]
        case.same(tmp_path / f"{part}", moment)
        with capsys.disabled():
            sys.stdout.write(f"| {name} | {moment} of {case.moments} | {len(case.wanted)} files, the same bytes |\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
@pytest.mark.parametrize("name", ["pretrain", "grpo_again", "bench_answer", "pack"])
def test_told_to_stop_it_ends_soon_and_keeps_all(cases, tmp_path, name, number):
    case = cases(name)
    first = case.moment(int(number) % 3, 3)
    # whoever presses the keys again while it saves loses nothing
    stopped = case.run(tmp_path / "a", events=[first, first + 2, first + 4, first + 6], signal=number)
    if stopped["status"] == 0:  # there was nothing left to stop
        assert harvest(tmp_path / "a") == case.wanted
        return
    assert stopped["status"] == 75, stopped["said"]
    assert stopped["told"][1] < 5 and "Traceback" not in stopped["said"]
    said = case.same(tmp_path / "a", first)
    if found := re.search(r"stopped after step (\d+) of", stopped["said"]):
        assert found[1] == "0" or f"going on after step {found[1]} of" in said
    elif "step 1/" in stopped["said"]:  # while it wrote what it had learned
        steps = STAGES[name]["train"]["steps"]
        assert f"going on after step {steps} of {steps}" in said


def killed_between_points(case, folder: Path) -> tuple[Path, list[Path]]:
    """A run that was killed late, while no resume point was being written: its folder, and two points or more."""
    for percent in range(85, 30, -5):
        out = folder / f"{percent}"
        assert case.run(out, events=[percent * case.moments // 100])["status"] == -signal.SIGKILL
        points = sorted((out / "checkpoints").glob("step-*.safetensors"))
        whole = [point for point in points if point.with_suffix(".json").exists()]
        if len(whole) > 1 and whole == points:
            return out, points
    raise AssertionError("there never were two points")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "card"])
def test_a_damaged_newest_point_falls_back_to_the_one_before_and_says_so(cases, tmp_path, damage):
    case = cases("pretrain")
    out, points = killed_between_points(case, tmp_path)
    newest, raw = points[-1], bytearray(points[-1].read_bytes())
    raw[len(raw) // 2] ^= 4
    if damage == "gone":
        newest.unlink()
    elif damage == "card":
        card = newest.with_suffix(".json")
        card.write_text(card.read_text().replace('"step": ', '"step": 1', 1))
    else:
        newest.write_bytes({"flip": bytes(raw), "cut": raw[: len(raw) // 2], "empty": b""}[damage])
    said = case.same(out, damage)
    assert "damaged" in said and f"resume point {newest.stem} is removed" in said
    assert f"going on after step {int(points[-2].stem[5:])} of" in said


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_points_are_kept_as_asked_for_and_each_of_them_serves(cases, tmp_path, keep):
    case = cases("pretrain")
    stopped = case.run(tmp_path, "--keep", keep, events=[int(0.85 * case.moments)], signal=signal.SIGTERM)
    assert stopped["status"] == 75, stopped["said"]
    points = sorted((tmp_path / "checkpoints").glob("step-*.safetensors"))
    assert len(points) == keep and len({*(tmp_path / "checkpoints").glob("step-*.json")}) == keep
    for point in points[1:]:
        point.write_bytes(point.read_bytes()[:100])
    said = case.same(tmp_path, keep)
    assert said.count("is removed; going back") == keep - 1
    assert f"going on after step {int(points[0].stem[5:])} of" in said


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[bool]:
    """A file system of that size at `folder`; False where none may be mounted."""
    folder.mkdir()
    call = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "rwkvpipe-test", str(folder)]
    mounted = os.geteuid() == 0 and shutil.which("mount") and not subprocess.run(call, capture_output=True).returncode
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.parametrize("name", CASES)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(cases, tmp_path, name):
    case, full = cases(name), 0
    largest = sum(len(value) for value in case.wanted.values() if isinstance(value, bytes)) // 1024
    for number in range(3):
        size = max(8, int(largest * case.lots.uniform(0.1, 1.4)))
        with small_disk(tmp_path / f"{number}", size) as mounted:
            out = tmp_path / f"{number}" / "out"
            how = {} if mounted else {"limit": 1024 * size}
            ended = case.run(out, **how)
            if ended["status"]:
                full += 1
                assert ended["status"] == 2, ended["said"]
                assert "make room" in error(ended["said"]) or "ulimit" in error(ended["said"])
                assert str(out) in error(ended["said"]) and not list(out.rglob(".*.new-*"))
            if mounted:
                remount(tmp_path / f"{number}", "size=64m")
            case.same(out, size)
    assert full


@pytest.mark.parametrize("name", ["pretrain", "grpo", "bench_choice", "pack", "merge"])
def test_a_place_that_may_not_be_written_is_one_line(cases, tmp_path, name):
    case = cases(name)
    (tmp_path / "out").mkdir(mode=0o555)
    refused = case.run(tmp_path / "out", humble=True)
    assert refused["status"] == 2 and "Permission denied; mend its rights" in error(refused["said"])
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out").chmod(0o755)
    case.same(tmp_path / "out", "rights")


@pytest.mark.parametrize("name", ["pretrain", "grpo", "bench_choice", "merge"])
def test_a_file_that_may_not_be_read_is_one_line(cases, ground, tmp_path, name):
    file = ground / ("texts/train.bin" if name == "pretrain" else "q.jsonl" if name != "merge" else "start.safetensors")
    file.chmod(0)
    refused = cases(name).run(tmp_path / "out", humble=True)
    file.chmod(0o644)
    assert refused["status"] == 2 and f"{file}: " in error(refused["said"]), refused["said"]


def test_a_resume_point_that_may_not_be_read_is_not_thrown_away(cases, tmp_path):
    case = cases("pretrain")
    out, (*_, newest) = killed_between_points(case, tmp_path)
    newest.chmod(0)
    refused = case.run(out, humble=True)
    assert refused["status"] == 2 and str(newest) in error(refused["said"])
    newest.chmod(0o644)
    assert f"going on after step {int(newest.stem[5:])} of" in case.same(out, "rights")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_vanishes_is_one_line_and_the_rerun_makes_all(cases, tmp_path, name):
    case = cases(name)
    for part in range(4):
        out = tmp_path / f"{part}"
        ended = case.run(out, events=[case.moment(part, 4)], vanish=str(out))
        if ended["status"]:
            assert ended["status"] == 2, ended["said"]
            assert str(out) in error(ended["said"])
        case.same(out, part)


@pytest.mark.parametrize("name", ["pretrain", "grpo_again", "pack", "merge", "bench_answer"])
def test_of_two_on_one_result_the_second_waits(cases, tmp_path, name):
    case = cases(name)
    both = case.run(tmp_path / "out", beside=str(tmp_path / "beside"))
    said = both["said"] + (tmp_path / "beside").read_text()
    assert both["status"] == 0, said
    assert "is in work (held by process" in said
    assert harvest(tmp_path / "out") == case.wanted


STEPS = 400  # seconds of work, so that a signal finds it at work
CONFIG = {
    "run": "k",
    "tokenizers": {"b": {"kind": "bytes"}},
    "corpora": {"sums": {"synthetic": "counting.documents", "count": 300, "valid": 0.1, "tokenizer": "b"}},
    "checkpoints": {"every": 5},
    "stages": [
        {
            "name": "base",
            "kind": "pretrain",
            "data": "sums",
            "model": {"n_layer": 2, "n_embd": 64, "head_size": 32},
            "train": {"steps": STEPS, "ctx_len": 32, "batch": 8, "log_every": 1},
        }
    ],
}


def heard() -> None:
    """Ctrl-C counts, also where these tests were started in the background, by a shell that has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Workflow:
    """Snakemake on a run of one stage, in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder, self.stage, self.target = folder, folder / "results/k/base", "results/k/base/model.safetensors"
        self.log = self.stage / "log/pretrain.log"
        (folder / "config.yaml").write_text(json.dumps(CONFIG))

    def call(self, *words: str) -> subprocess.Popen:
        line = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--nocolor"]
        line += ["--cores", "1", "--set-threads", "pretrain=1", "--", *words]
        env = {**os.environ, "RWKVPIPE_GPUS": "", "GOMP_SPINCOUNT": "0"}
        with open(self.folder / "said", "w") as said:
            return subprocess.Popen(
                line, cwd=self.folder, env=env, stdout=said, stderr=said, start_new_session=True,
                preexec_fn=heard,
            )  # fmt: skip

    def at_work(self) -> subprocess.Popen:
        """Start, and wait until some more steps are made."""
        before, process = self.step(), self.call(self.target)
        self.until(process, lambda: self.step() >= before + 10)
        return process

    def hold(self) -> int:
        """Stop the trainer for now: what follows finds it at work, however fast it is and however slow the rest."""
        trainer = int((self.stage / ".model.safetensors.lock").read_text())
        os.kill(trainer, signal.SIGSTOP)
        # one that waits for a disk stops later, and would hear what was sent meanwhile
        while "\nState:\tT" not in Path(f"/proc/{trainer}/status").read_text():
            time.sleep(0.01)
        return trainer

    def step(self) -> int:
        path = self.stage / "checkpoints/log.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def until(self, process: subprocess.Popen, reached) -> None:
        end = time.monotonic() + 300
        while not reached():
            assert process.poll() is None and time.monotonic() < end, (self.folder / "said").read_text()
            time.sleep(0.05)


def told(process: int, number: int) -> bool:
    """Whether a signal waits for a process to go on."""
    waiting = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{process}/status").read_text(), re.M)[1]
    return bool(int(waiting, 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_snakemake_stopped_or_killed_alone_costs_nothing(server, tmp_path):
    flow = Workflow(tmp_path)
    for number in (signal.SIGTERM, signal.SIGINT):
        process = flow.at_work()
        trainer = flow.hold()
        process.send_signal(number)  # to Snakemake alone; it would wait for its jobs
        flow.until(process, lambda trainer=trainer: told(trainer, signal.SIGTERM))
        began = time.monotonic()
        os.kill(trainer, signal.SIGCONT)
        assert process.wait(60) and time.monotonic() - began < 40
        assert re.search(rf"stopped after step \d+ of {STEPS}", flow.log.read_text())
    process = flow.at_work()
    trainer = flow.hold()
    process.kill()  # the trainer lives on
    process.wait()
    process, made = flow.call(flow.target), flow.step()  # no lock is left behind that somebody had to remove
    flow.until(process, lambda: flow.log.is_file() and f"held by process {trainer}" in flow.log.read_text())
    time.sleep(0.5)
    assert flow.step() == made  # nobody else works on the stage
    os.kill(trainer, signal.SIGCONT)
    assert process.wait(300) == 0, (tmp_path / "said").read_text()
    assert f"going on after step {STEPS} of {STEPS}" in flow.log.read_text()  # nothing was trained twice
    rows = [json.loads(line)["step"] for line in (flow.stage / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, STEPS + 1))
    given = [flow.stage / "settings.json", "--model", flow.stage / "init.safetensors", "--save-every", 500]
    given += ["--data", tmp_path / "results/shared/corpora/sums", "--out", tmp_path / "whole/model.safetensors"]
    whole = server.run("pretrain", given, tmp_path / "log")
    assert whole["status"] == 0, whole["said"]
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / flow.target).read_bytes()


if __name__ == "__main__":
    serve()
