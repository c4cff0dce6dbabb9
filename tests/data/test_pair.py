"""Pairs of answers: what rows may look like, and the ids they become."""

import pytest

from rwkvpipe.base.errors import DataError
from rwkvpipe.data.pair import encoded, pair
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.byte import ByteTokenizer

WORDS = ByteTokenizer(1)


def texts(row):
    return [(WORDS.decode_bytes(ids).decode(), WORDS.decode([i for i, m in zip(ids, mask, strict=True) if m]))
            for ids, mask in encoded(row, WORDS)]  # fmt: skip


def test_texts_stand_as_they_are_and_the_answer_ends_the_document():
    row = pair({"prompt": "1+1=", "chosen": "2", "rejected": "3", "more": 4}, {}, "f:1")
    assert texts(row) == [("1+1=2", "2"), ("1+1=3", "3")]
    assert [ids[-1] for ids, _ in encoded(row, WORDS)] == [0, 0]
    assert [mask[-2:] for _, mask in encoded(row, WORDS)] == [[1, 1], [1, 1]]


@pytest.mark.parametrize("prompt", ["hi", [{"role": "user", "content": "hi"}]])
def test_turns_are_laid_out_as_talks_and_texts_beside_them_become_turns(prompt):
    given = {"q": prompt, "chosen": [{"role": "assistant", "content": "yes"}], "rejected": "no"}
    row = pair(given, {"prompt": "q"}, "f:1")
    assert texts(row) == [("User: hi\n\nAssistant: yes\n\n", " yes\n\n"), ("User: hi\n\nAssistant: no\n\n", " no\n\n")]


USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}
YES, NO = ({"role": "assistant", "content": word} for word in ("yes", "no"))


@pytest.mark.parametrize(
    "prompt, before",
    [
        ("hi", [USER]),
        ([USER], [USER]),
        (None, [USER]),
        ("hi", [SYSTEM, USER]),
        (None, [SYSTEM, USER]),
        ([SYSTEM, USER], [SYSTEM, USER]),
        (None, [USER, YES, USER]),
        ([USER, YES, USER], [USER, YES, USER]),
        ("hi", [USER, YES, USER]),
    ],
)
def test_answers_that_are_whole_talks_have_their_prompt_once(prompt, before):
    row = {"chosen": [*before, YES], "rejected": [*before, NO]} | ({} if prompt is None else {"prompt": prompt})
    found = pair(row, {}, "f:1")
    for (text, learned), answer in zip(texts(found), (YES, NO), strict=True):
        assert text == chat.text([*before, answer])
        assert learned.endswith(f" {answer['content']}\n\n") and "User" not in learned


def test_answers_of_several_turns_stay_whole():
    row = {"prompt": "hi", "chosen": [YES, USER, NO], "rejected": [NO]}
    assert pair(row, {}, "f:1") == {"prompt": [USER], "chosen": [YES, USER, NO], "rejected": [NO]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ho", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "hi", "chosen": [USER, YES], "rejected": [NO]},
        {"chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [SYSTEM, NO]},
        {"chosen": [USER, YES], "rejected": [USER, YES, USER, NO]},
        {"prompt": [], "chosen": [USER, YES], "rejected": [USER, NO]},
    ],
)
def test_talks_that_begin_otherwise_than_with_the_prompt_are_refused(row):
    with pytest.raises(DataError, match="^f:3: `chosen` and `rejected` are talks that do not both begin"):
        pair(row, {}, "f:3")


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "a", "chosen": "b"}, "no `rejected`; the row has prompt, chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the chosen answer is the rejected one"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "`rejected` is no text, or an empty one"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "`prompt` is no text"),
        ({"prompt": "a", "chosen": "b\ud800", "rejected": "c"}, "`chosen` is no text"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, "`chosen` does not end with a turn of the assistant"),
        ({"prompt": "a", "chosen": [{"role": "bot", "content": "b"}], "rejected": "c"}, "turn 1 of `chosen`"),
        ({"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}, "does not end with a turn"),
        (
            {"prompt": "a", "chosen": [{"role": "assistant", "content": "b", "weight": 0.5}], "rejected": "c"},
            "turn 1 of `chosen` has weight 0.5: answers are judged whole; remove it",
        ),
        (
            {"prompt": "a", "chosen": [{"role": "assistant", "content": "b", "train": False}], "rejected": "c"},
            "turn 1 of `chosen` has train False",
        ),
    ],
)
def test_what_is_no_pair_is_told_with_its_place(row, said):
    with pytest.raises(DataError, match=f"^f:3: .*{said}"):
        pair(row, {}, "f:3")
