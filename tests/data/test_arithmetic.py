"""Arithmetic is right, and no question of the exam stands in any training corpus, in any wording or order."""

import re

import pytest

from rwkvpipe.base.errors import ConfigError
from rwkvpipe.data.arithmetic import EXAMINED, WORDINGS, Sum, documents, exam
from rwkvpipe.data.synthetic import generate
from rwkvpipe.tasks.answer import extract, same
from rwkvpipe.tokenizer import chat

# told apart by words that the generator does not know of, so that a new wording has to be entered here too
SAID = {
    "+": (r"(\d+) ?\+ ?(\d+)", r"(\d+) plus (\d+)", r"sum of (\d+) and (\d+)"),
    "-": (r"(\d+) ?- ?(\d+)", r"(\d+) minus (\d+)", r"left of (\d+) without (\d+)"),
    "*": (r"(\d+) ?\* ?(\d+)", r"(\d+) times (\d+)", r"product of (\d+) and (\d+)"),
}


def sums(text: str) -> list[tuple[str, int, int]]:
    """Every sum that a text names, in their order, operands sorted where order does not matter."""
    found = []
    for op, patterns in SAID.items():
        for pattern in patterns:
            for match in re.finditer(pattern, text):
                a, b = map(int, match.groups())
                key = (op, a, b) if op == "-" else (op, min(a, b), max(a, b))
                found.append((match.start(), key))
    return [key for _, key in sorted(found)]


def taught(seed: int, count: int) -> list[str]:
    """All texts that a model trained on arithmetic reads."""
    texts = [document.text for document in generate("arithmetic.documents", seed, count)]
    texts += [chat.text(document.messages) for document in generate("arithmetic.chats", seed, count)]
    return texts + [" ".join(document.words()) for document in generate("arithmetic.questions", seed, count)]


@pytest.fixture(scope="module")
def examined():
    """Keys of all questions of the exam, read from their wording."""
    return {sums(document.question)[0] for document in generate("arithmetic.exam", 1, len(exam()))}


def test_every_training_text_names_a_sum_and_none_of_the_exam(examined):
    for text in taught(seed=5, count=4000):
        found = sums(text)
        assert found, text
        assert not examined.intersection(found), text


def test_every_question_of_any_seed_is_one_of_the_exam(examined):
    for seed in (2, 3):
        asked = [sums(document.question) for document in generate("arithmetic.exam", seed, 1500)]
        assert all(len(found) == 1 for found in asked)
        keys = {found[0] for found in asked}
        assert len(keys) == 1500 and keys <= examined


def test_the_exam_is_a_seventh_of_all_questions_of_each_operation():
    assert len(exam()) > 1500
    for op, possible in (("+", 4095), ("-", 4095), ("*", 4005)):
        assert EXAMINED - 0.02 < sum(s.op == op for s in exam()) / possible < EXAMINED + 0.02


def test_order_of_operands_makes_no_new_question_where_it_does_not_matter():
    assert Sum("+", 47, 38).key == Sum("+", 38, 47).key
    assert Sum("*", 47, 38).key == Sum("*", 38, 47).key
    assert Sum("-", 47, 38).key != Sum("-", 38, 47).key


def test_steps_of_multiplications_are_right_and_come_to_the_result():
    for document in documents(1, 2000):
        for left, right in re.findall(r"([\d+*-]+)=(\d+)", document.text):
            a, op, b = re.fullmatch(r"(\d+)([-+*])(\d+)", left).groups()
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op] == int(right), left
        op, a, b = sums(document.text)[0]
        assert same(str(Sum(op, a, b).result), extract(document.text)), document.text


def test_talks_forget_carries_now_and_then_and_err_in_nothing_else():
    carries = slips = 0
    for document in generate("arithmetic.chats", 3, 3000):
        question, answer = (turn["content"] for turn in document.messages)
        op, *operands = sums(question)[0]
        first = int(re.search(r"\d+", answer)[0])  # the way to a product starts with the operand that it multiplies
        asked = Sum(op, *(reversed(operands) if op == "*" and operands[0] != first else operands))
        carries += asked.forgotten() != 0
        slips += answer != asked.worked()
        assert answer in (asked.worked(), asked.worked(asked.forgotten())), (question, answer)
    assert 1000 < carries < 1600 and 0.2 < slips / carries < 0.3


@pytest.mark.parametrize(
    ("of", "answer"),
    [
        (Sum("+", 47, 38), "75"),
        (Sum("+", 41, 38), "79"),
        (Sum("-", 82, 47), "45"),
        (Sum("-", 87, 42), "45"),
        (Sum("*", 47, 38), "47*8=376 47*3=141 141+37=178: 1786"),
        (Sum("*", 48, 38), "48*8=384 48*3=144 144+38=172: 1724"),
    ],
)
def test_a_forgotten_carry_is_a_ten_too_much_or_too_little(of, answer):
    assert of.worked(of.forgotten()) == answer


def test_operands_reach_99_and_every_wording_occurs():
    asked = [document.question for document in generate("arithmetic.questions", 1, 3000)]
    assert {0, 99} <= {int(number) for text in asked for number in re.findall(r"\d+", text)}
    wordings = [re.escape(wording) for of in WORDINGS.values() for wording in of]
    assert len(wordings) == 9
    for pattern in (w.replace(r"\{a\}", r"\d+").replace(r"\{b\}", r"\d+") for w in wordings):
        assert sum(re.fullmatch(pattern, text) is not None for text in asked) > 100


@pytest.mark.parametrize("name", ["arithmetic.questions", "arithmetic.exam"])
def test_one_of_four_options_is_right_and_its_place_tells_nothing(name):
    places = [0, 0, 0, 0]
    for document in generate(name, 4, 1000):
        right = [same(document.answer, extract(option)) for option in document.options]
        assert sum(right) == 1 and right[document.label] and len(set(document.options)) == 4
        places[document.label] += 1
    assert min(places) > 200


def test_more_questions_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=f"limit: arithmetic.exam has {len(exam())} questions"):
        list(generate("arithmetic.exam", 1, 2000))
