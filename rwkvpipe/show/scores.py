"""Scores of all subjects on all benchmarks: a picture, a CSV, and a table in the page."""

from textwrap import wrap

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rwkvpipe.show.evidence import Evidence, Score
from rwkvpipe.show.figures import BLUE, INK, MUTED, styled
from rwkvpipe.show.markup import Html, count, el
from rwkvpipe.show.metrics import table

COLUMNS = ["subject", "benchmark", "task", "n", "score", "low", "high", "better"]
NAME, NOTE, TITLE = 24, 62, 36  # letters a line, of a subject's name, of what is told below a panel, of its title
TASKS = {
    "answer": "free answers that must match",
    "choice": "the likeliest of several options",
    "bits": "bits a byte of text it has not seen",
}


def best(scores: list[Score]) -> Score:
    """The best score of one benchmark; of equals the last, which went furthest."""
    sign = -1 if scores[0].better == "lower" else 1
    return max(reversed(scores), key=lambda score: sign * score.score)


def of(evidence: Evidence, benchmark: str) -> list[Score]:
    """Scores on one benchmark in the order of the subjects."""
    return [score for score in evidence.scores if score.benchmark == benchmark]


def unit(score: Score, number: int) -> str:
    """What a benchmark counts, of which there are so many."""
    kind, rest = ("question", "") if score.share else ("window", " of text")
    return f"{kind}{'' if number == 1 else 's'}{rest}"


def told(benchmark: str, scores: list[Score]) -> str:
    """What a benchmark measures, in words."""
    asked = sorted({score.n for score in scores})
    many = count(asked[0]) if len(asked) == 1 else f"{count(asked[0])} to {count(asked[-1])}"
    chance = scores[0].chance
    guess = f"; guessing gives {scores[0].text(chance)}" if chance is not None else ""
    what = f"{many} {unit(scores[0], asked[-1])}, {scores[0].better} is better"
    return f"{TASKS.get(scores[0].task, scores[0].task)}; {what}{guess}"


def csv(evidence: Evidence) -> str:
    """All scores with their intervals as CSV."""
    return table(COLUMNS, ({name: getattr(score, name) for name in COLUMNS} for score in evidence.scores))


def span(scores: list[Score]) -> tuple[float, float]:
    """The axis of a benchmark: 0 to 1 for shares, else what its intervals need."""
    if scores[0].share:
        return 0.0, 1.0
    low, high = min(score.low for score in scores), max(score.high for score in scores)
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _tick(score: Score, value: float) -> str:
    return f"{100 * value:.0f} %" if score.share else f"{value:.4g}"


def _label(name: str) -> str:
    """A subject's name on two lines at most, for more would stand in its neighbours' rows; the CSV has all of it."""
    room = 2 * NAME - 4  # what is wrapped at a sign leaves some of a line empty
    shown = name if len(name) <= room else f"{name[: room // 2]}…{name[-room // 2 + 1 :]}"
    lines = wrap(shown, NAME)
    return "\n".join(lines if len(lines) < 3 else (shown[:NAME], shown[NAME:]))


def figure(evidence: Evidence) -> Figure:
    """One panel a benchmark, one row a subject: a dot with its 95 % interval."""
    groups = [(name, of(evidence, name)) for name in evidence.benchmarks]
    with styled():
        drawn = Figure(figsize=(6.4, sum(1.25 + 0.36 * len(scores) for _, scores in groups)), layout="constrained")
        FigureCanvasAgg(drawn)
        drawn.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        ratios = [1.25 + 0.36 * len(scores) for _, scores in groups]
        panels = drawn.subplots(len(groups), 1, squeeze=False, height_ratios=ratios)[:, 0]
        for axes, (name, scores) in zip(panels, groups, strict=True):
            rows = range(len(scores))
            axes.hlines(rows, [s.low for s in scores], [s.high for s in scores], color=BLUE, alpha=0.4, linewidth=5)
            axes.plot([s.score for s in scores], rows, "o", color=BLUE, markersize=6, clip_on=False)
            for row, score in zip(rows, scores, strict=True):
                label = score.text(score.score)
                axes.annotate(label, (1.02, row), xycoords=("axes fraction", "data"), va="center", color=INK)
            if scores[0].chance is not None:
                axes.axvline(scores[0].chance, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
            axes.set_yticks(rows, [_label(score.subject) for score in scores])
            axes.set_ylim(len(scores) - 0.4, -0.6)
            low, high = span(scores)
            axes.set_xlim(low, high + 0.015 * (high - low))
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, score=scores[0]: _tick(score, value)))
            axes.grid(axis="y", visible=False)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", labelcolor=INK)
            axes.set_title("\n".join(wrap(name, TITLE)))
            note = "\n".join(wrap(f"{told(name, scores)} (bars: 95 % interval)", NOTE))
            axes.set_xlabel(note, color=MUTED, fontsize=8)
    return drawn


def _row(score: Score, scores: list[Score], kind: str) -> Html:
    low, high = span(scores)

    def at(value: float) -> float:
        return min(100.0, max(0.0, 100 * (value - low) / (high - low)))

    left, right = at(score.low), at(score.high)
    guess = score.chance
    track = el(
        "div",
        el("i", style=f"left:{at(guess):.2f}%", klass="chance") if guess is not None else "",
        el("i", style=f"left:{left:.2f}%;width:{right - left:.2f}%", klass="interval"),
        el("b", style=f"left:{at(score.score):.2f}%", klass="dot"),
        klass="track",
    )
    return el(
        "tr",
        el("th", score.subject, el("small", kind), scope="row"),
        el("td", track, klass="chart"),
        el("td", el("strong", score.text(score.score)), el("small", score.between), klass="number"),
        klass="best" if score is best(scores) and len(scores) > 1 else None,
    )


def section(evidence: Evidence, kinds: dict[str, str]) -> Html:
    """Chart and table in one: a block for each benchmark, a row for each subject; `kinds` says what a subject is."""
    if not evidence.scores:
        return Html("")
    blocks = []
    for name in evidence.benchmarks:
        scores = of(evidence, name)
        low, high = span(scores)
        ends = [scores[0].text(low + part * (high - low)) for part in (0.0, 0.5, 1.0)]
        ends = [text.replace(".0 %", " %") for text in ends]
        scale = el("tr", el("td"), el("td", el("div", *(el("span", end) for end in ends), klass="scale")), el("td"))
        rows = [_row(score, scores, kinds.get(score.subject, "")) for score in scores]
        blocks.append(
            el(
                "div",
                el("h3", name),
                el("p", told(name, scores), klass="muted"),
                el("table", el("tbody", *rows), el("tfoot", scale), klass="scores"),
                klass="benchmark",
            )
        )
    note = el("p", "Dots are scores, bars their 95 % intervals. The numbers are in plots/scores.csv.", klass="muted")
    return el("section", el("h2", "Scores"), *blocks, note, id="scores")
