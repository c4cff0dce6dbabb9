"""Lines over steps inside the page: curves are SVG that stretches, words are text that does not, colours the page's."""

import math
from dataclasses import dataclass

import numpy as np

from rwkvpipe.show.markup import Html, count, el, escape, join
from rwkvpipe.show.metrics import Metrics, smooth

MANY = 40  # points; more are drawn faint, with a smoothed line over them
BUCKETS = 240  # of more points than twice this, the lowest and highest of each bucket are drawn
SPREAD = 8.0  # positive numbers that differ by more than this factor stand on a logarithmic axis
SIDE = 1000  # units of the drawing, both ways


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
POLICY = (
    Chart("Reward", "mean of the completions, ± standard deviation within groups", (Series("reward", "green", spread="reward_std"),), wide=True),
    Chart("Policy loss", "nats a token", (Series("loss", "blue"),)),
    Chart("KL from the start", "nats a token", (Series("kl", "plum"),)),
    Chart("Length of completions", "tokens", (Series("completion_length", "blue"),)),
    *COMMON,
    Chart("Clipped ratios", "share", (Series("clip_ratio", "orange"),)),
    Chart("Completions cut short", "share", (Series("truncated", "orange"),)),
)


def number(value: float) -> str:
    """A number in few signs: 12,000, 0.05, and 3e-5 where zeros would fill the place."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return count(value) if abs(value) >= 1000 else f"{value:.4g}"
    head, _, power = f"{value:.3g}".partition("e")
    return f"{head}e{int(power)}" if power else head


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from low to high, a few."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((part * power for part in (1, 2, 2.5, 5, 10)), key=lambda size: abs(size - rough))
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


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
    """Numbers to places along a side, 0 to 1."""

    def __init__(self, values: np.ndarray, chart: Chart):
        low, high = float(values.min()), float(values.max())
        self.log = chart.log and low > 0 and high / low > SPREAD
        if self.log:
            self.low, self.high = low / 1.15, high * 1.15
        else:
            low = min(low, 0.0) if chart.zero else low
            room = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
            self.low, self.high = low - (0.0 if chart.zero and low == 0 else room), high + room
        self.ticks = log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)

    def __call__(self, values):
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


def _curve(metrics: Metrics, series: Series, x_axis, y_axis: _Axis) -> tuple[list[Html], Html]:
    """The shapes of one series, and a dot at its end."""
    steps, values = metrics.column(series.column)
    many = len(values) > MANY and series.column != "lr"
    soft = smooth(values) if many else values
    shapes, stroke = [], f"c-{series.color}"
    if (spread := _spread(metrics, series)) is not None:
        around = smooth(spread) if many else spread
        upper, lower = (_points(x_axis(steps), np.clip(y_axis(soft + sign * around), 0, 1)) for sign in (1, -1))
        back = " ".join(reversed(lower.split(" ")))
        shapes.append(el("path", klass=f"band {stroke}", d=f"M{upper} L{back}Z"))
    if many:
        at, raw = thin(steps, values)
        shapes.append(el("path", klass=f"raw {stroke}", d=f"M{_points(x_axis(at), y_axis(raw))}"))
    at, drawn = thin(steps, soft)
    shapes.append(el("path", klass=f"curve {stroke}", d=f"M{_points(x_axis(at), y_axis(drawn))}"))
    place = f"left:{100 * x_axis(steps[-1]):.2f}%;top:{100 * (1 - float(y_axis(soft[-1]))):.2f}%"
    return shapes, el("i", klass=f"end c-{series.color}", style=place)


def draw(metrics: Metrics, chart: Chart) -> Html:
    """A figure with title, last values, axes and curves; nothing where no column of it is there."""
    shown = [series for series in chart.series if len(metrics.column(series.column)[0])]
    if not shown:
        return Html("")
    columns = {series: metrics.column(series.column) for series in shown}
    y_axis = _Axis(np.concatenate([_reach(metrics, series) for series in shown]), chart)
    first, last = metrics.rows[0]["step"], metrics.rows[-1]["step"]
    first, last = (first - 1, last + 1) if first == last else (min(first, 0 if last > 10 else first), last)

    def x_axis(steps):
        return (np.asarray(steps) - first) / (last - first)

    drawn = [_curve(metrics, series, x_axis, y_axis) for series in shown]
    ends = [
        el(
            "span",
            series.label if len(shown) > 1 or chart.peak else "",
            el("b", number(values.max() if chart.peak else values[-1])),
            klass=f"last c-{series.color}",
        )
        for series, (_, values) in columns.items()
    ]
    grid = [
        el("i", el("span", number(tick)), klass="grid", style=f"top:{100 * (1 - float(y_axis(tick))):.2f}%")
        for tick in y_axis.ticks
    ]
    names = [tick for tick in ticks(first, last) if tick == int(tick)]
    below = [el("span", count(tick), style=f"left:{100 * float(x_axis(tick)):.2f}%") for tick in names]
    begin, end = (number(columns[shown[0]][1][place]) for place in (0, -1))
    label = escape(f"{chart.title} by step, {begin} at first, {end} at last")
    shapes = join(shape for shapes, _ in drawn for shape in shapes)
    # attributes in camel case are SVG's own
    head = f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" aria-label="{label}">'
    return el(
        "figure",
        el("figcaption", el("b", chart.title), el("small", chart.unit), el("span", *ends, klass="lasts")),
        el("div", *grid, Html(f"{head}{shapes}</svg>"), *(dot for _, dot in drawn), klass="area"),
        el("div", *below, klass="steps", aria_hidden="true"),
        klass="plot wide" if chart.wide else "plot",
    )


def curves(metrics: Metrics, *, policy: bool) -> Html:
    """All pictures of a training."""
    return el("div", *(draw(metrics, chart) for chart in (POLICY if policy else TRAINING)), klass="plots")
