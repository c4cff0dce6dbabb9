"""The report as one HTML page that needs nothing but itself."""

from pathlib import Path

import yaml

from rwkvpipe.base.config import PipelineConfig
from rwkvpipe.base.strict import check
from rwkvpipe.show import graph, machine, scores
from rwkvpipe.show.cards import KINDS, amount, card, size, weights
from rwkvpipe.show.evidence import Evidence, Score, Subject
from rwkvpipe.show.markup import Html, anchor, count, duration, el, facts, fold, join, rough

TRACKED_FILES = ["style.css"]
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
DEEDS = {"pretrain": "read", "sft": "learned to answer from", "dpo": "learned to prefer answers by"}
DEEDS["grpo"] = "learned from the grades of its own answers to"
COMMANDS = """snakemake --configfile run.yaml --cores all
snakemake --configfile run.yaml --cores all --report snakemake.html"""


def _stages(evidence: Evidence) -> list[Subject]:
    return [subject for subject in evidence.story.subjects if subject.trained]


def main_scores(evidence: Evidence) -> list[Score]:
    """What the run came to: the scores of the last stage that has any; without one, of the last weights."""
    trained = {subject.name for subject in _stages(evidence)}
    last = [score.subject for score in evidence.scores if score.subject in trained] or [evidence.scores[-1].subject]
    return [score for score in evidence.scores if score.subject == last[-1]]


def _headline(evidence: Evidence) -> Html:
    """The scores of the last stage, large."""
    if not evidence.scores:
        return el("p", "Nothing was measured in this run.", klass="lead")
    shown = []
    for score in main_scores(evidence):
        result = el("p", score.text(score.score), "" if score.share else el("small", "bits a byte"), klass="result")
        trained = score.subject in {subject.name for subject in _stages(evidence)}
        told = el("p", f"{score.benchmark}{' after ' if trained else ', '}{score.subject}")
        many = f"{count(score.n)} {scores.unit(score, score.n)}"
        between = el("p", f"95 % interval {score.between}; {many}", klass="muted")
        shown.append(el("div", result, told, between))
    return el("div", *shown, klass="headline")


def _step(evidence: Evidence, subject: Subject, number: int) -> Html:
    """One subject of the way from the first to the last, with its score on the first benchmark."""
    settings = evidence.settings(subject)
    if subject.kind == "weights":
        deed = Html("Measured as it came.")
    elif subject.kind == "best":
        deed = join([f"The weights of {subject.start} at its lowest held-out loss."])
    else:
        begin = f"From {subject.start}" if subject.start else "From new weights"
        model = f" ({size(settings.model)})" if settings and settings.model else ""
        means = " with adapters" if subject.lora else " in its initial states alone" if subject.state else ""
        much = f" ({told})" if (told := amount(evidence, subject)) else ""
        deed = join([f"{begin}{model}{means}, {DEEDS[subject.kind]} ", el("b", subject.data), f"{much}."])
    found = next((s for s in evidence.scores if s.subject == subject.name), None)
    score = el("p", el("b", found.text(found.score)), f" {found.benchmark}", klass="reached") if found else ""
    head = el("p", f"{number} · {KINDS[subject.kind]}" if number else KINDS[subject.kind], klass="over")
    name = el("h3", el("a", subject.name, href=f"#{anchor(subject.name)}"))
    return el("li", head, name, el("p", deed, klass="muted"), score)


def _totals(evidence: Evidence) -> Html:
    found = [metrics for subject in _stages(evidence) if (metrics := evidence.metrics(subject)) is not None]
    # what a log counts beside adapters are the weights and the adapters
    known = [(subject.lora, told[1]) for subject in _stages(evidence) if (told := weights(evidence, subject))]
    plain = [size for lora, size in known if not lora]
    tiles: dict[str, object] = {"Weights of the model": plain[0]} if plain else {}
    if known and not plain:
        tiles["Weights and adapters"] = known[0][1]
    if found:
        tiles["Tokens trained on"] = rough(sum(metrics.last("tokens") for metrics in found))
        tiles["Training time"] = duration(sum(metrics.last("seconds") for metrics in found))
    if evidence.timings:
        tiles["Time of all steps"] = duration(sum(timing.seconds for timing in evidence.timings.values()))
    return facts(tiles, "tiles large")


def _times(evidence: Evidence) -> Html:
    """Steps with their times as a table that opens on demand."""
    timings = evidence.timings
    slow = sorted((job for job in evidence.story.steps if job.id in timings), key=lambda job: -timings[job.id].seconds)
    if not slow:
        return Html("")
    rows = []
    for job in slow:
        memory = timings[job.id].megabytes
        held = f"{memory:,.0f} MB" if memory is not None else "–"
        cells = (el("td", duration(timings[job.id].seconds), klass="number"), el("td", held, klass="number"))
        rows.append(el("tr", el("td", job.id), *cells))
    head = el("tr", *(el("th", word, scope="col") for word in ("Step", "Time", "Most memory")))
    return fold(f"{len(slow)} steps, slowest first", el("table", el("thead", head), el("tbody", *rows), klass="times"))


def _graph(evidence: Evidence) -> Html:
    jobs, timings = evidence.story.steps, evidence.timings
    if not jobs:
        return Html("")
    note = (
        "Every step with its time when it last ran; the bar is that time beside the slowest step's. Lines lead to"
        " what needs a step's files; lines that others imply, and those to the report, are left out."
    )
    unmeasured = [job for job in jobs if job.timing and job.id not in timings and job.rule != "report"]
    told = f"{len(unmeasured)} of {len(jobs)} steps have no time: the file of it is not there, or empty."
    return el(
        "section",
        el("h2", "Job graph"),
        el("p", note, klass="muted"),
        el("p", told, klass="muted absent") if unmeasured else "",
        graph.legend(jobs),
        el("div", graph.draw(jobs, timings), klass="graph", tabindex="0", role="region", aria_label="Job graph"),
        _times(evidence),
        id="graph",
    )


def _machine(evidence: Evidence) -> Html:
    told = {str(name): str(value) for name, value in evidence.story.software.items()}
    note = "As found when this page was written. The device of each stage, as its log has it, stands with the stage."
    return el(
        "section",
        el("h2", "Software and hardware"),
        el("p", note, klass="muted"),
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
    text, commit = _config(evidence), machine.commit()
    version = f" {machine.software()['rwkvpipe']}" + (f", commit {commit[:12]}" if commit else "")
    first = ("Save the config below as ", el("code", "run.yaml"), f" in a checkout of rwkvpipe{version}, and run:")
    seed = evidence.story.config.get("seed", 42)
    note = (
        f"Everything drawn by lot comes from seed {seed}. Times depend on the machine; micro batches, and how many"
        " jobs run at once, change no result. A finished run is not run again: only what a change makes stale."
    )
    return el(
        "section",
        el("h2", "How to reproduce it"),
        el("p", *first),
        el("pre", COMMANDS, klass="commands"),
        el("p", note, klass="muted"),
        fold("run.yaml, the whole config", el("pre", text, klass="commands")),
        id="again",
    )


def _top(evidence: Evidence, numbers: dict[str, int]) -> Html:
    story = evidence.story
    links = [("Scores", "scores")] if evidence.scores else []
    links += [(subject.name, anchor(subject.name)) for subject in story.subjects]
    links += [("Job graph", "graph")] if story.steps else []
    links += [("Machine", "machine"), ("Reproduce", "again")]
    way = [_step(evidence, subject, numbers.get(subject.name, 0)) for subject in story.subjects]
    return el(
        "header",
        el("p", "rwkvpipe report", klass="over"),
        el("h1", story.run),
        _headline(evidence),
        el("ol", *way, klass="way") if way else "",
        _totals(evidence),
        el("nav", *(el("a", title, href=f"#{target}") for title, target in links), aria_label="Contents"),
    )


def page(evidence: Evidence) -> str:
    """The whole report as HTML text."""
    story = evidence.story
    css = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    numbers = {subject.name: number for number, subject in enumerate(_stages(evidence), 1)}
    cards = [card(evidence, subject, numbers.get(subject.name, 0)) for subject in story.subjects]
    kinds = {subject.name: KINDS[subject.kind] for subject in story.subjects}
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
    sections = [scores.section(evidence, kinds), *cards, _graph(evidence), _machine(evidence), _again(evidence)]
    body = el("main", _top(evidence, numbers), join(sections))
    return f'<!doctype html>\n<html lang="en">{head}<body>{body}</body></html>\n'
