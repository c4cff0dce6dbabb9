import csv
import json
import subprocess
import sys

import pytest

from rwkvpipe.base.errors import DataError
from rwkvpipe.plot import main
from rwkvpipe.show.figures import curves
from rwkvpipe.show.metrics import Metrics

BASIC = {"loss.png", "lr.png", "grad_norm.png", "throughput.png", "metrics.csv"}


def line(step, **more):
    row = {"step": step, "tokens": 64 * step, "loss": 3.0 / step, "lr": 1e-3, "grad_norm": 1.0 / step}
    return row | {"tokens_per_second": 900.0 + step, "seconds": 0.1 * step} | more


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_stage_gets_four_figures_and_its_numbers(tmp_path):
    rows = [line(1), line(2, valid_loss=1.25), line(3)]
    main([written(tmp_path / "metrics.jsonl", rows), "--out", str(tmp_path / "plots")])
    assert {file.name for file in (tmp_path / "plots").iterdir()} == BASIC
    for file in (tmp_path / "plots").glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "plots/metrics.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in found] == [row["loss"] for row in rows]
    assert [row["valid_loss"] for row in found] == ["", "1.25", ""]


def test_policy_training_also_gets_rewards(tmp_path):
    more = {"mean_reward": 0.5, "reward_std": 0.1, "kl_div": 0.0, "completions/clipped_ratio": 0.0}
    rows = [line(n, loss=0.0, grad_norm=0.0, **more) for n in range(1, 90)]
    main([written(tmp_path / "metrics.jsonl", rows), "--out", str(tmp_path / "plots")])
    assert {file.name for file in (tmp_path / "plots").iterdir()} == BASIC | {"reward.png"}


def test_a_figure_of_rewards_has_a_panel_for_what_was_measured_alone():
    more = {"clip_ratio": 0.1, "completions/mean_length": 4.0, "completions/clipped_ratio": 0.0}
    rows = [line(n, mean_reward=0.5, **more) for n in range(1, 4)]
    without = [axes.get_title(loc="left") for axes in curves(Metrics(rows))["reward"].axes]
    assert without == ["Reward", "Clipped ratios", "Length of completions", "Completions cut short"]
    found = [
        axes.get_title(loc="left") for axes in curves(Metrics([row | {"kl_div": 0.1} for row in rows]))["reward"].axes
    ]
    assert found == ["Reward", "Divergence from the start", "Clipped ratios", "Length of completions"]


def test_equal_metrics_give_equal_bytes(tmp_path):
    metrics = written(tmp_path / "metrics.jsonl", [line(n) for n in range(1, 60)])
    for folder in ("one", "two"):
        main([metrics, "--out", str(tmp_path / folder)])
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_a_single_step_can_be_drawn(tmp_path):
    main([written(tmp_path / "metrics.jsonl", [line(1)]), "--out", str(tmp_path / "plots")])
    assert {file.name for file in (tmp_path / "plots").iterdir()} == BASIC


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", ":1: ", "empty"),
        ("\n\n", ":1: ", "empty"),
        (json.dumps(line(1)) + "\n\n{oops\n", ":3: ", "not JSON"),
        (json.dumps(line(1)) + "\n\n" + json.dumps(line(2, loss="low")) + "\n", ":3: ", "loss is 'low'"),
        (json.dumps(line(1, loss=float("nan"))) + "\n", ":1: ", "loss is nan"),
        (json.dumps({"step": 1}) + "\n", ":1: ", "tokens is missing"),
        (json.dumps(line(2)) + "\n" + json.dumps(line(2)) + "\n", ":2: ", "steps must rise"),
        ("[1]\n", ":1: ", "object"),
    ],
)
def test_broken_metrics_are_named_with_their_line(tmp_path, text, where, what):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError) as error:
        main([str(tmp_path / "metrics.jsonl"), "--out", str(tmp_path / "plots")])
    assert f"metrics.jsonl{where}" in str(error.value) and what in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "plots").exists()


def test_missing_metrics_are_an_error_in_one_line(tmp_path):
    command = [sys.executable, "-m", "rwkvpipe.plot", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "plots")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "none.jsonl: there is no such file" in done.stderr and len(done.stderr.splitlines()) == 1
