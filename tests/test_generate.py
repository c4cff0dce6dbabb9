"""Texts depend on weights, prompts and seed, and come to the terminal as they come to the file."""

import io
import json
import logging
import re
import sys

import pytest
import torch

from rwkvpipe import generate, merge
from rwkvpipe.base import partial
from rwkvpipe.base.config import LoraConfig, RwkvConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import read_jsonl
from rwkvpipe.data.talk import talk
from rwkvpipe.model.family import build
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.tokenizer.load import save_tokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer
from rwkvpipe.train.stage import write_adapter
from rwkvpipe.weights import store
from rwkvpipe.weights.lora import inject

PROMPTS = ["once", "twice upon", "é"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    model = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=256))
    model.initialise(0)
    with torch.no_grad():
        model.head.weight.mul_(0.3)
    store.write(tmp_path / "m.safetensors", model.config, model.state_dict())
    return tmp_path


def call(home, *words):
    generate.main(["--model", str(home / "m.safetensors"), "--tokenizer", "bytes", *map(str, words)])


def written(home, **sampling):
    call(home, "--spec", json.dumps({"prompts": PROMPTS, "sampling": sampling}), "--out", home / "s.jsonl")
    return list(read_jsonl(home / "s.jsonl"))


def test_each_prompt_has_its_text(home):
    rows = written(home, max_tokens=9)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(list(row) == ["prompt", "text"] and row["text"] for row in rows)


@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_stopped_run_goes_on_to_the_same_texts(home, monkeypatch, caplog, after):
    spec = json.dumps({"prompts": [*PROMPTS, "once", "x"], "sampling": {"max_tokens": 9}})
    call(home, "--spec", spec, "--out", home / "whole.jsonl")
    whole, left = partial.append_line, [after]

    def cut(path, row):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        whole(path, row)

    with monkeypatch.context() as patch:
        patch.setattr(partial, "append_line", cut)
        with pytest.raises(KeyboardInterrupt):
            call(home, "--spec", spec, "--out", home / "s.jsonl")
    with caplog.at_level(logging.INFO):
        call(home, "--spec", spec, "--out", home / "s.jsonl")
    assert (home / "s.jsonl").read_bytes() == (home / "whole.jsonl").read_bytes()
    assert (f"going on: {after} of 5" in caplog.text) == bool(after) and not (home / "s.jsonl.part").exists()


def test_texts_of_other_settings_weights_or_words_are_left_out(home, monkeypatch):
    def row(*words):
        call(home, "--prompt", "a", "--max-tokens", 3, "--out", home / "s.jsonl", *words)
        return (home / "s.jsonl").read_bytes()

    wanted = row("--weights", "int8")
    with monkeypatch.context() as patch:
        patch.setattr(partial.Partial, "finish", lambda *_: 0)
        row(), row("--temperature", "0")
    assert row("--weights", "int8") == wanted


def test_the_same_seed_gives_the_same_texts(home):
    assert written(home, seed=1) == written(home, seed=1) != written(home, seed=2)


@pytest.mark.parametrize("stop", [["\n\n"], ["a", "e"], ["\x00\x01longer", "t"], []])
def test_the_terminal_gets_what_the_file_gets(home, capsys, stop):
    rows = written(home, max_tokens=40, stop=stop)
    call(home, "--spec", json.dumps({"prompts": PROMPTS, "sampling": {"max_tokens": 40, "stop": stop}}))
    assert capsys.readouterr().out == "\n".join(row["prompt"] + row["text"] + "\n" for row in rows)


def test_prompts_on_the_command_line(home, capsys):
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    call(home, *words, "--temperature", 0.5, "--max-tokens", 7, "--seed", 3)
    rows = written(home, temperature=0.5, max_tokens=7, seed=3)
    assert capsys.readouterr().out == "\n".join(row["prompt"] + row["text"] + "\n" for row in rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "one of --spec and --prompt"),
        (["--prompt", "a", "--spec", "{}"], "one of --spec and --prompt"),
        (["--spec", '{"prompts":["a"]}', "--seed", "1"], "belong to --prompt"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens"),
        (["--spec", '{"prompts":[]}'], "prompts"),
        (["--spec", '{"prompts":["a"],"sampling":{"ban":[256]}}'], "sampling.ban: there is no id 256; .* 0 to 255"),
        (["--spec", '{"prompts":["a"],"sampling":{"bias":{"-1":2}}}'], "sampling.bias: there is no id -1"),
        (["--spec", '{"prompts":["a"],"sampling":{"spare":[999]}}'], "sampling.spare: there is no id 999"),
        (["--spec", '{"prompts":["a"],"sampling":{"stop_ids":[999]}}'], "sampling.stop_ids: there is no id 999"),
    ],
)
def test_bad_words_are_refused_in_one_line(home, words, said):
    with pytest.raises(ConfigError, match=said) as caught:
        call(home, *words)
    assert "\n" not in str(caught.value)


def test_numbers_that_follow_numbers_stand_apart_from_them(home, capsys):
    save_tokenizer(home / "numbers", IntegerTokenizer(255))
    model = ["--model", str(home / "m.safetensors"), "--tokenizer", str(home / "numbers")]
    generate.main([*model, "--prompt", "1 2", "--max-tokens", "3"])
    assert re.fullmatch(r"1 2 \d+ \d+ \d+\n", capsys.readouterr().out)


def test_a_file_of_prompts_is_read_line_by_line(home, capsys):
    (home / "p.txt").write_text("once\n\ntwice upon\né\n")
    (home / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    rows = written(home, max_tokens=9, seed=4)
    for name in ("p.txt", "p.jsonl"):
        call(home, "--prompts", home / name, "--max-tokens", 9, "--seed", 4, "--out", home / "f.jsonl")
        assert list(read_jsonl(home / "f.jsonl")) == rows
        spec = {"path": str(home / name), "sampling": {"max_tokens": 9, "seed": 4}}
        call(home, "--spec", json.dumps(spec), "--out", home / "f.jsonl")
        assert list(read_jsonl(home / "f.jsonl")) == rows


def test_a_prompt_that_cannot_be_read_is_named_and_lines_end_at_line_ends_alone(home):
    (home / "p.txt").write_text("a\x0cb\u2028c\n\nd\n")
    call(home, "--prompts", home / "p.txt", "--max-tokens", 1, "--out", home / "f.jsonl")
    assert [row["prompt"] for row in read_jsonl(home / "f.jsonl")] == ["a\x0cb\u2028c", "d"]
    (home / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    with pytest.raises(DataError, match="prompt 2: an empty prompt"):
        call(home, "--prompts", home / "p.jsonl", "--out", home / "g.jsonl")
    assert not list(home.glob("g.*"))


def test_talks_in_a_file_are_answered(home):
    (home / "p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    call(home, "--prompts", home / "p.jsonl", "--mode", "think", "--max-tokens", 3, "--out", home / "f.jsonl")
    assert [row["prompt"] for row in read_jsonl(home / "f.jsonl")] == ["User: hi\n\nAssistant: <think"]


def test_tools_beside_a_talk_are_named_as_they_are_where_it_is_learned_from(home):
    row = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"name": "f"}]}
    (home / "p.jsonl").write_text(json.dumps(row) + "\n")
    call(home, "--prompts", home / "p.jsonl", "--max-tokens", 3, "--out", home / "f.jsonl")
    (said,) = [row["prompt"] for row in read_jsonl(home / "f.jsonl")]
    learned = talk(row | {"messages": [*row["messages"], {"role": "assistant", "content": "x"}]}, {}, "here")
    assert '"name": "f"' in said and chat.text(learned.messages).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no prompts in it"),
        ('{"text": "a"}\n', "p.jsonl:1: no text under `prompt`"),
        ('{"prompt": "a"}\n{"messages": [{"role": "king", "content": "a"}]}\n', "p.jsonl:2: turn 1: role is 'king'"),
        ('{"messages": []}\n', "p.jsonl:1: `messages` must be a list of turns"),
        ('{"prompt": "a\\ud800"}\n', "p.jsonl:1: character 2 .* half a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}\n', "p.jsonl:1: turn 1: .* half a surrogate pair"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}\n', "p.jsonl:1: .* remove one"),
        (
            '{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]}]}\n',
            "p.jsonl:1: turn 1: only a `template`",
        ),
    ],
)
def test_files_that_hold_no_prompts_are_refused_by_line(home, text, said):
    (home / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        call(home, "--prompts", home / "p.jsonl")


def talked(home, monkeypatch, capsys, typed: bytes, *words) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    call(home, "--chat", *words)
    return capsys.readouterr().out.split("\n")


def test_a_talk_goes_on_from_what_was_said(home, monkeypatch, capsys):
    words = ("--temperature", 0, "--max-tokens", 8)
    first, second, _ = talked(home, monkeypatch, capsys, "hello\n\nand é?\n".encode(), *words)
    seen = [{"role": "user", "content": "hello"}]
    seen += [{"role": "assistant", "content": first}, {"role": "user", "content": "and é?"}]
    (home / "p.jsonl").write_text("".join(json.dumps({"messages": seen[:n]}) + "\n" for n in (1, 3)))
    call(home, "--prompts", home / "p.jsonl", *words, "--out", home / "f.jsonl")
    assert [row["text"].removeprefix(" ") for row in read_jsonl(home / "f.jsonl")] == [first, second]


def test_a_talk_can_begin_anew_and_bears_bytes_that_are_no_text(home, monkeypatch, capsys):
    words = ("--temperature", 0, "--max-tokens", 8)
    found = talked(home, monkeypatch, capsys, b"hello\n/new\nhello\n\xff\xfe\n", *words)
    assert found[0] == found[1]
    assert len(found) == 4


def test_an_adapter_beside_the_weights_writes_what_merged_weights_write(home):
    model = store.load_model(home / "m.safetensors")
    settings = LoraConfig(rank=2, alpha=64.0)
    inject(model, settings)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("lora_B"):
                value.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.1)
    write_adapter(home / "a.safetensors", model, settings, base=store.mark(home / "m.safetensors"))
    words = ["--model", str(home / "m.safetensors"), "--adapter", str(home / "a.safetensors")]
    merge.main([*words, "--out", str(home / "merged" / "model.safetensors")])
    spec = ["--tokenizer", "bytes", "--spec", json.dumps({"prompts": PROMPTS, "sampling": {"temperature": 0}})]
    generate.main([*words, *spec, "--out", str(home / "beside.jsonl")])
    merged = ["--model", str(home / "merged" / "model.safetensors")]
    generate.main([*merged, *spec, "--out", str(home / "merged.jsonl")])
    beside = list(read_jsonl(home / "beside.jsonl"))
    assert beside == list(read_jsonl(home / "merged.jsonl")) != written(home, temperature=0)


def test_a_line_that_the_vocabulary_lacks_does_not_end_the_talk(home, monkeypatch, capsys, caplog):
    save_tokenizer(home / "few", TrieTokenizer({n + 1: bytes([n]) for n in b"User: Asitnh\n"}))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\u00e9\nhi\n".encode())))
    words = ["--model", str(home / "m.safetensors"), "--tokenizer", str(home / "few"), "--chat", "--max-tokens", "3"]
    generate.main([*words, "--temperature", "0"])
    assert len(capsys.readouterr().out.rstrip("\n").split("\n")) >= 1
    assert any("\u00e9" in message or "vocabulary" in message for message in caplog.messages)
