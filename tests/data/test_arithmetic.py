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
    "+": (r"(\d+) ?\+ ?(\d+)", r"(\d+) plus (\d+)", r"sum of (\d+) and (\d+)", r"do (\d+) and (\d+) make"),
    "-": (r"(\d+) ?- ?(\d+)", r"(\d+) minus (\d+)", r"left of (\d+) without (\d+)", r"more is (\d+) than (\d+)"),
    "*": (r"(\d+) ?\* ?(\d+)", r"(\d+) times (\d+)", r"product of (\d+) and (\d+)", r"much is (\d+) by (\d+)"),
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


def test_the_exam_is_a_fifth_of_all_questions_of_each_operation_without_digits_and_full_tens():
    assert len(exam()) > 1500
    for op in "+-*":
        of_one = [s for s in exam() if s.op == op]
        assert EXAMINED - 0.02 < len(of_one) / (81 * 82 / 2) < EXAMINED + 0.02
        assert all(x > 10 and x % 10 for s in of_one for x in (s.a, s.b))


def test_order_of_operands_makes_no_new_question_where_it_does_not_matter():
    assert Sum("+", 47, 38).key == Sum("+", 38, 47).key
    assert Sum("*", 47, 38).key == Sum("*", 38, 47).key
    assert Sum("-", 47, 38).key != Sum("-", 38, 47).key


def value(text: str) -> int:
    """What a number, or two numbers and a sign, come to."""
    a, op, b = re.fullmatch(r"(\d+)(?:([-+*])(\d+))?", text).groups()
    return {None: int(a), "+": int(a) + int(b or 0), "-": int(a) - int(b or 0), "*": int(a) * int(b or 0)}[op]


def test_every_step_is_right_and_the_last_number_is_the_result():
    for document in documents(1, 2000):
        chains = re.findall(r"[\d+*-]+(?:=[\d+*-]+)+", document.text)
        assert len(chains) in (2, 4), document.text
        for chain in chains:
            assert len({value(side) for side in chain.split("=")}) == 1, chain
        op, a, b = sums(document.text)[0]
        assert same(str(Sum(op, a, b).result), extract(document.text)), document.text


def test_one_number_of_every_step_is_below_ten_or_full_tens_as_none_of_the_exam_is():
    for document in generate("arithmetic.chats", 2, 2000):
        for pair in re.findall(r"(\d+)[-+*](\d+)", document.messages[1]["content"]):
            assert any(int(x) < 10 or int(x) % 10 == 0 for x in pair), pair


def test_talks_forget_carries_now_and_then_and_err_in_nothing_else():
    carries = slips = 0
    for document in generate("arithmetic.chats", 3, 3000):
        question, answer = (turn["content"] for turn in document.messages)
        op, *operands = sums(question)[0]
        first = int(re.search(r"\d+", answer)[0])  # the way starts with the first number
        asked = Sum(op, *(operands if operands[0] == first else reversed(operands)))
        carries += asked.forgotten() != 0
        slips += answer != asked.worked()
        assert answer in (asked.worked(), asked.worked(asked.forgotten())), (question, answer)
    assert 1000 < carries < 1600 and 0.45 < slips / carries < 0.55


@pytest.mark.parametrize(
    ("of", "answer"),
    [
        (Sum("+", 47, 38), "47+30=77 77+8=75"),
        (Sum("+", 41, 38), "41+30=71 71+8=79"),
        (Sum("-", 82, 47), "82-40=42 42-7=45"),
        (Sum("-", 87, 42), "87-40=47 47-2=45"),
        (Sum("*", 47, 38), "47*8=320+56=376 47*3=120+21=141 141+30=171 171+7=178: 1786"),
        (Sum("*", 48, 38), "48*8=320+64=384 48*3=120+24=144 144+30=174 174+8=172: 1724"),
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


def test_one_of_four_options_is_right_and_its_place_tells_nothing():
    places = [0, 0, 0, 0]
    for document in generate("arithmetic.exam", 4, len(exam())):
        right = [same(document.answer, extract(option)) for option in document.options]
        assert sum(right) == 1 and right[document.label] and len(set(document.options)) == 4
        places[document.label] += 1
    assert min(places) > len(exam()) / 5


def test_more_questions_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=f"limit: arithmetic.exam has {len(exam())} questions"):
        list(generate("arithmetic.exam", 1, 2000))
