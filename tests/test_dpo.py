"""DPO learns what is preferred, is the same in any micro batch, and goes on where it was stopped."""

import json

import pytest
import torch

from rwkvpipe import dpo, merge, questions
from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import ConfigError, DataError, PipeError, Stopped
from rwkvpipe.base.files import read_jsonl, write_json, write_jsonl
from rwkvpipe.model.family import build
from rwkvpipe.train import loop
from rwkvpipe.weights import store

MODEL = RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=256)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    model = build(MODEL)
    model.initialise(0)
    with torch.no_grad():
        for block in model.blocks:
            block.att.output.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    store.write(tmp_path / "start.safetensors", model.config, model.state_dict())
    rows = [{"ask": f"{n}?", "good": f"a{n % 3}", "bad": "bb"[: 1 + n % 2]} for n in range(12)]
    write_jsonl(tmp_path / "raw.jsonl", rows)
    spec = {"path": "raw.jsonl", "format": "pairs", "columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"}}
    questions.main([str(tmp_path / "raw.jsonl"), "--spec", json.dumps(spec), "--out", str(tmp_path / "pairs.jsonl")])
    return tmp_path


def run(home, name, *, micro_batch=4, train=None, tokenizer="bytes", **changes):
    value = {"kind": "dpo", "seed": 3, "train": {"steps": 12, "ctx_len": 16, "batch": 4, "lr": 0.003} | (train or {})}
    value["train"] |= {"warmup": 1, "log_every": 1}
    write_json(home / "settings.json", value | changes)
    out = home / name / ("adapter.safetensors" if {"lora", "state"} & changes.keys() else "model.safetensors")
    dpo.main([
        str(home / "settings.json"), "--model", str(home / "start.safetensors"), "--tokenizer", str(tokenizer),
        "--data", str(home / "pairs.jsonl"), "--micro-batch", str(micro_batch), "--out", str(out),
    ])  # fmt: skip
    return store.read_tensors(out)[0], list(read_jsonl(home / name / "metrics.jsonl"))


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 4, "kind": "dora"}}, {"state": True}])
def test_what_is_preferred_becomes_likelier(home, changes):
    train = {"lr": 0.3 if "state" in changes else 0.02 if changes else 0.003}
    _, rows = run(home, "a", train=train, **changes)
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and rows[0]["reward_margin"] == 0
    assert rows[-1]["loss"] < 0.65 and rows[-1]["reward_accuracy"] == 1
    assert rows[-1]["reward_margin"] == pytest.approx(rows[-1]["reward_chosen"] - rows[-1]["reward_rejected"], abs=1e-5)
    if changes:
        words = ["--model", str(home / "start.safetensors"), "--adapter", str(home / "a/adapter.safetensors")]
        merge.main([*words, "--out", str(home / "merged.safetensors")])


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 4, "dropout": 0.3}}], ids=["whole", "dropout"])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_the_micro_batch_decides_nothing(home, micro_batch, changes):
    wanted = run(home, "a", train={"steps": 3}, **changes)[0]
    for name, value in run(home, "b", micro_batch=micro_batch, train={"steps": 3}, **changes)[0].items():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=1e-5)


def test_nothing_goes_on_with_another_vocabulary(home, monkeypatch):
    def words(number):
        return "".join(f"{(place * number) % 101 + 1} {chr(place)!r} 1\n" for place in range(32, 127))

    (home / "words").mkdir()
    file, gradient, left = home / "words/vocab.txt", loop._gradient, [5]

    def stopped(*given):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return gradient(*given)

    file.write_text(words(1))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "_gradient", stopped)
        run(home, "cut", tokenizer=home / "words")
    file.write_text(words(7))
    again, wanted = run(home, "cut", tokenizer=home / "words"), run(home, "whole", tokenizer=home / "words")
    assert all(torch.equal(value, again[0][name]) for name, value in wanted[0].items())


def test_every_setting_of_its_own_changes_what_is_learned(home):
    seen = []
    for own in ({}, {"beta": 0.5}, {"smoothing": 0.2}, {"loss": "ipo"}):
        seen.append(run(home, f"{len(seen)}", train={"steps": 3}, dpo=own)[0]["head.weight"])
    assert all(not torch.equal(a, b) for n, a in enumerate(seen) for b in seen[:n])


def test_weights_that_the_last_step_made_useless_are_not_written(home):
    with pytest.raises(PipeError, match=r"^the last step left NaN or infinity in \S+, so nothing is made"):
        run(home, "a", train={"steps": 1, "warmup": 0, "lr": 3e38, "clip": 1e9})
    assert not (home / "a/model.safetensors").exists()


def test_pairs_that_cannot_be_used_are_told_in_one_line(home):
    with pytest.raises(DataError, match="pairs.jsonl:1: the answers are equal within 3 tokens|nothing of an answer"):
        run(home, "a", train={"ctx_len": 2})
    with pytest.raises(DataError, match="12 pairs are fewer than the 64"):
        run(home, "a", train={"batch": 64})
    write_jsonl(home / "pairs.jsonl", [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(DataError, match="pairs.jsonl:1: no `rejected`"):
        run(home, "a")
    with pytest.raises(ConfigError, match="state trains the initial states alone"):
        run(home, "a", state=True, lora={"rank": 2})
