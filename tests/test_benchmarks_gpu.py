"""The figures of a card: without one there is a line, and on any device the code that takes them runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import card, gpu, outside, sanitize, tables
from rwkvpipe.kernel import gpu as gpu_kernels

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_there_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "there is no NVIDIA GPU here, so there is nothing to measure\n"
    assert not list(tmp_path.iterdir())


def test_each_figure_is_taken_on_any_device_of_something_tiny(monkeypatch, capsys):
    monkeypatch.setattr(card, "CHECKED", (1, 20, 1))
    taken = {}

    def asked(device, words, peer, left):
        if peer:
            return {"missing": "not here"}
        if " ".join(words) not in taken:
            taken[" ".join(words)] = card.figure(device, *words)
        return taken[" ".join(words)]

    monkeypatch.setattr(gpu, "asked", asked)
    cases = gpu.measure("dry", dry=True)["cases"]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == cases
    assert len(cases) == len(gpu.CASES) and len(taken) == 9
    for case, (_, words, peer) in zip(cases, gpu.CASES, strict=True):
        clone = next((word for word in words.split() if word in gpu.CLONES), None)
        if clone:
            assert gpu.said(case) == f"no clone of {clone} was named"
        elif peer is None:
            assert all(value > 0 for key, value in case.items() if key not in ("name", "card")), case
            assert gpu.said(case) not in (gpu.NOT_YET, "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_each_figure_is_taken_on_a_card_of_something_tiny(monkeypatch, caplog):
    monkeypatch.setattr(card, "CHECKED", (1, 20, 1))
    for words in {gpu.small(words) for _, words, peer in gpu.CASES if not peer}:
        if not set(words.split()) & set(gpu.CLONES):
            assert all(value > 0 for value in card.figure("cuda", *words.split()).values()), words
    assert "is not recorded" not in caplog.text


def test_the_folder_of_a_clone_is_put_where_a_figure_asks_for_it(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(gpu, "asked", lambda device, words, peer, left: given.append(words) or {"rows": 1})
    gpu.measure("dry", dry=True, clones={"RWKV-LM": tmp_path, "Albatross": tmp_path / "a b"})
    assert ["op", "lm", "1", "16", "1", str(tmp_path)] in given
    assert ["albatross", "2x64", "3", str(tmp_path / "a b")] in given


def test_a_form_that_clamps_decays_itself_is_compared_with_the_clamped_ones(monkeypatch):
    monkeypatch.setattr(card, "CHECKED", (1, 5, 1))
    clamped = lambda clone: lambda r, w, *rest: card.wkv7(r, card.soft(w).to(w), *rest)[0]  # noqa: E731
    monkeypatch.setitem(card.FORMS, "lm", clamped)
    assert card.figure("cpu", "op", "lm", "1", "8", "1", "folder")["error"] < card.WORST


def test_what_albatross_prints_is_read():
    said = "csv_header,label,B,T,iters,p10_ms,p50_ms,p90_ms,tok_s_p50\n"
    said += "RESULT B=320\ncsv,fast,320,1,9,1.0,2.0,3.0,160000.5\n"
    assert outside.told(said) == 160000.5
    with pytest.raises(SystemExit, match="no numbers"):
        outside.told("nothing")


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


def test_rows_that_do_not_fit_are_not_in_the_figures_of_those_that_do(monkeypatch):
    cuda, memory = torch.cuda, {"most": 0}

    def made(rows):
        def step():
            memory["most"] = max(memory["most"], 10**9 * rows)
            if rows > 4:
                raise cuda.OutOfMemoryError("CUDA out of memory")

        return step

    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda: memory.update(most=0))
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda: memory["most"])
    monkeypatch.setattr(cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(cuda, name, lambda: None)
    found = card._steps(torch.device("cuda"), made, 100, 7)
    assert found["rows"] == 4 and found["gigabytes"] == 4.0 and found["mfu"] > 0


def test_a_prompt_is_read_the_way_the_engine_reads_it(monkeypatch):
    ways = []

    class Model:
        def eval(self):
            return self

        def features(self, ids):
            ways.append(gpu_kernels.way("wkv7", torch.zeros(1, 16, 1, 64))[0])

    monkeypatch.setattr(card, "_model", lambda name, device: Model())
    card.figure("cpu", "read", "2x64", "16")
    assert set(ways) == {"wkv7_chunks"}


def test_the_page_says_of_each_figure_that_it_is_taken_or_not():
    page = (tables.DOCS / "gpu.md").read_text(encoding="utf-8")
    run = gpu.kept(tables.DOCS / "gpu.jsonl")
    assert gpu.table(run) in page
    assert run is None or all(case["card"] for case in run["cases"])


SANITIZER = """#!/bin/sh
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 1
echo "========= COMPUTE-SANITIZER"
case "$*" in
    *"--tool initcheck "*--kernel-name*) exit 1;;
    *"--target-processes application-only --launch-timeout 600 "*) ;;
    *) exit 1;;
esac
case "$*" in *"--tool initcheck "*|*" --kernel-name kns=_Z3runI "*) ;; *) exit 1;; esac
case "$*" in
    *"--tool racecheck --error-exitcode 9 "*" -m pytest "*"gpu and not large tests/kernel")
        echo "========= Error: Race reported between Write access and Read access"; echo "3 passed in 1s"; exit 9;;
    *" -m pytest "*"gpu and not large tests/kernel") echo "3 passed in 1s"; echo "========= ERROR SUMMARY: 0 errors";;
    *) exit 1;;
esac
"""


@pytest.mark.parametrize("beside_nvcc", [False, True])
def test_each_tool_of_the_sanitizer_tells_what_it_found(monkeypatch, tmp_path, capsys, beside_nvcc):
    for name in ("compute-sanitizer", "nvcc"):
        (tmp_path / name).write_text(SANITIZER)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin:/bin" if beside_nvcc else f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc") if beside_nvcc else str(tmp_path / "none"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    assert sanitize.run() == 1
    told = capsys.readouterr().out
    assert told.startswith("on a card\nmemcheck: nothing wrong: 3 passed in 1s\nracecheck: ends with status 9\n")
    assert "Race reported" in told and told.count("nothing wrong") == 3


def test_the_sanitizer_is_told_what_our_kernels_are_called():
    texts = [file.read_text() for file in sorted((ROOT / "cuda").glob("*.cu*"))]
    names = [name for text in texts for name in re.findall(r"^__global__ .* (\w+)\(const Kernel kernel\)", text, re.M)]
    assert len(names) == sum(text.count("__global__") for text in texts) == 1
    assert sanitize.OURS[1] == f"kns=_Z{len(names[0])}{names[0]}I"


def test_without_a_card_or_a_sanitizer_nothing_is_checked_and_a_line_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sanitize, "program", lambda: "compute-sanitizer")
    assert sanitize.run() == 2
    assert capsys.readouterr().err == "there is no NVIDIA GPU here, so nothing was checked\n"
    monkeypatch.setattr(sanitize, "program", lambda: None)
    assert sanitize.run() == 2
    assert capsys.readouterr().err.startswith("there is no compute-sanitizer, which CUDA's toolkit has here")
