"""Scores are those of the grades, and answers are graded by no other question than theirs."""

import json
import subprocess
import sys

import pytest

from rwkvpipe import score
from rwkvpipe.base.config import BenchmarkConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import read_json, read_jsonl, write_jsonl
from rwkvpipe.tasks.registry import TASKS, asked

ROWS = [
    {"question": f"1+{n}", "answer": str(n + 1), "options": ["x", str(n + 1)], "text": f"1+{n}={n + 1}"}
    for n in range(4)
]
ANSWERS = {
    "answer": [{"text": text, "tokens": 3, "finish": "stop"} for text in (" 1", " it is 2.", "4", "5")],
    "choice": [{"logprobs": [-1.0 - n, -2.0], "tokens": [1, 1]} for n in range(4)],
    "bits": [{"windows": [[3.0, 3, 3], [2.0, 2, 2]]}] * 4,
}


def run(home, task, answers=None, marks=True, **spec):
    spec = {"task": task, "path": "q", "prompt": "{question}="} | spec
    write_jsonl(home / "q.jsonl", ROWS)
    rows = ANSWERS[task] if answers is None else answers
    if marks:
        made = TASKS[task](spec["prompt"])
        rows = [{"row": n, "asked": asked(made, q), **a} for n, (q, a) in enumerate(zip(ROWS, rows, strict=False), 1)]
    write_jsonl(home / "sums.answers.jsonl", rows)
    words = [home / "sums.answers.jsonl", "--spec", json.dumps(spec), "--questions", home / "q.jsonl"]
    score.main([*map(str, words), "--out", str(home / "sums.json")])
    return read_json(home / "sums.json"), list(read_jsonl(home / "sums.samples.jsonl"))


def test_free_answers(tmp_path):
    facts, rows = run(tmp_path, "answer")
    assert list(facts)[:7] == ["benchmark", "task", "n", "score", "low", "high", "better"]
    assert (facts["benchmark"], facts["task"], facts["n"], facts["better"]) == ("sums", "answer", 4, "higher")
    assert facts["score"] == 0.5 and facts["low"] < 0.5 < facts["high"] and facts["finished"] == 1.0
    assert [row["correct"] for row in rows] == [1, 1, 0, 0]
    assert rows[2] | {"row": 3, "question": "1+2", "gold": "3", "answer": "4", "extracted": "4"} == rows[2]


def test_choices(tmp_path):
    facts, rows = run(tmp_path, "choice")
    assert (facts["score"], facts["chance"], facts["by_token"]) == (0.5, 0.5, 0.5)
    assert [(row["answer"], row["correct"]) for row in rows] == [("x", 0), ("x", 0), ("3", 1), ("4", 1)]


def test_bits_count_windows(tmp_path):
    facts, rows = run(tmp_path, "bits")
    assert (facts["n"], facts["texts"], facts["better"]) == (8, 4, "lower")
    assert facts["score"] == pytest.approx(1.442695) and facts["low"] <= facts["score"] <= facts["high"]
    assert rows[0]["bits"] == pytest.approx(1.442695)


def test_texts_of_which_nothing_is_foreseen_are_named(tmp_path):
    with pytest.raises(DataError, match=r"q\.jsonl: nothing was measured: the texts are empty, or hold one token"):
        run(tmp_path, "bits", [{"windows": []}] * 4)
    assert not (tmp_path / "sums.json").exists() and not (tmp_path / "sums.samples.jsonl").exists()


@pytest.mark.parametrize("answers", [ANSWERS["answer"][:3], [], ANSWERS["answer"] * 2])
def test_another_number_of_answers_is_refused(tmp_path, answers):
    with pytest.raises(DataError, match=rf"answers\.jsonl: {len(answers)} answers to 4 questions"):
        run(tmp_path, "answer", answers, marks=False)


def test_answers_in_another_order_are_refused(tmp_path):
    run(tmp_path, "answer")
    first, second, *rest = read_jsonl(tmp_path / "sums.answers.jsonl")
    with pytest.raises(DataError, match=r"answers\.jsonl:1: an answer to another question than line 1"):
        run(tmp_path, "answer", [second, first, *rest], marks=False)
    with pytest.raises(DataError, match=r"answers\.jsonl:1: an answer to another question"):
        run(tmp_path, "answer", [second | {"row": 1}, first | {"row": 2}, *rest], marks=False)
    with pytest.raises(DataError, match="another prompt"):
        run(tmp_path, "answer", [first, second, *rest], marks=False, prompt="Q {question}")


def test_answers_of_another_program_are_graded(tmp_path):
    assert run(tmp_path, "answer", [{"text": "1"}] * 4, marks=False)[0]["score"] == 0.25


@pytest.mark.parametrize("task", ANSWERS)
def test_answers_to_another_task_are_refused(tmp_path, task):
    with pytest.raises(DataError, match=rf"answers\.jsonl:1: .*task {task}"):
        run(tmp_path, task, [{"said": "1"}] * 4)


def test_a_broken_line_is_named(tmp_path):
    run(tmp_path, "answer")
    (tmp_path / "sums.answers.jsonl").write_text('{"text": "1"}\n{"text": \n')
    with pytest.raises(DataError, match=r"sums\.answers\.jsonl:2: not JSON"):
        score.graded(
            TASKS["answer"](BenchmarkConfig(task="answer", path="q").prompt), ROWS, tmp_path / "sums.answers.jsonl"
        )


def test_no_torch_is_loaded():
    code = "import sys; import rwkvpipe.score; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
