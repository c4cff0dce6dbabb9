"""Strangers' rows become questions and talks, or one line that says why not."""

import json

import pytest

from rwkvpipe.base.column import Columns
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.data.question import question
from rwkvpipe.data.talk import talk
from rwkvpipe.tokenizer import chat

OPTIONS = ["cats", "dogs", "2"]


@pytest.mark.parametrize(
    "answer, right",
    [("dogs", 1), (" dogs ", 1), (0, 0), ("B", 1), ("(c)", 2), ("b.", 1), ("0", 0), ("2", 2), (2, 2)],
)
def test_the_right_option_may_be_named_by_text_number_or_letter(answer, right):
    found = question({"question": "?", "options": OPTIONS, "answer": answer}, {}, "f:1")
    assert (found.label, found.answer) == (right, OPTIONS[right])


@pytest.mark.parametrize("answer", ["birds", "D", 3, -1, True, 1.5, "9" * 5000, float("nan"), ["dogs"]])
def test_an_answer_that_is_no_option_is_refused(answer):
    with pytest.raises(DataError, match="^f:1: .* none of the 3 options") as caught:
        question({"question": "?", "options": OPTIONS, "answer": answer}, {}, "f:1")
    assert repr(str(answer)[:40]) in str(caught.value)  # as it stands in the file


def test_a_label_goes_before_the_answer_s_text():
    row = {"query": "?", "choices": OPTIONS, "gold": 1}
    found = question(row, {"question": "query", "options": "choices", "label": "gold"}, "f:1")
    assert found.row() == {"question": "?", "answer": "dogs", "options": OPTIONS, "label": 1}
    with pytest.raises(DataError, match="name different options"):
        question({"question": "?", "options": OPTIONS, "label": 0, "answer": "dogs"}, {}, "f:1")


@pytest.mark.parametrize("given, text", [(145.0, "145"), (1.5, "1.5"), (7, "7"), ("x", "x")])
def test_numbers_may_be_answers(given, text):
    assert question({"question": "?", "answer": given}, {}, "f:1").answer == text


@pytest.mark.parametrize(
    "row, columns, problem",
    [
        ({"answer": "x"}, {}, "no `question`; the row has answer"),
        ({"question": "?"}, {}, "no `answer`"),
        ({"question": "?", "answer": None}, {}, "`answer` is null"),
        ({"question": "?", "answer": float("nan")}, {}, "`answer` is float nan"),
        ({"question": "?", "answer": True}, {}, "`answer` is bool True"),
        ({"question": 5, "answer": "x"}, {}, "`question` is int 5"),
        ({"question": " ", "answer": "x"}, {}, "`question` is empty"),
        ({"question": "?\ud800", "answer": "x"}, {}, "`question` has half a surrogate pair at 2"),
        ({"question": "?", "answer": "x"}, {"answer": "gold"}, "no `gold`"),
        ({"question": "?", "answer": "x"}, {"options": "choices"}, "no `choices`, which columns.options names"),
        ({"question": "?", "answer": "x", "options": ["x"]}, {}, "list of two texts"),
        ({"question": "?", "answer": 1, "options": [1, 2]}, {}, "list of two texts"),
        ({"question": "?", "options": ["x", "y"]}, {}, "neither `answer` nor `label`"),
    ],
)
def test_a_row_that_does_not_do_is_named(row, columns, problem):
    with pytest.raises(DataError, match=f"^f:1: .*{problem}"):
        question(row, columns, "f:1")


def test_an_unknown_name_of_a_column_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="columns.qestion: no such name; did you mean question"):
        Columns({"qestion": "x"})


TALK = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"})


@pytest.mark.parametrize(
    "row, columns",
    [
        ({"messages": [*TALK]}, {}),
        ({"messages": [dict(turn, weight=1) for turn in TALK], "id": 3}, {}),
        ({"dialog": [*TALK]}, {"messages": "dialog"}),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, {}),
        ({"instruction": "Hi", "input": "", "output": "Ho"}, {}),
        ({"question": "Hi", "answer": "Ho"}, {}),
        ({"q": "Hi", "a": "Ho", "messages": "no turns"}, {"question": "q", "answer": "a"}),
    ],
)
def test_talks_come_in_many_shapes(row, columns):
    assert talk(row, columns, "f:1").messages == TALK


def test_the_reference_s_rows_become_its_texts(goldens):
    seen = 0
    for known in json.loads((goldens / "tune/sft_data.json").read_text())["rows"]:
        if {"messages", "conversations", "instruction"} & known["row"].keys():
            assert chat.text(talk(known["row"], {}, "f:1").messages) == known["text"]
            seen += 1
    assert seen > 5


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"txt": "x"}, "no `messages`, `question` or other keys of a talk; the row has txt"),
        ({"messages": []}, "list of turns"),
        ({"messages": "x"}, "list of turns"),
        ({"messages": ["x"]}, "turn 1 of `messages` is no object"),
        ({"messages": [{"role": "ghost", "content": "x"}]}, "turn 1: role is 'ghost'; known: system, user, assistant"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "turn 1: role is"),
        ({"messages": [{"role": "user"}]}, "turn 1: no `content`"),
        ({"messages": [*TALK, {"role": "user", "content": None}]}, "turn 3: `content` is null"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "turn 1: role is 'robot'"),
        ({"instruction": "x"}, "no `output`"),
        ({"data": [{"question": "x"}]}, r"the row has data; each item of `data` is .*data\[\*\]"),
    ],
)
def test_a_talk_that_does_not_do_is_named(row, problem):
    with pytest.raises(DataError, match=f"^f:1: .*{problem}"):
        talk(row, {}, "f:1")


def test_a_prompt_is_a_question_and_its_turns_are_laid_out():
    assert question({"prompt": "2+2?", "answer": "4"}, {}, "f:1").question == "2+2?"
    assert question({"prompt": "x", "question": "2+2?", "answer": "4"}, {}, "f:1").question == "2+2?"
    user, reply = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    assert question({"prompt": [user], "answer": "4"}, {}, "f:1").question == "2+2?"
    asked = question({"prompt": [user, reply, user], "answer": "4"}, {}, "f:1").question
    assert f"User: {asked}\n\nAssistant:" == chat.prompt([user, reply, user])
    for wrong in ([], [reply], [user, reply], ["x"], [{"role": "system", "content": "x"}, user]):
        with pytest.raises(DataError, match="^f:1: `prompt` is a list, but not of turns"):
            question({"prompt": wrong, "answer": "4"}, {}, "f:1")
