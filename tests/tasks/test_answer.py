"""Answers are found where they stand, and compared by what they mean."""

import json

import pytest

from rwkvpipe.base.errors import DataError
from rwkvpipe.tasks.answer import Answer, extract, number, same


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("47*38 = 376+1410 = 1786", "1786"),
        (" 1786", "1786"),
        ("The answer is 42.", "42"),
        ("the answer is 12 because 3*4", "12"),
        ("The answer is 47*38 = 1786. Good.", "1786"),
        ("The final answer: -3", "-3"),
        ("The answer is $1,786.", "1,786"),
        ("The answer is Paris. It is big", "Paris"),
        ("He has 5 left.\n#### 1,234", "1,234"),
        (r"so \boxed{5} and not 7", "5"),
        (r"\boxed{\frac{1}{2}} then \boxed{\sqrt{2}}", r"\sqrt{2}"),
        (r"\boxed{1} and \boxed{2", "2"),
        ("12 - 15 = -3", "-3"),
        ("3 - 5 is -2.", "-2"),
        ("x = - 5", "-5"),
        ("-7 and 8", "8"),
        ("x=2, y=\u22121", "-1"),
        ("3/4", "3/4"),
        ("1,2,3", "3"),
        ("so $18.50 total", "18.50"),
        ("The answer is 1 1/2.", "1 1/2"),
        ("so he drinks 2\u00bd cups", "2 1/2"),
        (r"So we get $-\frac{1}{2}$.", "-1/2"),
        ("it costs $.75", ".75"),
        ("Well...5", "5"),
        ("\uff11\uff17\uff18\uff16", "1786"),
        ("none", "none"),
        ("", ""),
    ],
)
def test_the_answer_in_a_text(text, found):
    assert extract(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "0+7",
        "7+0",
        "14-7",
        "1*7",
        "= 3+7",
        "answer is 0+7",
        "14 - 7",
        "14/2",
        "7^1",
        "14 / 2",
        r"\boxed{\frac{14}{2}}",
        r"$\frac{7}{1}$",
        r"7 is \frac{49}7",
    ],
)
def test_an_expression_is_not_worked_out_for_the_model(text):
    assert Answer().grade({"question": "What is 0+7?", "answer": "7"}, text) == 0


RIGHT = ["7", " 7.", "7.0", "0+7 = 7", "The answer is 7", "it is 7!", r"\boxed{7}", "+7", "007"]


@pytest.mark.parametrize("text", RIGHT)
def test_right_answers_in_any_dress(text):
    assert Answer().grade({"question": "What is 0+7?", "answer": "7"}, text) == 1
    assert Answer().grade({"question": "What is 0+7?", "answer": 7}, text) == 1


@pytest.mark.parametrize(
    ("gold", "text", "grade"),
    [
        ("1", "The answer is 1 1/2.", 0),
        ("3/2", "The answer is 1 1/2.", 1),
        ("5", r"\boxed{.5}", 0),
        ("0.5", r"\boxed{.5}", 1),
        ("1/2", "The answer is 1 / 2", 1),
        ("2", r"which is $\frac{1}{2}$", 0),
        ("1/2", r"which is $\frac{1}{2}$", 1),
        ("C", "The answer is (C).", 1),
    ],
)
def test_a_part_of_a_number_is_not_the_number(gold, text, grade):
    assert Answer().grade({"question": "", "answer": gold}, text) == grade


def test_words_are_answers_too():
    grade = Answer().grade
    assert grade({"question": "", "answer": "Paris"}, "paris.") == 1
    assert grade({"question": "", "answer": "Apollo 11"}, "Apollo 11") == 1
    assert grade({"question": "", "answer": "Paris"}, "It is London") == 0
    assert grade({"question": "", "answer": "3/4"}, "It is 0.75") == 1


def test_of_a_worked_solution_the_end_counts():
    row = {"question": "", "answer": "She has 16 - 3 = <<16-3=13>>13.\nThat is 2 * 13 = $26.\n#### 1,026"}
    assert [Answer().grade(row, text) for text in ("so 1026.", "26", "#### 1026")] == [1, 0, 1]
    assert Answer().mark(row, {"text": "so 1026."})["gold"] == "1,026"


def test_equal_numbers_are_the_same():
    for gold, answer in [("1786", "1,786"), ("1786", "1786.0"), ("0.5", "1/2"), ("-3", "\u22123"), ("7/3", "2 1/3")]:
        assert same(gold, answer) and same(answer, gold)
    for gold, answer in [("3", "-3"), ("5", ""), ("", ""), ("1/0", "1/0 "[:2]), ("5", "x"), ("1786", "178")]:
        assert not same(gold, answer)


PLAIN = ("integer", "decimal", "fraction", "math500_formatting", "currency_units", "latex_noise")
# an expression to work out, a word for a number, other symbols: not plain
BEYOND = {"10^2", "2+1", "ten", "2000", "6.02\\cdot 10^{23}", "\\frac{1+x}{2}", "6"}


def test_reference_judgements(goldens):
    for line in (goldens / "eval" / "math_equiv_goldens.jsonl").read_text().splitlines():
        row = json.loads(line)
        if not row["human_equal"]:
            assert not same(row["gold"], row["pred"]), row["id"]
        elif row["category"] in PLAIN and row["pred"] not in BEYOND:
            assert same(row["gold"], row["pred"]), row["id"]


def test_reference_extractions(goldens):
    for line in (goldens / "eval" / "extraction_goldens.jsonl").read_text().splitlines():
        row = json.loads(line)
        wanted = row["expect"]
        if row["fn"] in ("last_boxed_balanced", "gsm8k_strict_match") and wanted not in (None, "", "[invalid]"):
            assert extract(row["text"]) == wanted.rstrip("."), row


@pytest.mark.parametrize(
    "text",
    [
        "9" * 9000,
        "1," * 9000,
        "1/" * 9000,
        "0." + "1" * 9000,
        r"\boxed{" * 3000,
        r"\frac{" * 3000,
        "answer is " * 3000,
        "-" * 9000,
        "\u0663\u00b2\u00bd\u2460" * 99,
        "\ud800 5",
        "\x00",
        "1/0",
        "answer is",
        "####",
        "2 1/0",
    ],
)
def test_no_text_is_too_odd(text):
    assert Answer().grade({"question": "?", "answer": "-5"}, text) == 0
    assert isinstance(same(text, text), bool)
    assert isinstance(extract(text), str)


def test_overlong_numbers_are_compared_as_text():
    assert same("9" * 9000, "9" * 9000) and not same("9" * 9000, "9" * 8999)
    assert number("9" * 9000) is None


def test_a_question_without_an_answer_is_refused():
    with pytest.raises(DataError, match="`answer`"):
        Answer().grade({"question": "?"}, "5")
    for row in ({"question": "?"}, {"answer": "5"}, {"question": "?", "answer": None}, {"question": 3, "answer": "5"}):
        with pytest.raises(DataError):
            Answer().check(row)


def test_the_prompt_takes_any_question():
    assert Answer("Q: {question} A:").prompt({"question": "{x} {question}"}) == "Q: {x} {question} A:"
