"""One card a subject: what it learned from and how, how that went, what it says now."""

import base64
from collections.abc import Iterator

from rwkvpipe.show.evidence import Evidence, Subject
from rwkvpipe.show.markup import Html, anchor, count, duration, el, facts, fold, rough
from rwkvpipe.show.metrics import Metrics

KINDS = {
    "pretrain": "pretraining",
    "sft": "supervised tuning",
    "grpo": "reinforcement (GRPO)",
    "weights": "given weights",
}
PICTURES = {
    "reward": "Reward of the sampled completions by step",
    "loss": "Loss by step",
    "grad_norm": "Norm of the gradient by step",
    "lr": "Learning rate by step",
    "throughput": "Tokens a second by step",
}
EXAMPLES, SAMPLES, LONGEST = 3, 6, 1500
# names under which rows of graded answers hold what is shown
ASKED, SAID, GOLD, GRADE = ("question", "prompt"), ("text", "output", "said"), ("answer", "gold"), ("grade", "right")


def _cut(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({count(len(text) - LONGEST)} characters more)"


def _first(row: dict, names: tuple[str, ...]) -> object:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _short(value: float) -> str:
    return f"{value:.4g}"


def flat(value: dict, head: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, value)."""
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from flat(inner, f"{head}{name}.")
        elif inner is not None:
            shown = ", ".join(map(str, inner)) if isinstance(inner, list) else str(inner)
            yield f"{head}{name}", shown.replace("\n", "\\n")


def size(model: dict) -> str:
    """The sizes of a new model in words."""
    family = {"rwkv7": "RWKV-7"}.get(model.get("family", "rwkv7"), model.get("family"))
    return f"{family}, {model.get('n_layer')} layers, width {model.get('n_embd')}"


def learned_from(evidence: Evidence, subject: Subject) -> str | None:
    """The corpus of a stage with its size, as far as it is known."""
    if subject.data is None:
        return None
    parts, corpus, source = [], evidence.corpus(subject), evidence.source(subject.data)
    train = corpus["train"] if isinstance(corpus.get("train"), dict) else corpus
    for name in ("documents", "tokens"):
        if isinstance(train.get(name), int | float):
            parts.append(f"{rough(train[name])} {name}")
    if not parts and isinstance(source.get("count"), int):
        parts.append(f"{rough(source['count'])} {'questions' if subject.kind == 'grpo' else 'documents'}")
    origin = f"made: {source['synthetic']}" if source.get("synthetic") else source.get("path")
    return f"{subject.data} ({', '.join([*parts, *([str(origin)] if origin else [])])})"


def _training(evidence: Evidence, subject: Subject, settings: dict) -> dict[str, object]:
    """What was asked for, in a dozen words."""
    train = settings.get("train") or {}
    lora, rollout = settings.get("lora"), settings.get("rollout")
    weights = evidence.said(subject, r"([\d,]+) of ([\d,]+) numbers are trained")
    rows = "prompts" if subject.kind == "grpo" else "rows"
    return {
        "Learned from": learned_from(evidence, subject),
        "Started from": subject.start or "nothing",
        "Model": size(settings["model"]) if settings.get("model") else None,
        "Adapters": f"LoRA of rank {lora.get('rank')}" if isinstance(lora, dict) else None,
        "Weights trained": f"{weights[1]} of {weights[2]}" if weights else None,
        "Learning rate": f"{train.get('lr'):g}, {train.get('schedule')}" if train.get("lr") else None,
        "Batch": f"{train.get('batch')} {rows} of {train.get('ctx_len')} tokens at most" if train else None,
        "Group": f"{rollout.get('samples')} completions a prompt" if isinstance(rollout, dict) else None,
        "Arithmetic": train.get("precision"),
        "Device": device[1] if (device := evidence.said(subject, r"device: (.+)$")) else None,
    }


def _outcome(metrics: Metrics, subject: Subject) -> Html:
    """The last numbers of a training, as tiles."""
    tiles = {"Steps": count(metrics.last("step")), "Tokens": rough(metrics.last("tokens"))}
    if subject.kind == "grpo" and metrics.last("reward") is not None:
        tiles["Last reward"] = _short(metrics.last("reward"))
    else:
        tiles["Last loss"] = _short(metrics.last("loss"))
    if metrics.last("valid_loss") is not None:
        tiles["Held-out loss"] = _short(metrics.last("valid_loss"))
    tiles["Tokens a second"] = count(metrics.last("tokens") / max(metrics.last("seconds"), 1e-9))
    tiles["Training time"] = duration(metrics.last("seconds"))
    return facts(tiles, "tiles")


def _pictures(evidence: Evidence, subject: Subject) -> Html:
    shown = []
    for name, data in evidence.pictures(subject).items():
        source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
        picture = el("img", src=source, alt=f"{PICTURES[name]}, stage {subject.name}")
        shown.append(el("figure", picture, klass="plot tall" if name == "reward" else "plot"))
    return el("div", *shown, klass="plots") if shown else Html("")


def _samples(evidence: Evidence, subject: Subject) -> Html:
    rows = evidence.samples(subject)
    if not rows:
        return Html("")
    shown = [
        el("pre", el("b", _cut(row.get("prompt", ""))), el("span", _cut(row.get("text", ""))), klass="sample")
        for row in rows[:SAMPLES]
    ]
    more = f"; {len(rows) - SAMPLES} more are in {subject.samples}" if len(rows) > SAMPLES else ""
    note = el("p", f"The prompt stands in bold{more}.", klass="muted")
    return el("div", el("h4", "What it writes"), note, *shown)


def _example(row: dict) -> Html:
    grade = _first(row, GRADE)
    right = isinstance(grade, bool | int | float) and grade >= 0.5
    pairs = {
        "asked": _first(row, ASKED),
        "said": _first(row, SAID),
        "expected": None if right else _first(row, GOLD),
    }
    said = {name: el("pre", _cut(value)) for name, value in pairs.items() if value is not None}
    mark = el("span", "right" if right else "wrong", klass=f"grade {'right' if right else 'wrong'}")
    return el("li", mark, facts(said, "talk"))


def _graded(evidence: Evidence, subject: Subject) -> Html:
    """A few right and a few wrong answers to each benchmark that grades answers."""
    blocks = []
    for name in subject.bench:
        rows = [row for row in evidence.graded(subject, name) if isinstance(_first(row, GRADE), bool | int | float)]
        if evidence.benchmark(name).get("task") == "bits" or not rows:
            continue
        right = [row for row in rows if _first(row, GRADE) >= 0.5][:EXAMPLES]
        wrong = [row for row in rows if _first(row, GRADE) < 0.5][:EXAMPLES]
        blocks += [el("h5", name), el("ul", *map(_example, right + wrong), klass="examples")]
    return fold("Graded answers, some right, some wrong", *blocks) if blocks else Html("")


def card(evidence: Evidence, subject: Subject, number: int) -> Html:
    """Everything about one subject."""
    settings, metrics = evidence.settings(subject), evidence.metrics(subject)
    head = el("h2", subject.name, el("span", KINDS[subject.kind], klass="chip"), *([el("span", "LoRA", klass="chip")] if subject.lora else []))
    parts: list[Html] = [el("p", f"Stage {number}" if subject.kind != "weights" else "Given", klass="over"), head]
    if subject.kind != "weights":
        parts.append(facts(_training(evidence, subject, settings)))
        if metrics is not None:
            parts += [_outcome(metrics, subject), _pictures(evidence, subject)]
        else:
            parts.append(el("p", "Its metrics are not there.", klass="muted"))
    else:
        entry = evidence.story.config.get("weights", {}).get(subject.name, {})
        device = evidence.said(subject, r"device: (.+)$")
        words = {"Checkpoint": entry.get("path"), "Tokenizer": entry.get("tokenizer"), "sha256": entry.get("sha256")}
        parts.append(facts(words | {"Device": device[1] if device else None}))
    parts += [_samples(evidence, subject), _graded(evidence, subject)]
    if settings:
        table = facts({name: el("code", value) for name, value in flat(settings)}, "settings")
        parts.append(fold("All settings", table))
    return el("section", *parts, id=anchor(subject.name), klass="stage")
