"""Questions of any file or maker become rows of one form."""

import json

import numpy as np
import pytest

from rwkvpipe import questions
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import read_jsonl


def run(folder, *words, **spec):
    asked = {} if "synthetic" in spec else {"path": "x"}
    questions.main([*map(str, words), "--spec", json.dumps(asked | spec), "--out", str(folder / "out.jsonl")])
    return list(read_jsonl(folder / "out.jsonl"))


def rows(path, *found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_free_answers_keep_question_and_answer(tmp_path):
    path = rows(tmp_path / "a.jsonl", {"q": "1+1?", "a": 2, "_row": 0}, {"q": "2+2?", "a": "4"}, {"q": "?", "a": "x"})
    found = run(tmp_path, path, task="answer", columns={"question": "q", "answer": "a"}, limit=2)
    assert found == [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}]


def test_choices_have_options_and_a_label(tmp_path):
    path = rows(tmp_path / "a.jsonl", {"question": "?", "choices": ["a", "b"], "gold": 1})
    found = run(tmp_path, path, task="choice", columns={"options": "choices", "answer": "gold"})
    assert found == [{"question": "?", "answer": "b", "options": ["a", "b"], "label": 1}]
    with pytest.raises(DataError, match="a.jsonl:1: no options, which task choice compares"):
        run(tmp_path, rows(tmp_path / "a.jsonl", {"question": "?", "answer": "x"}), task="choice")


def test_a_text_file_is_one_row_of_task_bits(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\n")
    assert run(tmp_path, tmp_path / "a.txt", task="bits") == [{"text": "one\r\n\r\ntwo\n"}]
    path = rows(tmp_path / "a.jsonl", {"body": "x"}, {"body": "y"})
    assert run(tmp_path, path, task="bits", columns={"text": "body"}, limit=1) == [{"text": "x"}]
    (tmp_path / "b.txt").write_bytes(b"")
    np.save(tmp_path / "a.npy", np.array([[1, 2]]))
    with pytest.raises(DataError, match="a.npy: row 1: numbers; task bits reads texts: write them as one, with spaces"):
        run(tmp_path, tmp_path / "a.npy", task="bits")
    with pytest.raises(DataError, match="b.txt:1: the text is empty"):
        run(tmp_path, tmp_path / "b.txt", task="bits")


def test_made_questions_depend_on_the_seed_and_stop_at_the_limit(tmp_path):
    made = [run(tmp_path, "--seed", seed, task="choice", synthetic="counting.exam", limit=7) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2] and len(made[0]) == 7
    assert len(run(tmp_path, task="answer", synthetic="counting.exam")) == 1000
    assert len(run(tmp_path, task="bits", synthetic="counting.documents", limit=3)) == 3


def test_a_bad_row_of_a_corpus_says_how_it_is_left_out_and_one_of_an_exam_does_not(tmp_path):
    path = rows(tmp_path / "a.jsonl", {"question": "?", "answer": "x"}, {"question": ""})
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*; on_error: skip leaves such rows out$"):
        run(tmp_path, path, format="question")
    assert len(run(tmp_path, path, format="question", on_error="skip")) == 1
    with pytest.raises(DataError) as error:
        run(tmp_path, path, task="answer")
    assert "on_error" not in str(error.value)


def test_a_corpus_of_questions_is_written_the_same_way(tmp_path):
    made = run(tmp_path, synthetic="counting.questions", count=5, seed=1, format="question")
    assert len(made) == 5 and set(made[0]) == {"question", "answer", "options", "label"}
    assert made == run(tmp_path, "--seed", 1, synthetic="counting.questions", count=5, format="question")
    path = rows(tmp_path / "a.jsonl", {"question": "?", "answer": "x"})
    assert run(tmp_path, path, format="question") == [{"question": "?", "answer": "x"}]


def test_a_prompt_to_be_judged_by_a_function_needs_no_answer_and_keeps_its_columns(tmp_path):
    asked = [{"role": "user", "content": "Hi"}]
    path = rows(tmp_path / "a.jsonl", {"prompt": "Hi", "level": 3}, {"prompt": asked, "level": 4, "answer": None})
    wanted = [{"level": level, "question": "Hi", "answer": None} for level in (3, 4)]
    assert run(tmp_path, path, format="question") == wanted
    with pytest.raises(DataError, match="a.jsonl:1: no `answer`"):
        run(tmp_path, path, task="answer")
    with pytest.raises(DataError, match="a.jsonl:1: no `gold`"):
        run(tmp_path, path, format="question", columns={"question": "prompt", "answer": "gold"})


def test_a_shorter_file_than_the_limit_is_spoken_of(tmp_path, caplog):
    caplog.set_level("INFO")
    run(tmp_path, rows(tmp_path / "a.jsonl", {"question": "?", "answer": "x"}), task="answer", limit=5)
    assert "a.jsonl: 1 rows, limit is 5" in caplog.text


@pytest.mark.parametrize(
    "content, spec, error, problem",
    [
        ("", {"task": "answer"}, DataError, "no documents in it"),
        ('{"question": "?"}', {"task": "answer"}, DataError, "a.jsonl:1: no `answer`"),
        ("{", {"task": "answer"}, DataError, "a.jsonl:1: not JSON"),
        ('{"question": "?", "answer": "x"}\n{', {"task": "answer"}, DataError, "a.jsonl:2: not JSON"),
        ("", {"task": "bits"}, DataError, "no documents in it"),
        ("", {"task": "answr"}, ConfigError, "task"),
        ("", {"format": "text", "tokenizer": "t"}, ConfigError, "has format question"),
        ("", {"task": "answer", "columns": {"anser": "a"}}, ConfigError, "columns.anser"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, content, spec, error, problem):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(error, match=problem):
        run(tmp_path, tmp_path / "a.jsonl", **spec)
    assert not (tmp_path / "out.jsonl").exists()


def test_made_corpora_of_another_kind_are_refused(tmp_path):
    for spec in ({"task": "answer", "synthetic": "counting.chats"}, {"task": "bits", "synthetic": "counting.exam"}):
        with pytest.raises(ConfigError, match="makes no"):
            run(tmp_path, **spec)
    with pytest.raises(ConfigError, match="not JSON"):
        questions.main(["--spec", "{", "--out", str(tmp_path / "out.jsonl")])


@pytest.mark.parametrize(
    "name, columns, task, count",
    [
        ("gsm8k_test", {}, "answer", 3),
        ("svamp", {"question": "Question", "answer": "Answer"}, "answer", 3),
        ("math500", {"question": "problem"}, "answer", 3),
        ("mmlu_test_5subjects", {"options": "choices"}, "choice", None),
        ("piqa_valid", {"question": "query", "options": "choices", "answer": "gold"}, "choice", None),
        ("sharealike/arc_easy", {"question": "query", "options": "choices", "label": "gold"}, "choice", None),
        ("lambada_openai", {}, "bits", 3),
    ],
)
def test_rows_of_public_benchmarks_are_understood(tmp_path, shared_data, name, columns, task, count):
    limit = {"limit": count} if count else {}
    found = run(tmp_path, shared_data / f"{name}.jsonl", task=task, columns=columns, **limit)
    assert len(found) == (count or len(found)) > 0
