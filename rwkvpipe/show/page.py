"""The report as one HTML page that needs nothing but itself."""

from pathlib import Path

import yaml

from rwkvpipe.base.config import PipelineConfig
from rwkvpipe.base.strict import check
from rwkvpipe.show import graph, machine, scores
from rwkvpipe.show.cards import KINDS, card, learned_from, size
from rwkvpipe.show.evidence import Evidence, Subject
from rwkvpipe.show.markup import Html, anchor, count, duration, el, facts, fold, join, rough

TRACKED_FILES = ["style.css"]
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _deed(evidence: Evidence, subject: Subject) -> list[object]:
    """What happened to one subject, as part of a sentence."""
    name = el("a", subject.name, href=f"#{anchor(subject.name)}")
    if subject.kind == "weights":
        return [name, " was measured as it came"]
    settings = evidence.settings(subject)
    model = f" ({size(settings['model'])})" if settings.get("model") else ""
    begin = f"went on from {subject.start}" if subject.start else f"started from nothing{model}"
    means = " with adapters" if subject.lora else ""
    data = learned_from(evidence, subject)
    deed = {
        "pretrain": f" and read {data}",
        "sft": f" and learned to answer from {data}",
        "grpo": f" and learned from the grades of its own answers to {data}",
    }[subject.kind]
    return [name, f" {begin}{means}{deed}"]


def _lead(evidence: Evidence) -> Html:
    """The run in one paragraph."""
    words: list[object] = []
    for number, subject in enumerate(evidence.story.subjects):
        words += ["; " if number else "", *_deed(evidence, subject)]
    words.append(". ")
    for name in evidence.benchmarks:
        found = scores.best(scores.of(evidence, name))
        between = f"{found.text(found.low)} to {found.text(found.high)}"
        words += ["Best on ", name, ": ", el("strong", found.text(found.score)), f" ({found.subject}; 95 % interval {between}). "]
    return el("p", *words, klass="lead")


def _totals(evidence: Evidence) -> Html:
    stages = [subject for subject in evidence.story.subjects if subject.kind != "weights"]
    found = [metrics for subject in stages if (metrics := evidence.metrics(subject)) is not None]
    tiles: dict[str, object] = {}
    if evidence.benchmarks:
        score = scores.best(scores.of(evidence, evidence.benchmarks[0]))
        tiles[f"Best on {score.benchmark}"] = score.text(score.score)
    if found:
        tiles["Tokens trained on"] = rough(sum(metrics.last("tokens") for metrics in found))
        tiles["Training time"] = duration(sum(metrics.last("seconds") for metrics in found))
    if evidence.timings:
        tiles["Time of all steps"] = duration(sum(timing.seconds for timing in evidence.timings.values()))
    return facts(tiles, "tiles large")


def _graph(evidence: Evidence) -> Html:
    jobs, timings = evidence.story.steps, evidence.timings
    if not jobs:
        return Html("")
    slow = sorted((job for job in jobs if job.id in timings), key=lambda job: -timings[job.id].seconds)
    head = el("tr", *(el("th", word, scope="col") for word in ("Step", "Time", "Most memory")))
    rows = [
        el(
            "tr",
            el("td", job.id),
            el("td", duration(timings[job.id].seconds), klass="number"),
            el("td", f"{memory:,.0f} MB" if (memory := timings[job.id].megabytes) is not None else "–", klass="number"),
        )
        for job in slow
    ]
    table = fold(f"{len(slow)} steps, slowest first", el("table", el("thead", head), el("tbody", *rows), klass="times"))
    note = "Every step with its time when it last ran. Lines lead to what needs its files; lines that others imply, and those to the report, are left out."
    box = el("div", graph.draw(jobs, timings), klass="graph", tabindex="0", role="region", aria_label="Job graph")
    return el("section", el("h2", "Job graph"), el("p", note, klass="muted"), graph.legend(jobs), box, table if slow else "", id="graph")


def _machine(evidence: Evidence) -> Html:
    told = {str(name): str(value) for name, value in evidence.story.software.items()}
    return el(
        "section",
        el("h2", "Software and hardware"),
        el("p", "As found when this page was written; the device of each stage, from its log, stands with the stage.", klass="muted"),
        facts(machine.hardware()),
        facts(machine.software() | told, "facts small"),
        id="machine",
    )


def _config(evidence: Evidence) -> str:
    """The config as YAML, its keys in the order in which they are documented."""
    story = evidence.story
    asked = check(PipelineConfig, story.config, "--spec: config")
    value = {"run": asked.run, "seed": asked.seed} | asked.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def _again(evidence: Evidence) -> Html:
    """How to make all this again."""
    text = _config(evidence)
    version = machine.software()["rwkvpipe"]
    commands = "snakemake --configfile run.yaml --cores all\nsnakemake --configfile run.yaml --cores all --report snakemake.html"
    return el(
        "section",
        el("h2", "How to reproduce it"),
        el("p", "Save the config below as ", el("code", "run.yaml"), f" in a checkout of rwkvpipe (version {version}) and run:"),
        el("pre", commands, klass="commands"),
        el("p", f"Everything drawn by lot comes from seed {evidence.story.config.get('seed', 42)}. Times depend on the machine; micro batches and how many jobs run at once change no result. A finished run is not run again: only what a change makes stale.", klass="muted"),
        fold("The whole config", el("pre", text, klass="commands")),
        id="again",
    )


def page(evidence: Evidence) -> str:
    """The whole report as HTML text."""
    story = evidence.story
    css = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    numbers = {subject.name: n for n, subject in enumerate((s for s in story.subjects if s.kind != "weights"), 1)}
    cards = [card(evidence, subject, numbers.get(subject.name, 0)) for subject in story.subjects]
    kinds = {subject.name: KINDS[subject.kind] for subject in story.subjects}
    links = [("Scores", "scores")] if evidence.scores else []
    links += [(subject.name, anchor(subject.name)) for subject in story.subjects]
    links += [("Job graph", "graph")] if story.steps else []
    links += [("Machine", "machine"), ("Reproduce", "again")]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # 'none' but for what stands in the page itself; quotes are part of the policy's own language
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{story.run}: report"),
        el("style", Html(css)),
    )
    top = el(
        "header",
        el("p", "rwkvpipe report", klass="over"),
        el("h1", story.run),
        _lead(evidence),
        _totals(evidence),
        el("nav", *(el("a", title, href=f"#{target}") for title, target in links), aria_label="Contents"),
    )
    body = join([scores.section(evidence, kinds), *cards, _graph(evidence), _machine(evidence), _again(evidence)])
    return f'<!doctype html>\n<html lang="en">{head}<body>{el("main", top, body)}</body></html>\n'
