"""Trackers are told what metrics.jsonl is told, and one that cannot be used is named before the first step."""

import json
import sys
import types

import numpy as np
import pytest
import torch

from rwkvpipe import sft
from rwkvpipe.base.config import LoraConfig, RwkvConfig, Settings, TrainConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.base.files import write_json
from rwkvpipe.data.binidx import BinidxWriter
from rwkvpipe.model.family import build
from rwkvpipe.train import loop
from rwkvpipe.weights import store


class Fake(types.ModuleType):
    """A service's module that notes what it is told."""

    class errors:
        class Error(Exception):
            pass

    def __init__(self, name, refuses=None):
        super().__init__(name)
        self.told, self.refuses = [], refuses

    def init(self, **given):
        if self.refuses:
            raise self.refuses
        self.told.append(("init", given))

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self):
        self.told.append(("finish", None))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    (tmp_path / "corpus").mkdir()
    with BinidxWriter(tmp_path / "corpus/train", np.uint16) as writer:
        for n in range(8):
            writer.add([n + 1, 2, 3, 0], [0, 0, 1, 1])
    write_json(tmp_path / "corpus/corpus.json", {"vocab_size": 24})
    model = build(RwkvConfig(n_layer=2, n_embd=16, head_size=16, vocab_size=24))
    model.initialise(0)
    store.write_tensors(tmp_path / "start.safetensors", model.state_dict())
    train = TrainConfig(steps=6, ctx_len=8, batch=2, lr=1e-3, log_every=2)
    settings = Settings(kind="sft", seed=1, train=train, lora=LoraConfig(rank=1))
    write_json(tmp_path / "settings.json", settings.model_dump(mode="json"))
    return tmp_path


def run(home, *names):
    words = [
        "--model",
        home / "start.safetensors",
        "--data",
        home / "corpus",
        "--out",
        home / "r/s/adapter.safetensors",
    ]
    words += [word for name in names for word in ("--track", name)]
    sft.main([str(word) for word in [home / "settings.json", *words]])
    return [json.loads(line) for line in (home / "r/s/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_service_is_told_every_line_and_goes_on_in_the_same_run(home, monkeypatch, name):
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)

    class Stop(BaseException):
        pass

    def stop(training, stream, losses, advance=loop._Training.advance):
        if training.progress.step == 3 and len(fake.told) < 4:
            raise KeyboardInterrupt
        advance(training, stream, losses)

    monkeypatch.setattr(loop._Training, "advance", stop)
    with pytest.raises(loop.Stopped):
        run(home, name)
    assert [what for what, _ in fake.told] == ["init", 1, 2, "finish"]
    rows = run(home, name)
    assert [what for what, _ in fake.told[4:]] == ["init", 4, 6, "finish"]
    first, second = (given for what, given in fake.told if what == "init")
    assert first == second and first["resume"] == "allow" and first["name"] == "r/s"
    assert first["config"]["train"]["steps"] == 6
    told = {step: values for step, values in fake.told if isinstance(step, int)}
    assert told[4]["loss"] == rows[2]["loss"] and rows[2]["step"] == 4


def test_tensorboard_keeps_its_files_beside_the_results(home, monkeypatch):
    told = []

    class Writer:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            told.append((name, step))

        def flush(self):
            told.append("flush")

        def close(self):
            told.append("close")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    run(home, "tensorboard")
    assert told[0] == (str(home / "r/s/tensorboard"), 1) and told[-1] == "close"
    assert ("loss", 1) in told and ("lr", 6) in told and not any(line[0] == "step" for line in told)


def test_one_that_is_absent_or_not_logged_in_is_named_before_the_first_step(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="track: wandb is not installed here; pip install wandb"):
        run(home, "wandb")
    monkeypatch.setitem(sys.modules, "wandb", Fake("wandb", Fake.errors.Error("no API key\nmore")))
    with pytest.raises(ConfigError, match="track: wandb: no API key; log in, or set WANDB_MODE=offline"):
        run(home, "wandb")
    assert not (home / "r/s/checkpoints/log.jsonl").exists()


def test_trackers_decide_no_weight(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Fake("wandb"))
    run(home)
    alone = store.read_tensors(home / "r/s/adapter.safetensors")[0]
    (home / "r/s/adapter.safetensors").unlink()
    run(home, "wandb")
    found = store.read_tensors(home / "r/s/adapter.safetensors")[0]
    assert all(torch.equal(found[name], value) for name, value in alone.items())
