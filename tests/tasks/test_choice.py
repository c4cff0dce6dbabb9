"""The likeliest option is chosen, and what is right is said in any usual way."""

import json

import pytest

from rwkvpipe.base.config import BenchmarkConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.tasks import choice
from rwkvpipe.tasks.choice import Choice

ROW = {"question": "1+1?", "options": ["3", "2", "11"], "answer": "2"}


class Weigher:
    """An engine that likes short options and notes what it was asked."""

    class tokenizer:
        encode = staticmethod(lambda text: list(text.encode()))

    def __init__(self):
        self.asked = []

    def loglikelihood(self, pairs):
        self.asked.append(list(pairs))
        return [-len(option) - 0.00004 for _, option in pairs]


def test_reference_scores_agree(goldens):
    for line in (goldens / "eval" / "choice_scoring_goldens.jsonl").read_text().splitlines():
        row = json.loads(line)
        question = {"question": "", "options": row["choices"], "label": row["gold"]}
        answer = {"logprobs": row["loglikelihoods"], "tokens": [1] * len(row["choices"])}
        marked = Choice().mark(question, answer)
        assert marked["answer"] == row["choices"][row["pred"]]
        found = [marked[name] for name in ("correct", "correct_by_character", "correct_by_byte")]
        assert found == [row["acc"], row["acc_norm"], row["acc_bytes"]]
        assert Choice().grade(question, row["loglikelihoods"]) == row["acc"]


@pytest.mark.parametrize("label", [{"label": 1}, {"label": "B"}, {"answer": "2"}, {"answer": "3", "label": 1}])
def test_the_right_option_by_place_letter_or_text(label):
    assert Choice().gold({"question": "", "options": ["3", "2", "11"], **label}) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"label": 3},
        {"label": -1},
        {"label": True},
        {"label": "Z"},
        {"answer": "7"},
        {"answer": None},
        {"options": ["a"]},
        {"options": "ab"},
        {"options": ["a", ""]},
        {"question": None},
    ],
)
def test_a_row_that_says_nothing_clear_is_refused(wrong):
    with pytest.raises(DataError):
        Choice().check(ROW | wrong)


def test_options_follow_the_prompt_after_a_space():
    engine = Weigher()
    ((number, kept),) = Choice("Q {question} A:").ask(engine, [ROW], BenchmarkConfig(task="choice", path="x"))
    assert engine.asked == [[("Q 1+1? A:", " 3"), ("Q 1+1? A:", " 2"), ("Q 1+1? A:", " 11")]]
    assert (number, kept) == (0, {"logprobs": [-2.0, -2.0, -3.0], "tokens": [2, 2, 3]})


def test_going_on_weighs_the_same_blocks(monkeypatch):
    monkeypatch.setattr(choice, "BLOCK", 2)
    rows = [ROW | {"question": "x" * n} for n in (3, 1, 2, 5, 4)]
    spec = BenchmarkConfig(task="choice", path="x")
    first, second = Weigher(), Weigher()
    whole = dict(Choice().ask(first, rows, spec))
    rest = dict(Choice().ask(second, rows, spec, {1, 2, 0}))
    assert sorted(whole) == [0, 1, 2, 3, 4] and sorted(rest) == [3, 4]
    assert second.asked == first.asked[1:]


def test_a_summary_knows_what_chance_would_give():
    answer = {"logprobs": [-1.0, -2.0, -3.0], "tokens": [1, 1, 1]}
    found = Choice().summary([Choice().mark(ROW, answer), Choice().mark(ROW | {"answer": "3"}, answer)])
    assert found["score"] == 0.5 and found["low"] < 0.5 < found["high"] and found["chance"] == pytest.approx(1 / 3)


def test_another_number_of_options_than_was_weighed_is_refused():
    with pytest.raises(DataError, match="2 options were weighed, the question has 3"):
        Choice().mark(ROW, {"logprobs": [-1.0, -2.0], "tokens": [1, 1]})


@pytest.mark.parametrize("label", [0, 2])
def test_of_two_equal_options_each_is_right(label):
    question = {"question": "1+1?", "options": ["2", "3", "2"], "label": label}
    marked = Choice().mark(question, {"logprobs": [-1.0, -5.0, -1.0], "tokens": [1, 1, 1]})
    assert [value for name, value in marked.items() if name.startswith("correct")] == [1.0] * 4
