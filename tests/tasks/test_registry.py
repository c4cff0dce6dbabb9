"""Tasks and rewards are found by name."""

import pytest

from rwkvpipe.base.config import BenchmarkConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import write_jsonl
from rwkvpipe.tasks.answer import Answer
from rwkvpipe.tasks.choice import Choice
from rwkvpipe.tasks.registry import TASKS, asked, read_questions, reward


def test_every_task_of_the_settings_is_there():
    assert set(TASKS) == set(BenchmarkConfig.model_fields["task"].annotation.__args__)
    better = {name: task.better for name, task in TASKS.items()}
    assert better == {"answer": "higher", "choice": "higher", "bits": "lower"}


def test_a_reward_is_the_grade():
    grade = reward("answer")
    assert grade({"question": "1+1", "answer": "2"}, " 1+1 = 2") == 1.0
    assert grade({"question": "1+1", "answer": "2"}, " 3") == 0.0


def test_what_grades_no_text_is_no_reward():
    for name, hint in (("choice", "known: answer"), ("bits", "known: answer"), ("anwser", "did you mean answer")):
        with pytest.raises(ConfigError, match=rf"rollout\.reward: {name} .*{hint}"):
            reward(name)


def test_questions_are_checked_by_line(tmp_path):
    spec = BenchmarkConfig(task="answer", path="x", limit=2)
    rows = [{"question": "1+1", "answer": "2"}, {"question": "1+2", "answer": "3"}, {"question": "bad"}]
    write_jsonl(tmp_path / "q.jsonl", rows)
    assert read_questions(tmp_path / "q.jsonl", spec)[1] == rows[:2]
    with pytest.raises(DataError, match=r"q\.jsonl:3: no text or number under `answer`"):
        read_questions(tmp_path / "q.jsonl", spec.model_copy(update={"limit": None}))
    write_jsonl(tmp_path / "q.jsonl", [])
    with pytest.raises(DataError, match="no questions"):
        read_questions(tmp_path / "q.jsonl", spec)


@pytest.mark.parametrize("name", TASKS)
def test_what_is_no_answer_is_not_graded(name):
    question = {"question": "1+1", "answer": "2", "options": ["2", "3"], "text": "two"}
    with pytest.raises(DataError, match=f"task {name}"):
        TASKS[name]("{question}").mark(question, {"something": 1})


def test_the_mark_of_a_question_is_of_what_the_model_reads():
    row = {"question": "1+1", "options": ["2", "3"], "answer": "2"}
    mark = asked(Choice("{question}"), row)
    assert mark == asked(Choice("{question}"), row | {"answer": "3"})
    assert mark != asked(Choice("{question}"), row | {"options": ["3", "2"]})
    assert mark != asked(Choice("Q {question}"), row)
    assert asked(Answer("{question}"), {"question": "\ud800"})
