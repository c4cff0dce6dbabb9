"""The loop resumes bit for bit, stops before bad numbers, and its log has each step once."""

import logging
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import DataError, PipeError, Stopped
from rwkvpipe.train import checkpoint
from rwkvpipe.train.loop import Hooks, Run, fit, step_seed
from rwkvpipe.train.record import MEASURED, Log

CONFIG = TrainConfig(steps=12, warmup=2, lr=0.05, log_every=3, valid_every=4, weight_decay=0.1)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.body(self.frozen(x)))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 4, generator=generator)
    return SimpleNamespace(x=x, targets=torch.ones(6, dtype=torch.long), step=step)


class Stream:
    """Batches by step that can break off at one of them."""

    def __init__(self, stop_at=None, error=None):
        self.stop_at, self.error, self.first = stop_at, error, None

    def __call__(self, first, carried):
        self.first, step = first, first
        while True:
            if step == self.stop_at:
                raise self.error
            yield batch(step)
            step += 1


def losses(model, batch):
    for rows in batch.x.split(3):
        yield model(rows).square().sum() / 6


def run(folder, stream=None, **changes):
    model = Toy()
    validate = changes.pop("validate", lambda model: float(model.body.weight.detach().sum()))
    config = CONFIG.model_copy(update=changes)
    hooks = Hooks(validate=validate)
    log = fit(model, stream or Stream(), losses, config=config, run=Run(folder, "mark", 5, 7), hooks=hooks)
    return model, log


def timeless(log):
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in log.rows()]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("at", [0, 1, 5, 7, 11])
def test_a_killed_run_ends_in_the_same_weights_and_the_same_log(tmp_path, at, error):
    whole, log = run(tmp_path / "whole")
    expected = Stopped if error is KeyboardInterrupt else error
    with pytest.raises(expected):
        run(tmp_path / "cut", Stream(at, error()))
    second = Stream()
    resumed, again = run(tmp_path / "cut", second)
    assert second.first == (at if error is KeyboardInterrupt else at // 5 * 5)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert timeless(log) == timeless(again)
    assert [row["step"] for row in again.rows()] == [1, 3, 4, 6, 8, 9, 12]


def test_a_stop_between_a_step_and_its_line_loses_no_line(tmp_path):
    whole, log = run(tmp_path / "whole")
    calls = []

    def interrupted(model):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return float(model.body.weight.detach().sum())

    with pytest.raises(Stopped):
        run(tmp_path / "cut", validate=interrupted)
    resumed, again = run(tmp_path / "cut")
    assert timeless(log) == timeless(again)
    assert torch.equal(whole.body.weight, resumed.body.weight)


def test_a_folder_that_vanishes_under_a_resume_point_leaves_none_without_its_lines(tmp_path, monkeypatch):
    whole, log = run(tmp_path / "whole")
    save = checkpoint.save

    def saved(folder, step, *given, **named):
        if step == 10:
            shutil.rmtree(folder)
        save(folder, step, *given, **named)

    monkeypatch.setattr(checkpoint, "save", saved)
    with pytest.raises(DataError, match="vanished"):
        run(tmp_path / "cut")
    monkeypatch.undo()
    _, again = run(tmp_path / "cut")
    assert timeless(log) == timeless(again)


def test_a_signal_inside_a_step_waits_for_its_end(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measures = iter(range(100))

        def kill():
            if next(measures) == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return {}

        with pytest.raises(Stopped, match="after step 7"):
            fit(
                Toy(), Stream(), losses, config=CONFIG, run=Run(tmp_path / "cut", "mark", 5, 7),
                hooks=Hooks(measures=kill, validate=lambda model: float(model.body.weight.detach().sum())),
            )  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, before)
    whole, log = run(tmp_path / "whole")
    resumed, again = run(tmp_path / "cut")
    assert torch.equal(whole.body.weight, resumed.body.weight)
    assert timeless(log) == timeless(again)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_before_the_weights(tmp_path, bad):
    model = Toy()
    kept = {}

    def poisoned(model, batch):
        if batch.step == 4:
            kept.update({name: value.clone() for name, value in model.state_dict().items()})
            yield model(batch.x).sum() * bad
        yield from losses(model, batch)

    with pytest.raises(PipeError, match="step 5: the loss is (nan|inf)"):
        fit(model, Stream(), poisoned, config=CONFIG, run=Run(tmp_path, "m", 5, 7))
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    def steep(model, batch):
        # the value is 0, its slope is not a number
        yield (model(batch.x) * 0).sum().sqrt()

    with pytest.raises(PipeError, match="step 1: the norm of the gradient"):
        fit(Toy(), Stream(), steep, config=CONFIG, run=Run(tmp_path, "m", 5, 7))


def test_a_step_without_targets_is_harmless(tmp_path):
    def empty(model, batch):
        if batch.step != 2:
            yield from losses(model, batch)

    log = fit(Toy(), Stream(), empty, config=CONFIG, run=Run(tmp_path, "m", 5, 7))
    assert log.rows()[-1]["step"] == 12


def test_another_mark_starts_again_and_says_so(tmp_path, caplog):
    with pytest.raises(Stopped):
        run(tmp_path, Stream(7, KeyboardInterrupt()))
    stream = Stream()
    with caplog.at_level(logging.INFO, logger="rwkvpipe"):
        fit(Toy(), stream, losses, config=CONFIG, run=Run(tmp_path, "other", 5, 7))
    assert stream.first == 0
    assert "starts again" in caplog.text


def test_what_batches_carry_comes_back(tmp_path):
    seen = []

    def batches(first, carried):
        seen.append(carried)
        yield from Stream(7 if len(seen) == 1 else None, KeyboardInterrupt())(first, carried)

    hooks = Hooks(carry=lambda: {"buffer": torch.arange(3)})
    for expected in (pytest.raises(Stopped), pytest.MonkeyPatch().context()):
        with expected:
            fit(Toy(), batches, losses, config=CONFIG, run=Run(tmp_path, "m", 5, 7), hooks=hooks)
    assert seen[0] == {}
    assert torch.equal(seen[1]["buffer"], torch.arange(3))


def test_frozen_weights_are_in_no_checkpoint(tmp_path):
    run(tmp_path)
    from rwkvpipe.weights.store import read_tensors

    names = read_tensors(sorted(tmp_path.glob("*.safetensors"))[-1])[0].keys()
    assert not [name for name in names if "frozen" in name]


def test_metrics_are_means_since_the_last_line(tmp_path):
    often = CONFIG.model_copy(update={"log_every": 1})
    every = fit(Toy(), Stream(), losses, config=often, run=Run(tmp_path / "a", "m", 5, 7))
    some = fit(Toy(), Stream(), losses, config=CONFIG, run=Run(tmp_path / "b", "m", 5, 7))
    wanted = [row["loss"] for row in every.rows()]
    rows = {row["step"]: row for row in some.rows()}
    assert rows[6]["loss"] == pytest.approx(sum(wanted[3:6]) / 3)
    assert rows[12]["tokens"] == 72
    named = {"step", "tokens", "loss", "lr", "grad_norm", "target_fraction", *MEASURED}
    assert rows[6].keys() == named and rows[6]["target_fraction"] == 1 and rows[6]["memory_mb"] > 1


def test_a_torn_last_line_is_no_row(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.cut(0)
    for step in (1, 2, 3):
        log.add({"step": step})
    with open(log.path, "ab") as file:
        file.write(b'{"step": 4, "lo')
    assert [row["step"] for row in log.rows()] == [1, 2, 3]
    log.cut(2)
    log.add({"step": 3})
    assert [row["step"] for row in log.rows()] == [1, 2, 3]


def test_the_seed_of_a_step_is_its_own():
    assert len({step_seed(seed, step) for seed in range(50) for step in range(50)}) == 2500
