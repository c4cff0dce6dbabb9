"""Figures in one quiet style: what happened in training, and scores with their intervals."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from rwkvpipe.base.files import atomic
from rwkvpipe.show.metrics import Metrics, smooth

INK, MUTED, GRID = "#22303c", "#66727d", "#e3e7ea"
BLUE, ORANGE, GREEN, PLUM = "#23709b", "#d0722a", "#3f8361", "#84568f"
WIDTH, HEIGHT, DPI = 4.8, 3.0, 200  # inches; two beside each other fill a page, one fills a phone
HIGHEST = 32_000  # dots; beyond 65,535 nothing is drawn at all, and few programs show half of that
ROUND = [1, 2, 2.5, 5, 10]  # of the distance between ticks
POINTS = 40  # fewer are drawn with markers, more with a smoothed line over them
SPREAD = 8.0  # positive numbers that differ by more than this factor stand on a logarithmic axis
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so pictures look the same everywhere
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.edgecolor": "#b8c1c8",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def styled() -> Iterator[None]:
    """Our style alone, whatever the user's own settings of matplotlib say."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, a very high one in fewer dots; equal figures give equal bytes."""
    dpi = min(DPI, HIGHEST / figure.get_figheight())
    with styled(), atomic(path, suffix=".png") as part:
        figure.savefig(part, format="png", dpi=dpi, metadata={"Software": None})


def _figure(height: float = HEIGHT) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure


def _short(value: float, _position: int | None = None) -> str:
    """A tick's number: 12,000 and 0.05, and 3e-5 where zeros would fill the page."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"
    head, _, power = f"{value:.3g}".partition("e")
    return f"{head}e{int(power)}" if power else head


def _dress(axes: Axes, title: str, unit: str, *, step_axis: bool = True) -> None:
    """Title, unit and ticks."""
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    if step_axis:
        axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=ROUND, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _logarithmic(axes: Axes, *columns: np.ndarray) -> None:
    """A logarithmic axis for positive numbers of very different sizes."""
    values = np.concatenate(columns)
    if len(values) and values.min() > 0 and values.max() / values.min() > SPREAD:
        axes.set_yscale("log")
        wide = values.max() / values.min() > 1000
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(LogLocator(subs=()))


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str | None = None) -> None:
    """One series: all its points, and a smoothed line over them where they are many."""
    if len(values) <= POINTS:
        axes.plot(steps, values, color=color, label=label, marker="o", markersize=3)
        return
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(steps, smooth(values), color=color, label=label)


def loss_figure(metrics: Metrics) -> Figure:
    """Training loss, and held-out loss where it was measured."""
    figure = _figure()
    axes = figure.subplots()
    steps, values = metrics.column("loss")
    valid_steps, valid = metrics.column("valid_loss")
    policy = "mean_reward" in metrics
    _logarithmic(axes, values, valid)
    _line(axes, steps, values, BLUE, "policy" if policy else "training")
    if len(valid):
        markers = {"marker": "o", "markersize": 4} if len(valid) <= POINTS else {}
        axes.plot(valid_steps, valid, color=ORANGE, label="held out", **markers)
        axes.legend(loc="upper right", borderaxespad=0.2)
    _dress(axes, "Policy loss" if policy else "Loss", "a pair" if "reward_margin" in metrics else "nats a token")
    return figure


def rate_figure(metrics: Metrics) -> Figure:
    """The learning rate."""
    figure = _figure()
    axes = figure.subplots()
    steps, values = metrics.column("lr")
    axes.plot(steps, values, color=PLUM, **({"marker": "o", "markersize": 3} if len(steps) <= POINTS else {}))
    axes.set_ylim(0, max(values.max() * 1.08, 1e-12))
    _dress(axes, "Learning rate", "rate of the optimizer step")
    return figure


def norm_figure(metrics: Metrics) -> Figure:
    """The norm of the gradient."""
    figure = _figure()
    axes = figure.subplots()
    steps, values = metrics.column("grad_norm")
    _logarithmic(axes, values)
    _line(axes, steps, values, GREEN)
    _dress(axes, "Gradient norm", "2-norm before clipping")
    return figure


def throughput_figure(metrics: Metrics) -> Figure:
    """Tokens a second."""
    figure = _figure()
    axes = figure.subplots()
    _line(axes, *metrics.column("tokens_per_second"), INK)
    axes.set_ylim(0, 1.12 * max(row["tokens_per_second"] for row in metrics.rows) or 1.0)
    _dress(axes, "Throughput", "tokens a second")
    return figure


def reward_figure(metrics: Metrics) -> Figure:
    """Reward with its spread inside groups, and below it what else was measured of the completions."""
    panels = [
        ("kl_div", "Divergence from the start", "nats a token", PLUM),
        ("clip_ratio", "Clipped ratios", "share of tokens", ORANGE),
        ("completions/mean_length", "Length of completions", "tokens", BLUE),
        ("completions/clipped_ratio", "Completions cut short", "share", ORANGE),
    ]
    shown = [panel for panel in panels if len(metrics.column(panel[0])[0])][:3]
    figure = _figure(2 * HEIGHT + 0.16 if shown else HEIGHT)
    grid = figure.subplots(1 + len(shown), 1, sharex=True, squeeze=False, height_ratios=[1.7] + [1.0] * len(shown))
    head, *rest = grid[:, 0]
    steps, values = metrics.column("mean_reward")
    spread_steps, spread = metrics.column("reward_std")
    if len(spread) == len(values):
        middle, around = (smooth(values), smooth(spread)) if len(values) > POINTS else (values, spread)
        label = "± standard deviation in a group"
        head.fill_between(spread_steps, middle - around, middle + around, color=GREEN, alpha=0.13, lw=0, label=label)
        head.legend(loc="lower right", borderaxespad=0.2)
    _line(head, steps, values, GREEN)
    _dress(head, "Reward", "mean of completions", step_axis=not rest)
    for number, (axes, (name, title, unit, color)) in enumerate(zip(rest, shown, strict=True), 1):
        steps, values = metrics.column(name)
        _line(axes, steps, values, color)
        _dress(axes, title, unit, step_axis=number == len(shown))
        axes.yaxis.set_major_locator(MaxNLocator(3, steps=ROUND))
    return figure


def curves(metrics: Metrics) -> dict[str, Figure]:
    """Every figure that these metrics allow, by file name without suffix."""
    makers: dict[str, Callable[[Metrics], Figure]] = {
        "loss": loss_figure,
        "lr": rate_figure,
        "grad_norm": norm_figure,
        "throughput": throughput_figure,
    }
    if "mean_reward" in metrics:
        makers["reward"] = reward_figure
    with styled():
        return {name: maker(metrics) for name, maker in makers.items()}
