import re

import numpy as np
import pytest

from rwkvpipe.show.chart import Chart, Series, curves, draw, log_ticks, number, step_ticks, thin, ticks
from rwkvpipe.show.metrics import Metrics


def metrics(values, first=1, **more):
    rows = []
    for step, value in enumerate(values, first):
        row = {"step": step, "tokens": step, "loss": value, "lr": 1e-3, "grad_norm": 1.0}
        rows.append(row | {"tokens_per_second": 9.0, "seconds": 1.0} | {name: of(step) for name, of in more.items()})
    return Metrics(rows)


CHART = Chart("Loss", "nats", (Series("loss", "blue", "training"), Series("valid_loss", "orange", "held out")))


@pytest.mark.parametrize(
    "values", [[3.0], [3.0, 3.0], [1.0, 2.0], [0.0] * 50, [0.3, 0.3 + 5e-17], [1e-9, 2e-9], [-5e7, 3e8]]
)
@pytest.mark.parametrize("log", [False, True])
def test_every_point_lies_inside_the_picture(values, log):
    chart = Chart("Loss", "nats", CHART.series, log=log)
    drawn = draw(metrics(values), chart)
    numbers = [float(text) for path in re.findall(r' d="([^"]+)"', drawn) for text in re.findall(r"-?[\d.]+", path)]
    assert numbers and all(-0.5 <= value <= 1000.5 for value in numbers)
    places = [float(text) for text in re.findall(r"(?:left|top):(-?[\d.]+)%", drawn)]
    assert places and all(-0.1 <= place <= 100.1 for place in places)
    assert "nan" not in drawn and "inf" not in drawn


def test_a_column_that_is_not_there_is_not_drawn():
    assert draw(metrics([1.0, 2.0]), Chart("KL", "nats", (Series("kl_div", "plum"),))) == ""
    assert "held out" not in draw(metrics([1.0, 2.0]), CHART)
    assert "held out" in draw(metrics([1.0, 2.0], valid_loss=lambda step: 1.5), CHART)


def test_the_last_numbers_stand_beside_the_title():
    drawn = draw(metrics([3.0, 1.25], valid_loss=lambda step: 1.5), CHART)
    assert re.findall(r"(training|held out)<b>([\d.]+)</b>", drawn) == [("training", "1.25"), ("held out", "1.5")]


def test_policy_training_shows_rewards_and_pretraining_does_not():
    rows = metrics([0.1] * 60, mean_reward=lambda step: step / 60, reward_std=lambda step: 0.1)
    assert "<b>Reward</b>" in curves(rows, "grpo") and 'class="band' in curves(rows, "grpo")
    assert "Reward" not in curves(metrics([0.1]), "sft")
    for title in ("Loss", "Learning rate", "Gradient norm", "Throughput"):
        assert f"<b>{title}</b>" in curves(metrics([0.1]), "pretrain")


def test_preferences_show_both_rewards_and_their_loss_is_that_of_a_pair():
    told = {f"reward_{name}": lambda step: step / 9 for name in ("chosen", "rejected", "margin", "accuracy")}
    page = curves(metrics([0.6, 0.5], **told), "dpo")
    assert "nats a token" not in page and "<b>Loss</b><small>a pair</small>" in page
    for title in ("Rewards", "Margin", "Preferred ahead", "Learning rate"):
        assert f"<b>{title}</b>" in page
    assert re.findall(r"(preferred|other)<b>([\d.]+)</b>", page) == [("preferred", "0.2222"), ("other", "0.2222")]


def test_a_share_that_is_always_none_is_drawn_at_the_bottom_of_0_to_1():
    for values in ([0.0, 0.0], [0.0]):
        places = re.findall(r'class="grid" style="top:([\d.]+)%"><span>([^<]+)', draw(metrics(values), CHART))
        assert [text for _, text in places][:1] == ["0"] and places[0][0] == "100.00" and "-" not in str(places)


def test_thinning_loses_no_peak():
    values = np.random.default_rng(1).normal(size=100_000)
    values[54_321] = 99.0
    steps, kept = thin(np.arange(100_000.0), values)
    assert len(kept) < 600 and 99.0 in kept and kept[0] == values[0] and kept[-1] == values[-1]
    assert (np.diff(steps) > 0).all()


def test_ticks_are_round_and_few():
    assert ticks(0, 1200) == [0, 250, 500, 750, 1000]
    assert log_ticks(0.3, 20) == [1, 10] and log_ticks(0.45, 3.1) == [0.5, 1, 2]
    for low, high in ((0, 1e-6), (-3, 7), (99.5, 100.5), (1e8, 9e9)):
        assert 2 <= len(ticks(low, high)) <= 8


def test_steps_below_a_picture_stand_apart():
    assert step_ticks(0, 3000, 100) == [(n, number(n)) for n in (0, 500, 1000, 1500, 2000, 2500, 3000)]
    for high in (1, 7, 90_000, 300_000, 2_999_999, 3e9, 1e15):
        shown = step_ticks(0, high, 30)
        assert shown and sum(len(text) + 2 for _, text in shown) <= 30
        assert all(0 <= tick <= high and tick == int(tick) for tick, _ in shown)
    assert step_ticks(0.9, 1.1, 30) == [(1, "1")]


def test_numbers_take_little_room():
    found = [number(n) for n in (0, 0.05, 12000, 3e-5, 7.5e-4, 1.23456, -2e7)]
    assert found == ["0", "0.05", "12,000", "3e-5", "7.5e-4", "1.235", "-2e7"]
