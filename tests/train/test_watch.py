"""The best weights are kept, patience ends, bad steps are named, and a longer run goes on where a shorter one ended."""

import json
import logging
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import PipeError, Stopped
from rwkvpipe.show.metrics import read_metrics
from rwkvpipe.train import checkpoint
from rwkvpipe.train.loop import Hooks, Run, best_file, fit
from rwkvpipe.train.record import MEASURED
from rwkvpipe.weights.store import read_tensors

CONFIG = {"steps": 12, "warmup": 2, "lr": 0.05, "log_every": 3, "weight_decay": 0.1}


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(4, 4)


@dataclass
class Stream:
    """Batches by step; the loss of some steps is multiplied, and one of them is never reached."""

    factors: dict
    stop_at: int = -1
    first: int = -1

    def __call__(self, first, carried):
        self.first, step = first, first
        while True:
            if step == self.stop_at:
                raise KeyboardInterrupt
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            targets = torch.tensor([1, 1, 1, 1, -1, -1])
            yield SimpleNamespace(x=x, targets=targets, mask=torch.tensor([1, 0, 0, 0, 1, 1]), step=step)
            step += 1

    def losses(self, model, batch):
        yield model.body(batch.x).square().mean() * self.factors.get(batch.step, 1.0)


def run(folder, *, factors=None, stop_at=-1, stem="stem", valid=None, keep=2, **changes):
    model, stream = Toy(), Stream(factors or {}, stop_at)
    config = TrainConfig(**(CONFIG | changes))
    hooks = Hooks(valid and (lambda model: valid(model)), read=lambda step: f"document {step}")
    where = Run(folder, f"mark {config.steps} {config.schedule}", 5, 7, stem=stem, keep=keep)
    log = fit(model, stream, stream.losses, config=config, run=where, hooks=hooks)
    return model.body.weight.detach(), log, stream.first


def timeless(log):
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in log.rows()]


@pytest.mark.parametrize("factor, said", [(math.nan, "the loss is nan"), (1e6, "over 10 times its mean of")])
def test_a_bad_step_stops_and_is_named_with_what_it_read(tmp_path, factor, said):
    with pytest.raises(PipeError, match=rf"step 5: .*{said}.*no weight was moved.*\(it read document 4\)"):
        run(tmp_path, factors={4: factor}, watch={"spike": 10})


def test_a_skipped_step_does_not_leave_fp16_without_its_factor(tmp_path):
    run(tmp_path, factors={4: math.nan}, precision="fp16", watch={"bad": "skip"})
    assert checkpoint.latest(tmp_path, "mark 12 cosine").notes["scaler"]["size"] == 65536


def test_a_run_of_which_every_step_is_skipped_makes_nothing(tmp_path):
    for _ in range(2):  # and says so again
        with pytest.raises(PipeError, match="^all 12 steps were skipped: no weight was moved"):
            run(tmp_path, factors=dict.fromkeys(range(12), math.nan), watch={"bad": "skip"})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad", ["stop", "skip"])
def test_a_held_out_loss_that_is_no_number_ends_and_is_named(tmp_path, value, bad):
    losses = iter([1.0, value])
    with pytest.raises(PipeError, match=rf"^step 4: the held-out loss is {value}, .*\(step 4 read document 3\)$"):
        run(tmp_path, valid=lambda model: next(losses), valid_every=2, watch={"bad": bad})


def test_a_skipped_step_moves_nothing_and_is_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="rwkvpipe"):
        whole, log, _ = run(tmp_path / "a", factors={4: math.nan, 7: 1e6}, watch={"spike": 10, "bad": "skip"})
    assert re.search(r"step 5 is skipped: the loss is nan \(it read document 4\)", caplog.text)
    assert "step 8 is skipped: the norm of the gradient is" in caplog.text
    assert torch.isfinite(whole).all()
    rows = {row["step"]: row for row in log.rows()}
    assert [rows[step].get("skipped") for step in (1, 3, 6, 9, 12)] == [None, None, 1, 1, None]
    assert all(math.isfinite(row["loss"]) and row["target_fraction"] == 0.25 for row in rows.values())
    with pytest.raises(Stopped):
        run(tmp_path / "b", factors={4: math.nan, 7: 1e6}, watch={"spike": 10, "bad": "skip"}, stop_at=6)
    again, second, first = run(tmp_path / "b", factors={4: math.nan, 7: 1e6}, watch={"spike": 10, "bad": "skip"})
    assert first == 6 and torch.equal(whole, again) and timeless(log) == timeless(second)


def test_a_lasting_rise_is_no_spike_for_long(tmp_path):
    watch = {"spike": 10, "bad": "skip"}
    _, log, _ = run(tmp_path / "a", factors=dict.fromkeys(range(3, 12), 40.0), watch=watch, log_every=1)
    skipped = [row["step"] for row in log.rows() if "skipped" in row]
    assert skipped[0] == 4 and 2 <= len(skipped) <= 6 and skipped == list(range(4, 4 + len(skipped)))
    _, log, _ = run(tmp_path / "b", factors={3: 40.0, 8: 40.0}, watch=watch, log_every=1)
    assert [row["step"] for row in log.rows() if "skipped" in row] == [4, 9]


def test_a_line_that_is_due_at_a_skipped_step_is_written_with_its_held_out_loss(tmp_path):
    """All since the line before were skipped, the first and the last one, too: there is no loss to tell."""
    wrong = dict.fromkeys((0, 3, 4, 5, 10, 11), math.nan)
    asked = {"factors": wrong, "valid": valley, "valid_every": 6, "watch": {"bad": "skip", "best": True}}
    whole, log, _ = run(tmp_path / "a", log_every=3, **asked)
    rows = {row["step"]: row for row in log.rows()}
    assert list(rows) == [1, 3, 6, 9, 12]
    assert [row.get("skipped") for row in rows.values()] == [1, None, 3, None, 2]
    assert [step for step, row in rows.items() if "loss" in row and "grad_norm" in row] == [3, 9, 12]
    assert rows[1].keys() & {"loss", "grad_norm", "valid_loss"} == set() and rows[1]["tokens"] == 4
    assert [step for step, row in rows.items() if "valid_loss" in row] == [6, 12] and log.best_step in (6, 12)
    kept = read_tensors(best_file(tmp_path / "a", log.best_step))[0]["body.weight"]
    assert rows[log.best_step]["valid_loss"] == min(row["valid_loss"] for row in rows.values() if "valid_loss" in row)
    assert torch.equal(kept, whole) == (log.best_step == 12)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f"{json.dumps(row)}\n" for row in log.rows()))
    assert list(read_metrics(metrics).column("loss")[0]) == [3, 9, 12]
    for stop_at in (1, 5, 6, 11):
        with pytest.raises(Stopped):
            run(tmp_path / f"{stop_at}", log_every=3, stop_at=stop_at, **asked)
        again, second, _ = run(tmp_path / f"{stop_at}", log_every=3, **asked)
        assert torch.equal(again, whole) and timeless(second) == timeless(log) and second.best_step == log.best_step


@pytest.mark.parametrize("bad", ["stop", "skip"])
def test_steps_that_teach_nothing_make_no_spike_of_those_that_do(tmp_path, bad):
    """As in grpo, where all completions of a step may be worth the same."""
    nothing = dict.fromkeys((0, 1, 4, 5, 6), 0.0)
    _, log, _ = run(tmp_path, factors=nothing, watch={"spike": 3, "bad": bad}, log_every=1)
    assert [row["step"] for row in log.rows() if row["grad_norm"] == 0] == [1, 2, 5, 6, 7] and len(log.rows()) == 12
    with pytest.raises(PipeError, match="step 9: the norm of the gradient is .*, over 3 times its mean"):
        run(tmp_path / "b", factors=nothing | {8: 1e3}, watch={"spike": 3})


def valley(model) -> float:
    """A held-out loss that falls for a while and rises again: the weights shrink past some size."""
    return abs(float(model.body.weight.detach().norm()) - 0.9)


BEST = {"valid_every": 2, "steps": 40, "watch": {"best": True, "patience": 3}, "schedule": "constant"}


def test_the_best_weights_are_kept_and_patience_ends(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="rwkvpipe"):
        last, log, _ = run(tmp_path / "a", valid=valley, **BEST)
    rows = [row for row in log.rows() if "valid_loss" in row]
    lowest = min(rows, key=lambda row: row["valid_loss"])
    assert rows[-1]["step"] == lowest["step"] + 6 < 40 and log.best_step == lowest["step"]
    assert f"of step {log.best_step}: ended after step {rows[-1]['step']} of 40" in caplog.text
    kept = read_tensors(best_file(tmp_path / "a", log.best_step))[0]["body.weight"]
    short = run(tmp_path / "short", **(BEST | {"steps": log.best_step, "watch": {}}))[0]
    assert torch.equal(kept, short) and not torch.equal(kept, last)
    for stop_at in (log.best_step - 1, log.best_step, log.best_step + 3):
        with pytest.raises(Stopped):
            run(tmp_path / f"{stop_at}", valid=valley, stop_at=stop_at, **BEST)
        again, second, _ = run(tmp_path / f"{stop_at}", valid=valley, **BEST)
        assert torch.equal(again, last) and timeless(second) == timeless(log) and second.best_step == log.best_step
        assert torch.equal(kept, read_tensors(best_file(tmp_path / f"{stop_at}", log.best_step))[0]["body.weight"])


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_points_are_kept_and_the_weights_of_the_best(tmp_path, keep):
    """Also such as only older points name: a run that falls back to one of them needs them."""
    asked = BEST | {"watch": {"best": True}, "keep": keep}
    with pytest.raises(Stopped):
        run(tmp_path, valid=valley, stop_at=33, stem="", **asked)
    assert [int(path.stem[5:]) for path in sorted(tmp_path.glob("step-*.json"))] == [33, *range(30, 0, -5)][:keep][::-1]
    best = checkpoint.noted(tmp_path, "best_step")
    assert {best_file(tmp_path, step) for step in best} == set(tmp_path.glob("best-*.safetensors"))
    run(tmp_path, valid=valley, stem="", **asked)
    assert len(list(tmp_path.glob("step-*.json"))) == keep


def finished(folder, **changes):
    """A run to its end, which leaves what a longer one may go on from."""
    found = run(folder, **changes)
    assert checkpoint.leave(folder, found[1].stem)
    return found


PHASES = {"constant": {"schedule": "constant"}, "wsd": {"schedule": "wsd", "decay": 0.25}}


@pytest.mark.parametrize(
    "short, long, place", [("constant", "constant", 11), ("wsd", "wsd", 8), ("constant", "wsd", 11)]
)
def test_a_longer_run_goes_on_where_a_finished_one_ended(tmp_path, short, long, place):
    whole, log, _ = run(tmp_path / "whole", valid=valley, valid_every=4, **(PHASES[long] | {"steps": 20}))
    finished(tmp_path / "cut", valid=valley, valid_every=4, **(PHASES[short] | {"steps": 11}))
    resumed, second, first = run(tmp_path / "cut", valid=valley, valid_every=4, **(PHASES[long] | {"steps": 20}))
    assert first == place
    assert torch.equal(whole, resumed) and timeless(log) == timeless(second)


def test_the_falling_phase_of_wsd_may_be_entered_twice_from_one_stable_phase(tmp_path):
    for steps in (16, 20):
        whole = run(tmp_path / f"{steps}", **(PHASES["wsd"] | {"steps": steps}))[0]
        again, log, first = run(tmp_path / "one", **(PHASES["wsd"] | {"steps": steps}))
        assert torch.equal(whole, again) and first == {16: 0, 20: 12}[steps]
        assert checkpoint.leave(tmp_path / "one", log.stem)


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "rwkv", "rwkv_exp"])
def test_where_rates_depend_on_the_length_a_longer_run_begins_anew_and_says_so(tmp_path, caplog, schedule, ended):
    log = run(tmp_path / "a", schedule=schedule)[1]
    if ended:
        assert not checkpoint.leave(tmp_path / "a", log.stem)
        checkpoint.clear(tmp_path / "a", log.stem)
    with caplog.at_level(logging.INFO, logger="rwkvpipe"):
        assert run(tmp_path / "a", schedule=schedule, steps=14)[2] == 0
    line = "trained for 12 steps, and 14 have other rates, all of which depend on the length with schedule"
    assert caplog.text.count(f"{line} {schedule}") == 1 and "training starts again" in caplog.text


def test_a_finished_run_that_is_made_again_as_it_was_says_nothing_of_its_length(tmp_path, caplog):
    for _ in range(2):
        log = run(tmp_path / "a")[1]
        checkpoint.clear(tmp_path / "a", log.stem)
    with caplog.at_level(logging.INFO, logger="rwkvpipe"):
        run(tmp_path / "a", stem="other", steps=14)
    assert "other rates" not in caplog.text


def test_a_shorter_run_says_up_to_which_step_its_rates_are_the_same(tmp_path, caplog):
    finished(tmp_path, **PHASES["constant"])
    with caplog.at_level(logging.INFO, logger="rwkvpipe"):
        assert run(tmp_path, **(PHASES["constant"] | {"steps": 8}))[2] == 0
    assert "trained for 12 steps, and 8 have other rates, which are those of 12 up to step 8 alone" in caplog.text


def test_the_best_weights_that_a_resume_point_names_outlive_better_ones(tmp_path):
    losses = iter([5.0, 4.0, 3.0, 2.0, 1.0, 6.0])
    asked = {"schedule": "wsd", "decay": 0.5, "valid_every": 2, "watch": {"best": True}}
    first = finished(tmp_path, valid=lambda model: next(losses), **asked)  # its rate falls after step 6
    assert first[1].best_step == 10
    losses = iter([7.0] * 9)
    second = run(tmp_path, valid=lambda model: next(losses), **(asked | {"steps": 16}))
    assert second[2] == 6 and second[1].best_step == 6 and best_file(tmp_path, 6).is_file()


def test_other_settings_begin_anew_whatever_the_schedule(tmp_path):
    finished(tmp_path, **PHASES["constant"])
    assert run(tmp_path, stem="other", **(PHASES["constant"] | {"steps": 14}))[2] == 0
