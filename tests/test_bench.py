"""Answers stand in the order of the questions, are the same however a run was cut, and belong to what was asked."""

import json
import logging

import pytest
import torch

from rwkvpipe import bench
from rwkvpipe.base import partial
from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import ConfigError, DataError, PipeError
from rwkvpipe.base.files import read_jsonl, write_jsonl
from rwkvpipe.model.family import build
from rwkvpipe.tasks import bits, choice
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.load import save_tokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer
from rwkvpipe.weights import store

CONFIG = RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=257)
SAMPLING = {"max_tokens": 6, "temperature": 1.0, "stop": ["e"]}
SPECS = {
    "answer": {"task": "answer", "path": "q", "prompt": "{question}=", "sampling": SAMPLING},
    "choice": {"task": "choice", "path": "q", "prompt": "{question}="},
    "bits": {"task": "bits", "path": "q", "ctx_len": 8},
}


class Killed(Exception):
    """Stands for a kill: nothing of ours runs after it."""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    monkeypatch.setattr(choice, "BLOCK", 3)
    monkeypatch.setattr(bits, "BLOCK", 3)
    model = build(CONFIG)
    model.initialise(0)
    with torch.no_grad():
        model.head.weight.mul_(0.3)
    store.write(tmp_path / "m.safetensors", model.config, model.state_dict())
    save_tokenizer(tmp_path / "tokens", ByteTokenizer(1))
    rows = [
        {"question": "a" * (n % 4) + str(n), "answer": "2", "options": ["2", "three", str(n + 4)], "text": "xyz" * n}
        for n in range(8)
    ]
    write_jsonl(tmp_path / "q.jsonl", rows)
    return tmp_path


def run(home, task, rows=4, out="a.answers.jsonl", **changes):
    spec = SPECS[task] | changes.pop("spec", {})
    given = {"--model": home / "m.safetensors", "--tokenizer": home / "tokens", "--questions": home / "q.jsonl"}
    given |= {"--spec": json.dumps(spec), "--rows": rows, "--out": home / out} | changes
    bench.main([str(word) for pair in given.items() for word in pair])
    return (home / out).read_bytes()


def killed(home, monkeypatch, task, after, **changes):
    """A run that ends while it writes an answer: half a line stays behind."""
    whole = partial.append_line

    def cut(path, row, left=[after]):  # noqa: B006
        if not left[0]:
            with open(path, "ab") as file:
                file.write(b'{"row": 5, "text": "ha')
            raise Killed
        left[0] -= 1
        whole(path, row)

    with monkeypatch.context() as patch:
        patch.setattr(partial, "append_line", cut)
        with pytest.raises(Killed):
            run(home, task, **changes)


@pytest.mark.parametrize("task", SPECS)
def test_each_question_has_its_answer_in_order(home, task):
    run(home, task)
    rows = list(read_jsonl(home / "a.answers.jsonl"))
    assert [row["row"] for row in rows] == list(range(1, 9))
    assert len({row["asked"] for row in rows}) == 8
    assert not (home / "a.answers.jsonl.part").exists()


@pytest.mark.parametrize("task", SPECS)
@pytest.mark.parametrize("after", [0, 1, 5, 7])
def test_a_killed_run_goes_on_to_the_same_answers(home, monkeypatch, caplog, task, after):
    whole = run(home, task, out="whole.answers.jsonl")
    killed(home, monkeypatch, task, after)
    assert not (home / "a.answers.jsonl").exists()
    with caplog.at_level(logging.INFO):
        assert run(home, task) == whole
    assert (f"going on: {after} of 8 are answered" in caplog.text) == (after > 0)


@pytest.mark.parametrize("task", SPECS)
def test_answers_do_not_depend_on_how_many_are_asked_at_a_time(home, task):
    assert run(home, task, rows=1) == run(home, task, rows=3) == run(home, task, rows=100)


@pytest.mark.parametrize("other", ["model", "tokenizer", "questions", "spec"])
def test_answers_of_other_inputs_are_left_out(home, monkeypatch, caplog, other):
    killed(home, monkeypatch, "choice", 4)
    changes = {}
    if other == "model":
        config, tensors = store.read(home / "m.safetensors")
        tensors["head.weight"][5] += 1
        store.write(home / "m.safetensors", config, tensors)
    elif other == "tokenizer":
        save_tokenizer(home / "tokens", ByteTokenizer(0))
    elif other == "questions":
        rows = list(read_jsonl(home / "q.jsonl"))
        write_jsonl(home / "q.jsonl", [rows[0] | {"question": "else"}, *rows[1:]])
    else:
        changes = {"spec": {"prompt": "{question}?"}}
    with caplog.at_level(logging.INFO):
        found = run(home, "choice", **changes)
    assert caplog.text.count("left out") == 1 and "going on" not in caplog.text
    assert found == run(home, "choice", out="whole.answers.jsonl", **changes)


def test_what_follows_a_broken_line_is_not_trusted(home, monkeypatch):
    whole = run(home, "choice", out="whole.answers.jsonl")
    killed(home, monkeypatch, "choice", 6)
    part = home / "a.answers.jsonl.part"
    lines = part.read_bytes().split(b"\n")
    part.write_bytes(b"\n".join([*lines[:3], b"\0\0\0", *lines[3:]]))
    assert run(home, "choice") == whole


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(home):
    save_tokenizer(home / "tokens", ByteTokenizer(1))
    model = build(CONFIG.model_copy(update={"vocab_size": 200}))
    store.write(home / "m.safetensors", model.config, model.state_dict())
    with pytest.raises(ConfigError, match=r"tokens has 257 ids, the model .*m\.safetensors only 200"):
        run(home, "answer")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": 0}, "--rows: 0"),
        ({"--model": "none.safetensors"}, "no such file"),
        ({"--tokenizer": "none"}, "no tokenizer there"),
        ({"spec": {"task": "chioce"}}, "--spec: task"),
    ],
)
def test_bad_words_are_refused_in_one_line(home, changes, said):
    with pytest.raises(PipeError, match=said) as caught:
        run(home, "choice", **changes)
    assert "\n" not in str(caught.value)


def test_a_question_that_cannot_be_asked_is_named_by_its_line(home):
    rows = list(read_jsonl(home / "q.jsonl"))
    write_jsonl(home / "q.jsonl", [*rows, {"question": "?", "answer": "x", "options": ["a", "b"]}])
    with pytest.raises(DataError, match=r"q\.jsonl:9: `answer` 'x' is not one of the options"):
        run(home, "choice")


@pytest.mark.parametrize("task", SPECS)
def test_what_the_vocabulary_lacks_is_named_by_its_line(home, task):
    save_tokenizer(home / "tokens", TrieTokenizer({n: bytes([n]) for n in range(1, 128)}))
    rows = list(read_jsonl(home / "q.jsonl"))
    rows[6] |= {"question": "\u00e9", "options": ["\u00e9", "2"], "text": "\u00e9"}
    write_jsonl(home / "q.jsonl", rows)
    with pytest.raises(DataError, match=r"q\.jsonl:7: the vocabulary has no"):
        run(home, task)


@pytest.mark.parametrize("task", ["answer", "choice"])
def test_an_empty_prompt_is_named_by_its_line(home, task):
    save_tokenizer(home / "tokens", ByteTokenizer(0))  # no id of these may begin a text
    rows = list(read_jsonl(home / "q.jsonl"))
    rows[2] |= {"question": ""}
    write_jsonl(home / "q.jsonl", rows)
    with pytest.raises(DataError, match=r"q\.jsonl:3: an empty prompt"):
        run(home, task, spec={"prompt": "{question}"})


def test_device_and_precision_are_said(home, caplog):
    with caplog.at_level(logging.INFO):
        run(home, "answer")
    assert "device cpu" in caplog.text and "8 questions, 4 rows at a time, precision fp32" in caplog.text
