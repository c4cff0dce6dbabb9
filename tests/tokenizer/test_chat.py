"""Talks are rendered as released models were tuned."""

import json

import pytest

from rwkvpipe.base.config import BenchmarkConfig, SamplingConfig
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.load import load_tokenizer

TALK = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]


def test_the_assistant_s_words_and_their_end_are_learned():
    ids, mask = chat.render(TALK, ByteTokenizer(0))
    assert bytes(ids).decode() == chat.text(TALK) == "User: What is 2+2?\n\nAssistant: 4\n\n"
    assert len(ids) == len(mask)
    assert bytes(i for i, m in zip(ids, mask, strict=True) if m).decode() == " 4\n\n"


def test_a_prompt_is_what_stands_before_the_answer():
    ids, mask = chat.render(TALK, ByteTokenizer(0))
    assert chat.prompt(TALK[:1]).encode() == bytes(ids[: mask.index(1)])


def test_a_question_is_asked_as_it_was_learned():
    asked = BenchmarkConfig.model_fields["prompt"].default.replace("{question}", TALK[0]["content"])
    assert chat.prompt(TALK[:1]) == asked
    assert SamplingConfig().stop == (chat.TURN_END,)


def test_blank_lines_of_others_do_not_end_their_turn():
    talk = [{"role": "system", "content": " Be\r\n\r\nbrief.\n\n\n"}, *TALK]
    assert chat.text(talk).startswith("System: Be\nbrief.\n\nUser: ")


def _messages(row):
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    if "conversations" in row:
        return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    return row.get("messages")


def test_the_reference_s_ids_and_marks(goldens, shared_data):
    world = load_tokenizer(shared_data / "rwkv_vocab_v20230424.txt")
    given = json.loads((goldens / "tune/sft_data.json").read_text())
    seen = 0
    for row in given["rows"]:
        options = row["options"]
        messages = _messages(row["row"])
        if messages is None or options["append_eod"] or options["last_reply_only"]:
            continue
        ids, mask = chat.render(messages, world)
        assert ids == row["input_ids"]
        assert [i if m else -100 for i, m in zip(ids, mask, strict=True)] == row["labels"]
        seen += 1
    assert seen >= 3
    for row in given["generation_prompts"]:
        if row["mode"] == "plain":
            assert chat.prompt(row["messages"]) == row["text"]
            assert world.encode(row["text"]) == row["ids"]


@pytest.mark.parametrize("role", ["user", "system"])
def test_nothing_is_learned_where_nobody_answers(role):
    assert not any(chat.render([{"role": role, "content": "Hi"}], ByteTokenizer(1))[1])
