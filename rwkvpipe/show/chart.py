"""Lines over steps inside the page: curves are SVG that stretches, words are text that does not, colours the page's."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rwkvpipe.show.markup import Html, count, el, escape, join
from rwkvpipe.show.metrics import Metrics, smooth

MANY = 40  # points; more are drawn faint, with a smoothed line over them
BUCKETS = 240  # of more points than twice this, the lowest and highest of each bucket are drawn
SPREAD = 8.0  # positive numbers that differ by more than this factor stand on a logarithmic axis
FLAT = 1e-9
SIDE = 1000  # units of the drawing, both ways
ROOM = {True: 100, False: 30}  # signs that fit below a wide picture, and below another


@dataclass(frozen=True)
class Series:
    """A column of metrics: what it is called in a legend, its colour, the column of its spread if it has one."""

    column: str
    color: str
    label: str = ""
    spread: str | None = None


@dataclass(frozen=True)
class Chart:
    """What one picture shows, and on which kind of axis."""

    title: str
    unit: str
    series: tuple[Series, ...]
    zero: bool = False
    log: bool = False
    wide: bool = False
    peak: bool = False  # told by its highest value, not by its last


LOSS = (Series("loss", "blue", "training"), Series("valid_loss", "orange", "held out"))
COMMON = (
    Chart("Learning rate", "", (Series("lr", "plum", "peak"),), zero=True, peak=True),
    Chart("Gradient norm", "before clipping", (Series("grad_norm", "green"),), log=True),
    Chart("Throughput", "tokens a second", (Series("tokens_per_second", "ink"),), zero=True),
)
TRAINING = (Chart("Loss", "nats a token", LOSS, log=True, wide=True), *COMMON)
PAIRS = (
    Chart("Loss", "a pair", LOSS, log=True, wide=True),
    Chart(
        "Rewards",
        "of both answers",
        (Series("reward_chosen", "green", "preferred"), Series("reward_rejected", "orange", "other")),
    ),
    Chart("Margin", "between them", (Series("reward_margin", "blue"),)),
    Chart("Preferred ahead", "share of pairs", (Series("reward_accuracy", "green"),), zero=True),
    *COMMON,
)
POLICY = (
    Chart(
        "Reward",
        "mean, ± standard deviation in a group",
        (Series("mean_reward", "green", spread="reward_std"),),
        wide=True,
    ),
    Chart("Policy loss", "nats a token", (Series("loss", "blue"),)),
    Chart("Divergence from the start", "nats a token", (Series("kl_div", "plum"),)),
    Chart("Length of completions", "tokens", (Series("completions/mean_length", "blue"),)),
    *COMMON,
    Chart("Clipped ratios", "share", (Series("clip_ratio", "orange"),), zero=True),
    Chart("Completions cut short", "share", (Series("completions/clipped_ratio", "orange"),), zero=True),
)


def number(value: float) -> str:
    """A number in few signs: 12,000, 0.05, and 3e-5 where zeros would fill the place."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return count(value) if abs(value) >= 1000 else f"{value:.4g}"
    head, _, power = f"{value:.2e}".partition("e")
    return f"{float(head):g}e{int(power)}"


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from low to high, a few."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((part * power for part in (1, 2, 2.5, 5, 10)), key=lambda size: abs(size - rough))
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def step_ticks(low: float, high: float, room: int) -> list[tuple[float, str]]:
    """Whole steps with their texts, as many as fit into so many signs with a gap of two between them."""
    for about in (4, 3, 2, 1):
        whole = [tick for tick in ticks(low, high, about) if tick == int(tick)] or [float(math.floor(high))]
        shown = [(tick, number(tick)) for tick in whole]
        if sum(len(text) + 2 for _, text in shown) <= room:
            return shown
    return shown[-1:]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis: 1, 2 and 5 of each power of ten, or powers alone where they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    parts = (1, 2, 5) if math.log10(high / low) < 1.7 else (1,)
    found = [part * 10.0**power for power in powers for part in parts if low <= part * 10.0**power <= high]
    return found[:: 1 + len(found) // 6]


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Few enough points (N,) to draw that no peak is lost: the lowest and the highest of each bucket."""
    if len(values) <= 2 * BUCKETS:
        return steps, values
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), BUCKETS):
        kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    order = sorted(kept)
    return steps[order], values[order]


class _Axis:
    """Numbers to places along a side, 0 to 1; `tight` leaves no room at the ends, `zero` begins there."""

    def __init__(self, values: np.ndarray, *, zero: bool = False, log: bool = False, tight: bool = False):
        low, high = float(values.min()), float(values.max())
        if high - low < FLAT * max(abs(low), abs(high)):
            high = low  # differences in the last digits are no curve
        self.log = log and low > 0 and high / low > SPREAD
        if self.log:
            self.low, self.high = low / 1.15, high * 1.15
        elif low == high == 0:
            self.low, self.high = 0.0, 1.0
        else:
            low = min(low, 0.0) if zero else low
            room = 0.0 if tight else 0.07 * (high - low) or 0.1 * abs(high) or 1.0
            self.low, self.high = low - (0.0 if zero and low == 0 else room), high + room
        self.ticks = log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)

    def __call__(self, values: np.ndarray | float) -> np.ndarray:
        if self.log:
            return np.log(np.asarray(values) / self.low) / math.log(self.high / self.low)
        return (np.asarray(values) - self.low) / (self.high - self.low)


def _spread(metrics: Metrics, series: Series) -> np.ndarray | None:
    """The spread around each value of a series (N,), None where it has none."""
    values = metrics.column(series.column)[1]
    spread = metrics.column(series.spread)[1] if series.spread else ()
    return spread if len(spread) == len(values) else None


def _reach(metrics: Metrics, series: Series) -> np.ndarray:
    """Numbers that the picture of a series must have room for."""
    values, spread = metrics.column(series.column)[1], _spread(metrics, series)
    return values if spread is None else np.concatenate([values, values - spread, values + spread])


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.0f},{b:.1f}" for a, b in zip(SIDE * x, SIDE * (1 - y), strict=True))


def _drawn(metrics: Metrics, series: Series) -> tuple[np.ndarray, np.ndarray, bool]:
    """Steps and values (N,) of the line that stands for a series, and whether it is smoothed."""
    steps, values = metrics.column(series.column)
    many = len(values) > MANY and series.column != "lr"
    return steps, smooth(values) if many else values, many


def _shapes(metrics: Metrics, series: Series, x_axis: _Axis, y_axis: _Axis) -> Iterator[Html]:
    """Spread, points and line of one series."""
    (steps, line, many), color = _drawn(metrics, series), f"c-{series.color}"
    spread = _spread(metrics, series)
    if spread is not None:
        around = smooth(spread) if many else spread
        upper, lower = (_points(x_axis(steps), y_axis(line + sign * around)) for sign in (1, -1))
        yield el("path", klass=f"band {color}", d=f"M{upper} L{' '.join(reversed(lower.split(' ')))}Z")
    if many:
        at, raw = thin(steps, metrics.column(series.column)[1])
        yield el("path", klass=f"raw {color}", d=f"M{_points(x_axis(at), y_axis(raw))}")
    at, line = thin(steps, line)
    yield el("path", klass=f"curve {color}", d=f"M{_points(x_axis(at), y_axis(line))}")


def _percent(part: float) -> str:
    return f"{100 * float(part):.2f}%"


def draw(metrics: Metrics, chart: Chart) -> Html:
    """A figure with title, values at the end, axes and curves; nothing where no column of it is there."""
    shown = [series for series in chart.series if len(metrics.column(series.column)[0])]
    if not shown:
        return Html("")
    y_axis = _Axis(np.concatenate([_reach(metrics, series) for series in shown]), zero=chart.zero, log=chart.log)
    first, last = metrics.rows[0]["step"], metrics.rows[-1]["step"]
    x_axis = _Axis(np.array([0 if last > 10 else first, last]), tight=first < last)
    shapes = join(shape for series in shown for shape in _shapes(metrics, series, x_axis, y_axis))
    ends, dots = [], []
    for series in shown:
        steps, values = metrics.column(series.column)
        label, value = series.label if len(shown) > 1 or chart.peak else "", values.max() if chart.peak else values[-1]
        ends.append(el("span", label, el("b", number(value)), klass=f"last c-{series.color}"))
        place = f"left:{_percent(x_axis(steps[-1]))};top:{_percent(1 - y_axis(values[-1]))}"
        dots.append(el("i", klass=f"end c-{series.color}", style=place))
    grid = [
        el("i", el("span", number(tick)), klass="grid", style=f"top:{_percent(1 - y_axis(tick))}")
        for tick in y_axis.ticks
    ]
    marks = step_ticks(x_axis.low, x_axis.high, ROOM[chart.wide])
    below = [el("span", text, style=f"left:{_percent(x_axis(tick))}") for tick, text in marks]
    begin, end = (number(metrics.column(shown[0].column)[1][place]) for place in (0, -1))
    label = escape(f"{chart.title} by step, {begin} at first, {end} at last")
    # attributes in camel case are SVG's own
    head = f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" aria-label="{label}">'
    return el(
        "figure",
        el("figcaption", el("b", chart.title), el("small", chart.unit), el("span", *ends, klass="lasts")),
        el("div", *grid, Html(f"{head}{shapes}</svg>"), *dots, klass="area"),
        el("div", *below, klass="steps", aria_hidden="true"),
        klass="plot wide" if chart.wide else "plot",
    )


def curves(metrics: Metrics, kind: str) -> Html:
    """All pictures of a training of a kind."""
    charts = {"grpo": POLICY, "dpo": PAIRS}.get(kind, TRAINING)
    return el("div", *(draw(metrics, chart) for chart in charts), klass="plots")
