import json
from pathlib import Path

import pytest

from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.show.evidence import Evidence, read_story


@pytest.fixture
def evidence(finished_run):
    return Evidence(read_story(json.dumps(finished_run)))


def test_scores_are_those_of_the_files(evidence):
    assert len(evidence.scores) == 6
    for score in evidence.scores:
        value = json.loads(Path(f"results/demo/{score.subject}/bench/{score.benchmark}.json").read_text())
        assert (score.n, score.score, score.low, score.high) == tuple(value[k] for k in ("n", "score", "low", "high"))


def test_steps_without_a_time_are_left_out(evidence):
    Path("results/demo/base/log/pretrain.jsonl").unlink()
    Path("results/demo/chat/log/sft.jsonl").write_text('{"s": "NA"}\n')
    Path("results/demo/reason/log/grpo.jsonl").write_text("")
    Path("results/demo/base/log/plot.jsonl").write_text('{"s": NaN}\n')
    Path("results/demo/base/log/init.jsonl").write_text('{"s": 1.5, "max_rss": "NA"}\n')
    assert not {"pretrain base", "sft chat", "grpo reason", "plot base"} & set(evidence.timings)
    assert evidence.timings["init base"].megabytes is None


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("base/bench/exact.json", "{", "base/bench/exact.json:1: not JSON"),
        ("base/bench/exact.json", "[]", "base/bench/exact.json:1: a JSON object"),
        ("base/bench/exact.json", '{"n": 3, "score": NaN, "low": 0, "high": 1}', "exact.json: score is nan"),
        ("base/bench/exact.json", '{"n": 3, "score": 0.5, "high": 1}', "exact.json: low is None"),
        ("base/bench/exact.json", '{"n": 3, "score": 0.5, "low": 0.6, "high": 1}', "exact.json: score 0.5 is outside"),
        ("chat/bench/pick.samples.jsonl", '{"correct": 1}\n{', "chat/bench/pick.samples.jsonl:2: not JSON"),
        ("chat/samples.jsonl", "3\n", "chat/samples.jsonl:1: a JSON object"),
        ("base/log/pretrain.jsonl", "s\th:m:s\n", "base/log/pretrain.jsonl:1: not JSON"),
        ("chat/metrics.jsonl", "", "chat/metrics.jsonl:1: the file is empty"),
        ("chat/settings.json", "{}", "chat/settings.json: kind"),
    ],
)
def test_a_broken_file_is_named_in_one_line(finished_run, file, text, what):
    from rwkvpipe.report import main

    Path("results/demo", file).write_text(text)
    with pytest.raises((DataError, ConfigError)) as error:
        main(["--spec", json.dumps(finished_run), "--out", "report.html"])
    assert what in str(error.value) and "\n" not in str(error.value)
    assert not Path("report.html").exists() and not Path("plots").exists()


def test_a_story_that_is_none_is_refused():
    for text in ("", "[]", '{"run": "demo"}', '{"run": "a", "config": {}, "subjects": [{"name": 1}]}'):
        with pytest.raises(ConfigError, match="--spec"):
            read_story(text)
