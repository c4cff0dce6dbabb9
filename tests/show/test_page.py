import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from rwkvpipe.base.agree import parse
from rwkvpipe.plan import Plan
from rwkvpipe.show.evidence import Evidence, read_story
from rwkvpipe.show.page import page

VOID = {"meta", "img", "br", "rect", "path", "circle"}


class Reader(HTMLParser):
    """The page as a tree walker sees it: every tag closed in its turn."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"{tag} closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text += data


def told(story: dict) -> str:
    return page(Evidence(read_story(json.dumps(story))))


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


def test_best_weights_that_were_measured_have_a_card_and_are_no_stage(finished_run):
    chat = next(n for n, subject in enumerate(finished_run["subjects"]) if subject["name"] == "chat")
    given, before = finished_run["subjects"][chat], read(told(finished_run)).text
    best = {"name": "chat.best", "kind": "best", "start": "chat", "bench": given["bench"]}
    finished_run["subjects"].insert(chat + 1, best | {"folder": given["folder"]})  # the same answers stand for others
    text = read(told(finished_run)).text
    assert "those of chat at its lowest held-out loss" in text and "The weights of chat at its lowest held-out" in text
    assert text.count("chat.best") > before.count("chat.best") == 0
    stages = [len(set(re.findall(r"Stage \d+", each))) for each in (before, text)]
    assert stages[0] == stages[1] > 1 and read(told(finished_run)).text.count("Training time") == before.count(
        "Training time"
    )


def test_the_page_is_well_formed_and_needs_nothing_but_itself(finished_run):
    text = told(finished_run)
    reader = read(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "video"} & set(reader.tags)
    assert not re.search(r"@import|url\(|https?://", text)
    for _, name, value in reader.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "action", "data"), name
        assert name != "href" or value.startswith("#"), value
    assert "default-src 'none'" in text


def test_every_link_has_its_target(finished_run):
    reader = read(told(finished_run))
    targets = [value for _, name, value in reader.attributes if name == "id"]
    links = {value[1:] for _, name, value in reader.attributes if name == "href"}
    assert links <= set(targets) and len(targets) == len(set(targets))


def test_every_score_and_interval_is_on_the_page(finished_run):
    reader = read(told(finished_run))
    for path in sorted(Path("results/demo").glob("*/bench/*.json")):
        value = json.loads(path.read_text())
        assert f"{100 * value['score']:.1f} %" in reader.text
        assert f"{100 * value['low']:.1f} to {100 * value['high']:.1f} %" in reader.text


def test_the_head_tells_the_scores_of_the_last_stage(finished_run):
    head = read(told(finished_run)).text.split("pretraining")[0]
    assert "94.3 %" in head and "95.7 %" in head and "exact after reason" in head and "41.2 %" not in head
    chat = next(subject for subject in finished_run["subjects"] if subject["name"] == "chat")
    came = {"name": "released", "kind": "weights", "bench": chat["bench"], "folder": chat["folder"]}
    finished_run["subjects"].append(came)  # what came is told first, and is not what the run came to
    html = told(finished_run)
    text = read(html).text
    assert text.split("pretraining")[0].count("95.7 %") == head.count("95.7 %") and "released" in text
    assert "exact after reason" in text.split("pretraining")[0]
    assert [name for name, _ in re.findall(r'<section id="at-(\w+)"( )class="stage"', html)][:2] == ["released", "base"]
    assert re.findall(r'<h3><a href="#at-(\w+)"', html)[-1] == "reason"  # what the eye is led to


def test_every_step_is_in_the_graph_with_its_time(finished_run):
    text = told(finished_run)
    titles = re.findall(r"<g [^>]*><title>([^<]*): ([^<]*)</title>", text)
    assert {name for name, _ in titles} == {step["id"] for step in finished_run["steps"]}
    seconds = json.loads(Path("results/demo/base/log/pretrain.jsonl").read_text())["s"]
    assert f"{seconds // 60:.0f} min {round(seconds) % 60:02d} s" in dict(titles)["pretrain base"]


def test_each_stage_has_its_curves_samples_and_graded_answers(finished_run):
    cards = re.findall(r'<section id="at-(\w+)" class="stage">(.*?)</section>', told(finished_run), re.S)
    assert [name for name, _ in cards] == ["base", "chat", "reason"]
    for name, text in cards:
        for title in ("Learning rate", "Gradient norm", "Throughput", "Reward" if name == "reason" else "Loss"):
            assert f"<b>{title}</b>" in text
        assert "<b>12 + 30 =</b><span> 42\n</span>" in text
        assert "CPU, 2 threads, torch 2.9.0" in text
        assert ">right</span>" in text and ">wrong</span>" in text


def test_the_numbers_at_the_ends_of_curves_are_those_of_the_metrics(finished_run):
    text = told(finished_run)
    for stage in ("base", "chat"):
        last = json.loads(Path(f"results/demo/{stage}/metrics.jsonl").read_text().splitlines()[-1])
        card = re.search(rf'<section id="at-{stage}".*?</section>', text, re.S)[0]
        assert card.count(f">{last['loss']:.4g}<") == 2 and f"<b>{last['grad_norm']:.4g}</b>" in card
        assert f"<b>{last['tokens_per_second']:,.0f}</b>" in card


def test_the_config_on_the_page_gives_the_same_run_again(finished_run):
    text = re.search(r"the whole config</summary><pre[^>]*>(.*?)</pre>", told(finished_run), re.S)[1]
    again = Plan(parse(yaml.safe_load(read(text).text), "config"), "results").story()
    assert again == finished_run


@pytest.mark.parametrize(
    "bad", ["</style><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\x00\x1b]0;x\x07", "\ud800"]
)
def test_hostile_text_is_shown_and_not_obeyed(finished_run, bad):
    for file in ("samples.jsonl", "bench/exact.samples.jsonl"):
        row = {"prompt": bad, "text": bad, "question": bad, "answer": bad, "gold": bad, "correct": 0.0}
        Path("results/demo/chat", file).write_text(json.dumps(row) + "\n")
    Path("results/demo/chat/log/sft.log").write_text(f"device: {bad}\n", errors="replace")
    if bad != "\ud800":  # settings and what is made of them have none of these
        finished_run["software"] = {bad: bad}
        finished_run["subjects"][1]["data"] = finished_run["steps"][0]["label"] = bad
    text = told(finished_run)
    reader = read(text)
    assert not {"script", "img"} & set(reader.tags) and "\x00" not in text and "\x1b" not in text
    assert text.encode("utf-8")


def test_missing_evidence_is_told_and_no_error(finished_run):
    for path in Path("results").rglob("*"):
        if path.is_file():
            path.unlink()
    text = read(told(finished_run)).text
    assert "Nothing was measured" in text and "metrics are not there" in text and "settings are not there" in text
    assert "No samples: results/demo/base/samples.jsonl is not there" in text
    assert "steps have no time" in text


def test_a_missing_time_is_told_beside_the_graph(finished_run):
    assert "no time" not in told(finished_run)
    Path("results/demo/base/log/pretrain.jsonl").unlink()
    text = told(finished_run)
    assert f"1 of {len(finished_run['steps'])} steps have no time" in text and "pretrain base: not measured" in text


def test_weights_that_are_only_measured_make_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "run": "given",
        "weights": {
            "released": {"path": "a.pth", "adapter": "tuned", "tokenizer": "bytes", "bench": ["text"]},
        },
        "tokenizers": {"bytes": {"kind": "bytes"}},
        "benchmarks": {"text": {"task": "bits", "path": "a.txt"}},
    }
    story = Plan(parse(config, "config"), "results").story()
    score = {"task": "bits", "n": 40, "score": 2.512, "low": 2.44, "high": 2.6, "better": "lower"}
    home = Path(story["subjects"][0]["folder"], "bench")
    home.mkdir(parents=True)
    (home / "text.json").write_text(json.dumps(score))
    (home / "text.samples.jsonl").write_text('{"text": "To be", "bits": 2.5}\n')
    text = read(told(story)).text
    assert "2.512" in text and "2.440 to 2.600" in text and "text, released" in text and "a.pth" in text
    assert "<dt>Adapter</dt><dd>tuned</dd>" in told(story)


def test_adapters_are_not_counted_among_the_weights_of_the_model(finished_run):
    assert "Weights of the model" in told(finished_run)
    finished_run["subjects"] = [subject for subject in finished_run["subjects"] if subject["name"] != "base"]
    assert all(subject["lora"] for subject in finished_run["subjects"])
    text = told(finished_run)
    assert "Weights and adapters" in text and "Weights of the model" not in text


def test_a_run_of_nothing_makes_a_page():
    assert "Nothing was measured" in told({"run": "empty", "config": {"run": "empty"}, "subjects": []})
