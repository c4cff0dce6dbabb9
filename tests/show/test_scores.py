import csv
import io
import json
import struct
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rwkvpipe.show import scores
from rwkvpipe.show.evidence import Evidence, Score, read_story
from rwkvpipe.show.figures import save


def score(value, subject="a", task="answer", better="higher", **more):
    return Score(subject, "b", task, 10, value, value - 0.1, value + 0.1, better, **more)


def test_the_best_is_the_lowest_where_lower_is_better():
    assert scores.best([score(0.2), score(0.6), score(0.4)]).score == 0.6
    assert scores.best([score(2.0, better="lower"), score(1.5, better="lower")]).score == 1.5


def test_of_equals_the_last_is_best():
    assert scores.best([score(0.5, "early"), score(0.5, "late")]).subject == "late"


def test_shares_are_told_in_percent_and_bits_are_not():
    assert score(0.943).text(0.943) == "94.3 %" and score(0.5).between == "40.0 to 60.0 %"
    assert score(2.25, task="bits").text(2.25) == "2.250"


def test_an_axis_holds_every_interval():
    assert scores.span([score(0.5), score(0.9)]) == (0.0, 1.0)
    low, high = scores.span([score(2.0, task="bits"), score(1.5, task="bits")])
    assert low < 1.4 and high > 2.1
    assert scores.span([score(0.2, task="bits"), score(900.0, task="bits")])[0] == 0


def test_csv_holds_every_number_in_full(finished_run):
    evidence = Evidence(read_story(json.dumps(finished_run)))
    rows = list(csv.DictReader(io.StringIO(scores.csv(evidence))))
    assert [float(row["low"]) for row in rows] == [score.low for score in evidence.scores]
    assert [row["subject"] for row in rows] == ["base", "base", "chat", "chat", "reason", "reason"]


@pytest.mark.parametrize("name", ["chat", "a_" * 200, "word-" * 30, "twelve-twelve-" * 3, "x" * 45])
def test_a_name_in_the_picture_takes_two_lines_and_keeps_its_ends(name):
    lines = scores._label(name).split("\n")
    assert len(lines) <= 2 and max(map(len, lines)) <= scores.NAME
    joined = "".join(lines)
    assert joined == name or (name.startswith(joined.partition("…")[0]) and name.endswith(joined.rpartition("…")[2]))


def test_a_long_title_is_wrapped_and_a_score_of_0_is_a_whole_dot(finished_run):
    name = "bits-of-" + "a_very_long_" * 9
    for path in Path("results/demo").glob("*/bench/exact.json"):
        path.with_name(f"{name}.json").write_text(json.dumps(json.loads(path.read_text()) | {"benchmark": name}))
    for subject in finished_run["subjects"]:
        subject["bench"] = [name]
    (axes,) = scores.figure(Evidence(read_story(json.dumps(finished_run)))).axes
    lines = axes.get_title(loc="left").split("\n") if axes.get_title(loc="left") else axes.get_title().split("\n")
    assert "".join(lines) == name and max(map(len, lines)) <= scores.TITLE
    assert not any(line.get_clip_on() for line in axes.lines if line.get_marker() == "o")


def test_scores_of_a_thousand_stages_make_a_picture(tmp_path):
    drawn = Figure(figsize=(2, 1000))
    FigureCanvasAgg(drawn)
    save(drawn, tmp_path / "a.png")
    size = struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24])
    assert size[1] <= 32_000


def test_guessing_is_told_where_it_is_known():
    assert "guessing gives 25.0 %" in scores.told("b", [score(0.5, chance=0.25)])
    assert "guessing" not in scores.told("b", [score(0.5)])
