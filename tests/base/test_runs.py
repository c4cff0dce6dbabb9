"""Runs beside each other: who makes, who reads, who waits, and that a waiting run can be stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkvpipe.base import pace, runs
from rwkvpipe.base.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
BEGIN = """
import sys, time
from rwkvpipe.base import runs
claims = runs.Claims(runs.Path(sys.argv[1]))
say = lambda line: print(line, flush=True)
made = {name: [] for name in sys.argv[4].split()}
say(runs.begin(claims, sys.argv[2], {name: [] for name in sys.argv[3].split()}, made, say))
time.sleep(60)
"""


def begun(folder: Path, run: str, used: str, made: str = "") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN, str(folder), run, used, made], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture
def claims(tmp_path):
    """Of this process, as of one run."""
    found = runs.Claims(tmp_path)
    yield found
    for name in list(found.held):
        found.drop(name)


def test_what_one_makes_others_read_when_it_is_made(claims, tmp_path):
    assert runs.begin(claims, "a", {"x": [], "y": []}, {"x": []}, print)
    other = runs.Claims(tmp_path)
    assert other.begin(["y"], []) is None  # both read
    assert other.begin(["x", "y"], []) == "x" and not [name for name in other.held if name.startswith("x")]
    claims.finished("x")
    assert other.begin(["x", "y"], []) is None
    assert runs.Claims(tmp_path).begin(["x"], ["x"]) == "x"  # nobody makes it anew under its readers


def test_a_run_is_refused_a_second_time_and_told_who_works(claims, tmp_path):
    assert runs.begin(claims, "a", {}, {}, print)
    with pytest.raises(ConfigError, match=f"run a: another snakemake works on it .process {os.getpid()}.*kill"):
        runs.begin(runs.Claims(tmp_path), "a", {}, {}, print)


def test_what_was_made_while_a_run_planned_is_planned_with_and_not_waited_for(claims, tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    file.touch()
    os.utime(file, (runs.START - 100, runs.START - 100))
    assert runs.begin(claims, "a", {"x": [str(file)]}, {}, print)  # it reads x
    waited = []
    monkeypatch.setattr(runs.Claims, "stand_back", lambda claims, name, **how: waited.append(name))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    wanted = {"x": [str(file), str(tmp_path / "y.json")]}
    assert not runs.begin(runs.Claims(tmp_path), "b", wanted, {"x": []}, print)
    assert waited == ["x"]  # as old as that, it is to be made anew
    file.touch()
    assert not runs.begin(runs.Claims(tmp_path), "c", wanted, {"x": []}, print)
    assert waited == ["x"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_waits_can_be_stopped_and_is_let_in_after_a_kill(tmp_path, number):
    maker = begun(tmp_path, "a", "x", "x")
    assert maker.stdout.readline() == "True\n"
    waiting = [begun(tmp_path, name, "x") for name in "bc"]
    for process in waiting:
        assert f"x of the shared results is made by another run (process {maker.pid})" in process.stdout.readline()
    waiting[0].send_signal(number)
    assert waiting[0].wait(60) == -number
    maker.kill()
    assert waiting[1].stdout.readline() == "False\n"  # to plan again
    for process in (maker, *waiting):
        process.kill()
        process.wait()
        process.stdout.close()


def test_what_long_jobs_say_is_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "TELL", 0.05)
    log, heard = tmp_path / "log", []
    log.write_text("step 1\n")
    runs.tell(lambda: {"pretrain base": str(log), "sft": str(tmp_path / "none")}, heard.append)
    end = time.monotonic() + 120
    while not heard and time.monotonic() < end:
        log.write_text(f"step 1\nstep {time.monotonic():.1f}\n")
        time.sleep(0.02)
    assert heard[0].startswith("pretrain base: step ")


def test_a_failed_step_is_told_with_its_last_words_and_its_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("12:00:00 device: CPU\nerror: a.jsonl:2: not JSON\n")
    assert runs.failure("pack a", str(log)) == f"error: pack a: a.jsonl:2: not JSON; its log is {log}"
    log.write_text("12:00:00 stopped after step 3 of 9; the same command goes on from there\n")
    assert runs.failure("sft a", str(log)).startswith("stopped: sft a: 12:00:00 stopped after step 3")
    assert "ended without a word" in runs.failure("sft a", str(tmp_path / "none"))
    assert "if memory is short, and what finds its disk full; its log" in runs.failure("a", str(tmp_path / "none"))
    log.write_text("12:00:00 step 1/250 loss 3.9\n")
    told = runs.failure("sft a", str(log))
    assert told.startswith("error: sft a: it ended without a word of why, as what is killed does")
    assert told.endswith(f"the last was: 12:00:00 step 1/250 loss 3.9; its log is {log}")


def test_progress_says_rate_and_time_left(monkeypatch, caplog):
    now = iter([0.0, 3.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr(pace.time, "monotonic", lambda: next(now))
    caplog.set_level("INFO", "rwkvpipe")
    work = pace.Pace("a.bin", 200e6)
    for done in (10e6, 50e6, 60e6, 100e6):
        work.at(done)
    assert [record.message for record in caplog.records] == [
        "a.bin: 50 of 200 MB, 8.3/s, 0:18 left",
        "a.bin: 100 of 200 MB, 8.3/s, 0:12 left",
    ]
