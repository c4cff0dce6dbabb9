"""The door to devices: who gets which, who waits, who is refused."""

import fcntl
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkvpipe import launch
from rwkvpipe.base.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
QUIET = [*launch.SCHEDULERS, "RWKVPIPE_GPUS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "RWKVPIPE_DEVICE"]


STEPS = """
from pathlib import Path
import numpy as np
for _ in range(4):
    held = [np.ones(1 << 18, np.float32) for _ in range(64)]
    del held
    print(Path("/proc/self/statm").read_text().split()[1])
"""


class Became(Exception):
    """Stands for the exec that does not return."""


@pytest.fixture
def door(monkeypatch, tmp_path):
    """Call launch; get the verb's command line and what its environment says about devices."""
    for name in (*QUIET, "GOMP_SPINCOUNT", "GLIBC_TUNABLES"):
        monkeypatch.setenv(name, "")  # so that it is put back after the test, whoever sets it
        monkeypatch.delenv(name)
    monkeypatch.setenv("RWKVPIPE_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setattr(launch, "_listed", lambda: [])
    seen = {}

    def become(program, words):
        seen["words"] = words
        raise Became

    monkeypatch.setattr(os, "execv", become)

    def call(*words):
        with pytest.raises(Became):
            launch.main(list(words))
        return seen["words"][1:], {name: os.environ[name] for name in QUIET if name in os.environ}

    return call


def test_no_device_hides_all_and_says_cpu(door, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    words, env = door("0", "sft", "s.json", "--micro-batch", "4")
    assert words == ["-m", "rwkvpipe.sft", "s.json", "--micro-batch", "4"]
    assert env == {"CUDA_VISIBLE_DEVICES": "", "RWKVPIPE_DEVICE": "cpu"}


def test_threads_wait_awake_only_briefly_unless_the_user_says_otherwise(door, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    door("0", "sft", "s.json")
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    door("0", "sft", "s.json")
    assert os.environ["GOMP_SPINCOUNT"] == launch.SPIN


def test_trainings_keep_the_pages_they_free_unless_the_user_says_otherwise(door, monkeypatch):
    door("0", "score", "s.json")
    assert "GLIBC_TUNABLES" not in os.environ
    door("0", "sft", "s.json")
    if platform.libc_ver()[0] == "glibc":
        done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
        assert int(done.stdout.split()[-1]) * os.sysconf("SC_PAGESIZE") > 1 << 26  # the 64 MB, and Python
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    door("0", "sft", "s.json")
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2"


def test_one_device_is_one_of_the_pool(door, monkeypatch):
    monkeypatch.setenv("RWKVPIPE_GPUS", "4,7")
    assert door("1", "sft", "s.json")[1]["CUDA_VISIBLE_DEVICES"] == "4"
    assert os.environ["RWKVPIPE_DEVICE"] == "cuda" and os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    # the first lease is held by this very process: the next job gets the other device
    assert door("1", "sft", "s.json")[1]["CUDA_VISIBLE_DEVICES"] == "7"


def test_the_pool_prefers_our_variable_then_cudas_then_the_driver(monkeypatch):
    for name in QUIET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "_listed", lambda: ["0", "1"])
    assert launch.pool() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,-1,0")
    assert launch.pool() == ["1"]
    monkeypatch.setenv("RWKVPIPE_GPUS", "GPU-abc, 3")
    assert launch.pool() == ["GPU-abc", "3"]
    monkeypatch.setenv("RWKVPIPE_GPUS", "")
    assert launch.pool() == []


def test_the_driver_lists_slices_instead_of_a_cut_card(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\ncat <<X\nGPU 0: NVIDIA H100 (UUID: GPU-1)\n  MIG 1g.10gb Device 0: (UUID: MIG-a)\n"
        "  MIG 1g.10gb Device 1: (UUID: MIG-b)\nGPU 1: NVIDIA H100 (UUID: GPU-2)\nX\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert launch._listed() == ["MIG-a", "MIG-b", "1"]
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert launch._listed() == []


def test_no_gpu_and_more_gpus_than_there_are_are_refused(door, monkeypatch):
    with pytest.raises(ConfigError, match="no GPU is visible"):
        launch.main(["1", "sft"])
    with pytest.raises(ConfigError, match="bench runs in one process"):
        launch.main(["2", "bench"])
    monkeypatch.setenv("RWKVPIPE_GPUS", "6")
    with pytest.raises(ConfigError, match="2 GPUs asked for, and here are 1; lower the resource gpu"):
        launch.main(["2", "sft"])
    with pytest.raises(ConfigError, match="no verb"):
        launch.main(["0", "sing"])


def test_a_scheduler_s_choice_stands(door, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    env = door("1", "grpo", "s.json")[1]
    assert env["CUDA_VISIBLE_DEVICES"] == "5" and env["RWKVPIPE_DEVICE"] == "cuda"


def test_the_verb_is_given_as_many_threads_as_its_rule_asks_for(door, monkeypatch):
    for name in launch.THREADS:
        monkeypatch.setenv(name, "1")
    words, _ = door("--threads", "3", "0", "settings", "--code", "off")
    assert words == ["-m", "rwkvpipe.settings", "--code", "off"]
    assert {os.environ[name] for name in launch.THREADS} == {"3"}


def test_the_result_is_locked_while_the_verb_runs(door, tmp_path):
    out = tmp_path / "stage/model.safetensors"
    door("0", "sft", "s.json", "--out", str(out))
    with open(out.parent / ".model.safetensors.lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # another result in the same folder is free
    door("0", "sft", "s.json", f"--out={out.parent / 'adapter.safetensors'}")


HOLD = """
import os, sys, time
from rwkvpipe import launch
os.execv = lambda program, words: (print(os.environ["CUDA_VISIBLE_DEVICES"], os.getpid(), flush=True), time.sleep({}))
launch.main(sys.argv[1:])
"""


def hold(seconds: float, *words: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD.format(seconds), *words],
        env={**os.environ, **env}, cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_killed_holder_frees_its_device_and_a_waiting_job_gets_it(tmp_path):
    env = {"RWKVPIPE_GPUS": "6", "RWKVPIPE_LOCKS": str(tmp_path)}
    first = hold(60, "1", "settings", **env)
    assert first.stdout.readline().split()[0] == "6"
    second = hold(0, "1", "settings", **env)
    time.sleep(0.5)
    assert second.poll() is None
    first.kill()
    first.wait()
    assert second.stdout.readline().split()[0] == "6"
    assert second.wait(120) == 0
    first.stdout.close()
    second.stdout.close()


def test_many_jobs_never_share_a_device(tmp_path):
    env = {"RWKVPIPE_GPUS": "0,1", "RWKVPIPE_LOCKS": str(tmp_path / "locks")}
    code = HOLD.replace("time.sleep({})", "mark()").replace(
        "launch.main",
        "def mark():\n"
        "    path = os.path.join(os.environ['RWKVPIPE_LOCKS'], 'in-use-' + os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "    os.mkdir(path); time.sleep(0.05); os.rmdir(path)\n"
        "launch.main",
    )
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, "1", "settings"], env={**os.environ, **env}, cwd=ROOT,
                         stdout=subprocess.DEVNULL)
        for _ in range(8)
    ]  # fmt: skip
    assert [job.wait(300) for job in jobs] == [0] * 8  # mkdir fails where two hold one device


def test_errors_are_one_line_with_status_2():
    env = {name: value for name, value in os.environ.items() if name not in QUIET}
    done = subprocess.run(
        [sys.executable, "-m", "rwkvpipe.launch", "1", "settings"],
        env={**env, "RWKVPIPE_GPUS": ""}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "no GPU is visible" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_verb_takes_over_with_its_status_and_arguments(tmp_path):
    words = ["0", "settings", "--spec", '{"kind":"pretrain","seed":1,"train":{"steps":3}}', "--out", "s.json"]
    done = subprocess.run(
        [sys.executable, "-m", "rwkvpipe.launch", *words],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "s.json").is_file() and "device: CPU" in done.stderr
