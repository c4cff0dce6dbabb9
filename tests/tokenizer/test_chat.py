"""Talks are rendered as released models were tuned."""

import json

import pytest

from rwkvpipe.base.config import BenchmarkConfig, SamplingConfig
from rwkvpipe.base.errors import DataError
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
        assert chat.prompt(row["messages"], row["mode"]) == row["text"]
        assert world.encode(row["text"]) == row["ids"]


@pytest.mark.parametrize("role", ["user", "system"])
def test_nothing_is_learned_where_nobody_answers(role):
    assert not any(chat.render([{"role": role, "content": "Hi"}], ByteTokenizer(1))[1])


def test_how_long_to_think_is_said_in_the_user_s_last_words():
    talk = [*TALK, {"role": "user", "content": "And 3+3?\n\nQuick."}]
    assert chat.prompt(talk, "think_a_lot").endswith("User: And 3+3?\nQuick. think a lot\n\nAssistant: <think")
    assert chat.prompt(talk, "think_a_bit").endswith(" think a bit\n\nAssistant: <think")
    assert chat.prompt(talk, "think_some").endswith("Quick. think\n\nAssistant: <think")


def test_an_unknown_mode_is_refused():
    with pytest.raises(DataError, match="mode: 'loud' is none of plain, think"):
        chat.prompt(TALK[:1], "loud")


def test_tools_are_listed_first_and_their_results_are_the_user_s_turns():
    talk = [{"role": "system", "content": "Be brief."}, TALK[0], {"role": "tool", "content": "4"}]
    asked = chat.prompt(chat.with_tools(talk, [{"name": "add"}]), "tools")
    assert asked.startswith('System: Be brief.\nTools:\n{"name": "add"}\nReturn only a JSON function call.\n\nUser: ')
    assert asked.endswith("User: Function output:\n4\n\nAssistant: ```json")


def test_an_instruction_stands_before_its_input():
    assert chat.instruction("Translate\n\nit", "good") == "Instruction: Translate\nit\n\nInput: good\n\nResponse:"
    assert chat.instruction("Sing", " ") == "Instruction: Sing\n\nResponse:"


def test_a_blank_line_after_a_chinese_full_stop_is_still_the_turn_s_end(shared_data):
    world = load_tokenizer(shared_data / "rwkv_vocab_v20230424.txt")
    ids, _ = chat.render([{"role": "user", "content": "好。"}], world)
    assert ids[-1] == 261 and 261 not in world.encode("好。\n\n")
