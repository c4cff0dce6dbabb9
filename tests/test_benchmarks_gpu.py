"""The figures of a card: without one there is a line, and on any device the code that takes them runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import card, gpu, tables

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_there_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "there is no NVIDIA GPU here, so there is nothing to measure\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["op wkv7 1 16 1", "op wkv6 1 3 1", "op wkv5 1 3 1", "train 2x64 16", "decode 2x64 3",
                                   "read 2x64 20"])  # fmt: skip
def test_each_figure_is_taken_on_any_device(words, monkeypatch):
    monkeypatch.setattr(card, "CHECKED", (1, 20, 1))
    found = card.figure("cpu", *words.split())
    assert all(value > 0 for value in found.values())
    assert gpu.said(found) != gpu.NOT_YET


def test_a_form_that_differs_is_not_timed(monkeypatch):
    monkeypatch.setattr(card, "CHECKED", (1, 5, 1))
    monkeypatch.setitem(card.FORMS, "fla", lambda: lambda r, w, k, v, a, b: v * (r + w + k + a + b).mean())
    with pytest.raises(SystemExit, match="differs from the reference"):
        card.figure("cpu", "op", "fla", "1", "8", "1")


def test_a_figure_that_cannot_be_taken_says_why_and_the_others_are_taken(monkeypatch):
    told = iter([
        subprocess.CompletedProcess([], 0, "talk\n" + json.dumps({"both_ms": 2.5, "error": 1e-3}), ""),
        subprocess.CompletedProcess([], 1, "", "Traceback\nModuleNotFoundError: No module named 'fla'"),
        subprocess.TimeoutExpired([], 1),
    ])  # fmt: skip

    def run(*words, **more):
        found = next(told)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu, "at_hand", lambda device: (None, "none here"))
    monkeypatch.setattr(gpu, "CASES", [(name, "op", None) for name in "abc"])
    lines = gpu.table(gpu.measure("a card")).splitlines()[2:]
    assert lines == [
        "| a | 2.50 ms with backward, error 1.0e-03 | a card |",
        "| b | ModuleNotFoundError: No module named 'fla' | a card |",
        "| c | took too long | a card |",
    ]
    assert "there was no time left" in gpu.table(gpu.measure("a card", 0))


def test_the_page_says_of_each_figure_that_it_is_taken_or_not():
    page = (tables.DOCS / "gpu.md").read_text(encoding="utf-8")
    run = gpu.kept(tables.DOCS / "gpu.jsonl")
    assert gpu.table(run) in page
    assert run is None or all(case["card"] for case in run["cases"])
