"""Tasks and rewards are found by name."""

import pytest

from rwkvpipe.base.config import BenchmarkConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.tasks.registry import TASKS, reward


def test_every_task_of_the_settings_is_there():
    assert set(TASKS) == set(BenchmarkConfig.model_fields["task"].annotation.__args__)
    better = {name: task.better for name, task in TASKS.items()}
    assert better == {"answer": "higher", "choice": "higher", "bits": "lower"}


def test_a_reward_is_the_grade():
    grade = reward("answer")
    assert grade({"question": "1+1", "answer": "2"}, " 1+1 = 2") == 1.0
    assert grade({"question": "1+1", "answer": "2"}, " 3") == 0.0


def test_what_grades_no_text_is_no_reward():
    for name in ("choice", "bits", "anwser"):
        with pytest.raises(ConfigError, match=rf"rollout\.reward: {name} .*known: answer"):
            reward(name)
