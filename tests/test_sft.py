"""Tuning learns the marked tokens and no others."""

import json

import numpy as np
import pytest
import torch

from rwkvpipe import sft
from rwkvpipe.base.config import LoraConfig, RwkvConfig, Settings, TrainConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import write_json
from rwkvpipe.data.binidx import Binidx, BinidxWriter
from rwkvpipe.model.family import build
from rwkvpipe.train.heldout import held_out_loss, windows
from rwkvpipe.weights import store

MODEL = RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=24)


def write_corpus(folder, noise):
    """Questions of noise, answers that double their first token; only the answer is a target."""
    stream = np.random.default_rng(0)
    wild = np.random.default_rng(noise)
    for part, count in (("train", 30), ("valid", 6)):
        with BinidxWriter(folder / part, np.uint16) as writer:
            for _ in range(count):
                first = int(stream.integers(1, 12))
                question = [int(n) for n in wild.integers(12, 24, 4)]
                writer.add([*question, first, 2 * first - 1, 0], [0, 0, 0, 0, 0, 1, 1])
    write_json(folder / "corpus.json", {"vocab_size": 24})


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus", noise=1)
    model = build(MODEL)
    model.initialise(0)
    store.write_tensors(tmp_path / "start.safetensors", model.state_dict())
    return tmp_path


def run(home, name, lora=None, data=("corpus",), mix=(), **train):
    asked = {"steps": 60, "ctx_len": 16, "batch": 8, "lr": 0.01, "warmup": 1, "log_every": 10} | train
    value = Settings(kind="sft", seed=5, train=TrainConfig(**asked), lora=lora, mix=mix)
    write_json(home / "settings.json", value.model_dump(mode="json"))
    path = home / name / ("adapter.safetensors" if lora else "model.safetensors")
    sft.main([
        str(home / "settings.json"), "--model", str(home / "start.safetensors"),
        "--data", *(str(home / each) for each in data),
        "--micro-batch", "3", "--out", str(path),
    ])  # fmt: skip
    rows = [json.loads(line) for line in (home / name / "metrics.jsonl").read_text().splitlines()]
    return store.read_tensors(path)[0], rows


def test_the_answers_are_learned(home):
    rows = run(home, "a")[1]
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert rows[-1]["valid_loss"] < rows[0]["loss"] / 2


def test_an_adapter_learns_them_too(home):
    tensors, rows = run(home, "a", LoraConfig(rank=4, full=("head",), targets=("att.value", "ffn.key")))
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert set(tensors) == {"head.weight"} | {
        f"blocks.{n}.{m}.lora_{x}" for n in (0, 1) for m in ("att.value", "ffn.key") for x in "AB"
    }


def test_a_corpus_without_masks_is_refused(home):
    (home / "corpus" / "train.mask").unlink()
    with pytest.raises(DataError, match="no packed corpus for sft"):
        run(home, "a")


@pytest.mark.parametrize("ctx_len", [3, 6, 64])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_held_out_loss_reads_every_target_once(home, ctx_len, rows):
    data = Binidx(home / "corpus" / "valid")
    found = list(windows(data, ctx_len, rows, masked=True))
    assert sum(int(batch.mask.sum()) for batch in found) == 12
    plain = list(windows(data, ctx_len, rows, masked=False))
    assert sum(int((batch.targets >= 0).sum()) for batch in plain) == len(data) - 1
    model = build(MODEL)
    model.initialise(0)
    config = TrainConfig(steps=1, ctx_len=64)
    whole = held_out_loss(data, config, rows, masked=True)(model)
    assert whole == pytest.approx(held_out_loss(data, config, 2, masked=True)(model), abs=1e-6)
    assert 0 < whole < 10
    assert torch.isfinite(torch.tensor(whole))


def test_what_weighs_more_is_learned_more_and_all_weights_doubled_are_the_same(home):
    masks = {}
    for part in ("train", "valid"):
        found = Binidx(home / f"corpus/{part}").mask(0, len(Binidx(home / f"corpus/{part}"))).astype("<f4")
        masks[part] = found * np.where(np.arange(len(found)) // 7 % 2, 4.0, 0.5)
    made = {}
    for name, by in (("plain", None), ("one", 1), ("two", 2)):
        for part, found in masks.items() if by else ():
            (found * by).astype("<f4").tofile(home / f"corpus/{part}.mask")
        made[name] = run(home, name, steps=3, log_every=1)
    losses = {name: [(row["loss"], row["grad_norm"]) for row in rows] for name, (_, rows) in made.items()}
    assert losses["one"] == losses["two"] and losses["one"][0] != losses["plain"][0]
    assert all(torch.equal(value, made["two"][0][name]) for name, value in made["one"][0].items())
    assert made["one"][1][-1]["target_fraction"] == made["plain"][1][-1]["target_fraction"]


@pytest.mark.slow
def test_talks_of_several_corpora_are_learned_together(home):
    (home / "other").mkdir()
    write_corpus(home / "other", noise=2)
    rows = run(home, "a", data=("corpus", "other"), mix=(1, 3), chunk=4)[1]
    assert rows[-1]["loss"] < rows[0]["loss"] / 2 and "valid_loss" in rows[-1]
