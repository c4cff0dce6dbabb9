"""One card a subject: what it learned from and how, how that went, what it says now."""

from collections.abc import Iterator

from rwkvpipe.base.config import RwkvConfig, Settings
from rwkvpipe.base.sizes import title
from rwkvpipe.show.chart import curves, number
from rwkvpipe.show.corpus import corpus_card
from rwkvpipe.show.evidence import Evidence, Subject
from rwkvpipe.show.markup import Html, anchor, count, duration, el, facts, fold, rough
from rwkvpipe.show.metrics import Metrics

KINDS = {
    "pretrain": "pretraining",
    "sft": "supervised tuning",
    "dpo": "preferences (DPO)",
    "grpo": "reinforcement (GRPO)",
    "weights": "given weights",
    "best": "best weights",
}
OVER = {"weights": "Given", "best": "Kept"}
ADAPTERS = {"lora": "LoRA", "pissa": "PiSSA", "dora": "DoRA", "disha": "DiSHA"}
ROWS = {"grpo": "questions", "dpo": "pairs"}
EXAMPLES, SAMPLES, LONGEST = 3, 6, 1500


def _cut(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({count(len(text) - LONGEST)} characters more)"


def flat(value: dict, head: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, value)."""
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from flat(inner, f"{head}{name}.")
        elif inner is not None:
            shown = ", ".join(map(str, inner)) if isinstance(inner, list) else str(inner)
            yield f"{head}{name}", shown.replace("\n", "\\n")


def size(model: RwkvConfig) -> str:
    """The sizes of a new model in words."""
    return f"{title(model.family)}, {model.n_layer} layers, width {model.n_embd}"


def amount(evidence: Evidence, subject: Subject) -> str | None:
    """How much a stage had to learn from, as far as it is known."""
    corpus, source = evidence.corpus(subject), evidence.source(subject.data)
    train = corpus["train"] if isinstance(corpus.get("train"), dict) else corpus
    known = [name for name in ("documents", "tokens") if isinstance(train.get(name), int | float)]
    if known:
        return ", ".join(f"{rough(train[name])} {name if train[name] != 1 else name[:-1]}" for name in known)
    if isinstance(source.get("count"), int):
        return f"{rough(source['count'])} {ROWS.get(subject.kind, 'documents')}"
    return None


def weights(evidence: Evidence, subject: Subject) -> tuple[str, str] | None:
    """How many numbers of a model were trained, and of how many, as the log says."""
    found = evidence.said(subject, r"([\d,]+) of ([\d,]+) numbers are trained")
    return (found[1], found[2]) if found else None


def _device(evidence: Evidence, subject: Subject) -> str | None:
    """On what a subject was trained, or measured, as the log says."""
    device = evidence.said(subject, r"device: (.+)$")
    more = evidence.said(subject, r"device \w+, (\d+) threads, (torch \S+)$")
    threads = f"{more[1]} thread{'s' if more[1] != '1' else ''}" if more else None
    return ", ".join(part for part in (device and device[1], threads, more and more[2]) if part) or None


def _data(evidence: Evidence, subject: Subject) -> Html:
    source = evidence.source(subject.data)
    origin = f"made by {source['synthetic']}" if source.get("synthetic") else source.get("path")
    told = ", ".join(str(part) for part in (amount(evidence, subject), origin) if part)
    return el("span", subject.data, el("small", told))


def _training(evidence: Evidence, subject: Subject, settings: Settings) -> dict[str, object]:
    """What was asked for, in a dozen words."""
    train, trained = settings.train, weights(evidence, subject)
    rows = {"grpo": "prompts", "dpo": "pairs"}.get(subject.kind, "rows")
    final = f" to {train.lr_final:g}" if train.lr_final else ""
    return {
        "Learned from": _data(evidence, subject),
        "Started from": subject.start or "new weights, from the seed",
        "Model": size(settings.model) if settings.model else None,
        "Adapters": f"{ADAPTERS[settings.lora.kind]} of rank {settings.lora.rank}" if settings.lora else None,
        "Preferences": f"{settings.dpo.loss}, beta {settings.dpo.beta:g}" if settings.dpo else None,
        "Weights trained": f"{trained[0]} of {trained[1]}" if trained else None,
        "Learning rate": f"{train.lr:g}{final}, {train.schedule}, {train.warmup} steps of warm-up",
        "Batch": f"{train.batch} {rows} of at most {train.ctx_len} tokens",
        "Completions": f"{settings.rollout.samples} a prompt, graded by {', '.join(settings.rollout.rewards)}"
        if settings.rollout
        else None,
        "Arithmetic": train.precision,
        "Device": _device(evidence, subject),
        "Seed": str(settings.seed),
    }


def _outcome(metrics: Metrics, subject: Subject) -> Html:
    """The last numbers of a training, as tiles."""
    tiles = {"Steps": count(metrics.last("step")), "Tokens": rough(metrics.last("tokens"))}
    if subject.kind == "grpo" and metrics.last("mean_reward") is not None:
        tiles["Last reward"] = number(metrics.last("mean_reward"))
    else:
        tiles["Last loss"] = number(metrics.last("loss"))
    if metrics.last("valid_loss") is not None:
        tiles["Held-out loss"] = number(metrics.last("valid_loss"))
    tiles["Tokens a second"] = rough(metrics.last("tokens") / max(metrics.last("seconds"), 1e-9))
    tiles["Training time"] = duration(metrics.last("seconds"))
    return facts(tiles, "tiles")


def _samples(evidence: Evidence, subject: Subject) -> Html:
    if subject.samples is None:
        return Html("")
    rows = evidence.samples(subject)
    if not rows:
        return el("p", f"No samples: {subject.samples} is not there, or empty.", klass="muted absent")
    shown = [
        el("pre", el("b", _cut(row.get("prompt", ""))), el("span", _cut(row.get("text", ""))), klass="sample")
        for row in rows[:SAMPLES]
    ]
    more = f" {len(rows) - SAMPLES} more are in {subject.samples}." if len(rows) > SAMPLES else ""
    note = el("p", f"The prompt in bold, then what the model wrote.{more}", klass="muted")
    return el("div", el("h3", "What it writes"), note, *shown)


def _example(row: dict) -> Html:
    right = row["correct"] >= 0.5
    pairs = {"asked": row.get("question"), "said": row.get("answer"), "right is": None if right else row.get("gold")}
    said = {name: el("pre", _cut(value).strip()) for name, value in pairs.items() if value is not None}
    mark = el("span", "right" if right else "wrong", klass=f"grade {'right' if right else 'wrong'}")
    return el("li", mark, facts(said, "talk"))


def _graded(evidence: Evidence, subject: Subject) -> Html:
    """A few right and a few wrong answers to each benchmark that grades answers."""
    blocks = []
    for name in subject.bench:
        rows = [row for row in evidence.graded(subject, name) if isinstance(row.get("correct"), bool | int | float)]
        right = [row for row in rows if row["correct"] >= 0.5]
        wrong = [row for row in rows if row["correct"] < 0.5]
        if rows:
            shown = el("ul", *map(_example, right[:EXAMPLES] + wrong[:EXAMPLES]), klass="examples")
            told = f"{count(len(right))} right, {count(len(wrong))} wrong; the first of each:"
            blocks += [el("h4", name), el("p", told, klass="muted"), shown]
    # the page is long: answers of the last subject stand open, those before it on demand
    last = subject is evidence.story.subjects[-1]
    return fold("Graded answers, some right, some wrong", *blocks, opened=last) if blocks else Html("")


def card(evidence: Evidence, subject: Subject, number: int) -> Html:
    """Everything about one subject."""
    settings, metrics = evidence.settings(subject), evidence.metrics(subject)
    chips = [KINDS[subject.kind], *(["adapters"] if subject.lora else ["states"] if subject.state else [])]
    parts: list[Html] = [
        el("p", f"Stage {number}" if subject.trained else OVER[subject.kind], klass="over"),
        el("h2", subject.name, *(el("span", chip, klass="chip") for chip in chips)),
    ]
    if subject.kind == "weights":
        entry = evidence.entry("weights", subject.name)
        keys = {"Checkpoint": "path", "Adapter": "adapter", "Tokenizer": "tokenizer", "sha256": "sha256"}
        words = {word: entry.get(key) for word, key in keys.items()}
        parts.append(facts(words | {"Device": _device(evidence, subject)}))
    elif subject.kind == "best":
        words = {"Weights": f"those of {subject.start} at its lowest held-out loss"}
        parts.append(facts(words | {"Device": _device(evidence, subject)}))
    else:
        absent = el("p", "Its settings are not there.", klass="muted absent")
        parts.append(facts(_training(evidence, subject, settings)) if settings else absent)
        absent = el("p", "Its metrics are not there, so neither are its curves.", klass="muted absent")
        parts += [_outcome(metrics, subject), curves(metrics, subject.kind)] if metrics else [absent]
    parts += [_samples(evidence, subject), _graded(evidence, subject)]
    parts += [corpus_card(corpus, name) for name, corpus in evidence.corpora(subject).items()]
    if settings:
        table = {name: el("code", value) for name, value in flat(settings.model_dump(mode="json"))}
        parts.append(fold("All settings", facts(table, "settings")))
    return el("section", *parts, id=anchor(subject.name), klass="stage")
