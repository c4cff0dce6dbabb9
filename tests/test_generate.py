"""Texts depend on weights, prompts and seed, and come to the terminal as they come to the file."""

import json

import pytest
import torch

from rwkvpipe import generate
from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.base.files import read_jsonl
from rwkvpipe.model.family import build
from rwkvpipe.weights import store

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
    ],
)
def test_bad_words_are_refused_in_one_line(home, words, said):
    with pytest.raises(ConfigError, match=said) as caught:
        call(home, *words)
    assert "\n" not in str(caught.value)
