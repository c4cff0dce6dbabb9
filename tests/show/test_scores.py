import csv
import io
import json

from rwkvpipe.show import scores
from rwkvpipe.show.evidence import Evidence, Score, read_story


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


def test_guessing_is_told_where_it_is_known():
    assert "guessing gives 25.0 %" in scores.told("b", [score(0.5, chance=0.25)])
    assert "guessing" not in scores.told("b", [score(0.5)])
