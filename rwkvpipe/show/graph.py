"""The job graph as inline SVG: layers from top to bottom, every box with its time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rwkvpipe.show.evidence import Job, Timing
from rwkvpipe.show.markup import Html, brief, duration, el, join

BOX, TALL, GAP, DROP, BEND, EDGE = 140, 48, 12, 40, 14, 2  # pixels
LETTERS = 19  # of a label that fit into a box
KINDS = {
    "data": ("download", "convert", "vocab", "questions", "pack"),
    "setup": ("settings", "init"),
    "training": ("pretrain", "sft", "dpo", "grpo", "merge"),
    "measuring": ("bench", "score", "generate"),
    "showing": ("plot", "report"),
}
WORDS = {
    "data": "data",
    "setup": "preparation",
    "training": "training",
    "measuring": "measuring",
    "showing": "plots and report",
}
SWEEPS = 12
READABLE = 0.78  # of its natural size


def kind(rule: str) -> str:
    """Which sort of work a rule does."""
    return next((name for name, rules in KINDS.items() if rule.split("_")[0] in rules), "setup")


@dataclass(eq=False)
class Spot:
    """A box of the drawing, or a bend where a line crosses a layer (job is None)."""

    job: Job | None
    layer: int
    above: list["Spot"] = field(default_factory=list)
    below: list["Spot"] = field(default_factory=list)
    x: float = 0.0

    @property
    def width(self) -> int:
        return BOX if self.job else BEND


def needed(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Direct needs of each job, without those that another need implies."""
    before: dict[str, set[str]] = {}
    needs: dict[str, list[str]] = {}
    for job in jobs:
        known = [name for name in dict.fromkeys(job.needs) if name in before]
        implied = set().union(*(before[name] for name in known))
        needs[job.id] = [name for name in known if name not in implied]
        before[job.id] = implied | set(known)
    return needs


def layers_of(needs: dict[str, list[str]]) -> dict[str, int]:
    """A layer for each job: below all its needs, and no higher than what waits for it demands."""
    layer: dict[str, int] = {}
    for name, above in needs.items():
        layer[name] = 1 + max((layer[other] for other in above), default=-1)
    waiting: dict[str, list[str]] = {name: [] for name in needs}
    for name, above in needs.items():
        for other in above:
            waiting[other].append(name)
    for name in reversed(needs):
        if waiting[name]:
            layer[name] = min(layer[other] for other in waiting[name]) - 1
    return layer


def _spots(jobs: Sequence[Job]) -> list[list[Spot]]:
    """Boxes and bends, layer by layer, joined to their neighbours in the layers above and below."""
    needs = needed(jobs)
    layer = layers_of(needs)
    rows: list[list[Spot]] = [[] for _ in range(1 + max(layer.values(), default=-1))]
    spots = {job.id: Spot(job, layer[job.id]) for job in jobs}
    for job in jobs:
        rows[layer[job.id]].append(spots[job.id])
    for name, above in needs.items():
        for other in above:
            last = spots[other]
            for level in range(layer[other] + 1, layer[name] + 1):
                spot = spots[name] if level == layer[name] else Spot(None, level)
                if spot.job is None:
                    rows[level].append(spot)
                last.below.append(spot)
                spot.above.append(last)
                last = spot
    return rows


def _order(rows: list[list[Spot]]) -> None:
    """Sort each layer by where its neighbours stand, down and up in turn, so that few lines cross."""
    place = {spot: float(index) for row in rows for index, spot in enumerate(row)}
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            goal = {}
            for spot in row:
                near = spot.above if down else spot.below
                goal[spot] = sum(place[other] for other in near) / len(near) if near else place[spot]
            row.sort(key=goal.__getitem__)
            place |= {spot: float(index) - len(row) / 2 for index, spot in enumerate(row)}


def _apart(row: list[Spot], goal: list[float]) -> None:
    """Nearest places to the goals (least squares) that keep the order and the gaps between boxes."""
    offset, offsets = 0.0, []
    for index, spot in enumerate(row):
        if index:
            offset += (row[index - 1].width + spot.width) / 2 + GAP
        offsets.append(offset)
    blocks: list[tuple[float, int]] = []  # mean of goals less offsets, how many
    for wanted, shift in zip(goal, offsets, strict=True):
        mean, size = wanted - shift, 1
        while blocks and blocks[-1][0] > mean:
            other, many = blocks.pop()
            mean, size = (mean * size + other * many) / (size + many), size + many
        blocks.append((mean, size))
    flat = [mean for mean, size in blocks for _ in range(size)]
    for spot, mean, shift in zip(row, flat, offsets, strict=True):
        spot.x = mean + shift


def _place(rows: list[list[Spot]]) -> None:
    """Give every spot the x of its middle."""
    for row in rows:
        _apart(row, [0.0] * len(row))
    for sweep in range(2 * SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            near = [spot.above + spot.below for spot in row]
            _apart(row, [sum(o.x for o in n) / len(n) if n else s.x for s, n in zip(row, near, strict=True)])
    left = min((spot.x - spot.width / 2 for row in rows for spot in row), default=0.0)
    for row in rows:
        for spot in row:
            spot.x += EDGE - left


def _y(layer: int) -> int:
    return EDGE + layer * (TALL + DROP)


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"


def _box(job: Job, timing: Timing | None, *, x: float, y: float, width: float = BOX, share: float = 0.0) -> Html:
    """One job: kind by colour, rule, time, label; a bar for its `share` of the slowest job's time; all as a tooltip."""
    took = duration(timing.seconds) if timing else "not measured"
    memory = f", {timing.megabytes:,.0f} MB" if timing and timing.megabytes is not None else ""
    parts = [
        el("title", f"{job.id}: {took}{memory}"),
        el("rect", klass="box", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=TALL, rx=7),
        el("rect", klass="mark", x=f"{x + 8:.1f}", y=f"{y + 9:.1f}", width=4, height=TALL - 20, rx=2),
        el("text", job.rule, klass="rule", x=f"{x + 20:.1f}", y=f"{y + 19:.1f}"),
        el("text", _cut(job.label), klass="label", x=f"{x + 20:.1f}", y=f"{y + 35:.1f}"),
    ]
    if timing:
        parts.append(el("text", brief(timing.seconds), klass="time", x=f"{x + width - 9:.1f}", y=f"{y + 19:.1f}"))
    if share * BOX > EDGE:
        long = share * (BOX - 16)
        corner = {"x": f"{x + 8:.1f}", "y": f"{y + TALL - 6:.1f}"}
        parts.append(el("rect", klass="bar", width=f"{long:.1f}", height=3, rx=1.5, **corner))
    return el("g", *parts, klass=f"job {kind(job.rule)}")


def _lines(rows: list[list[Spot]]) -> list[Html]:
    drawn = []
    for row in rows:
        for spot in row:
            for other in spot.below:
                x, y, to_x, to_y = spot.x, _y(spot.layer) + TALL, other.x, _y(other.layer)
                middle = (y + to_y) / 2
                path = f"M{x:.1f},{y} C{x:.1f},{middle} {to_x:.1f},{middle} {to_x:.1f},{to_y}"
                if other.job is None:  # straight through the layer it crosses
                    path += f" V{to_y + TALL}"
                drawn.append(el("path", klass="line", d=path))
    return drawn


def legend(jobs: Sequence[Job]) -> Html:
    """What the colours mean."""
    used = {kind(job.rule) for job in jobs}
    return el("p", *(el("span", WORDS[name], klass=f"key {name}") for name in KINDS if name in used), klass="legend")


def draw(jobs: Sequence[Job], timings: dict[str, Timing]) -> Html:
    """All jobs as one SVG; the report, which reads every result, is a bar under the others."""
    rows = _spots([job for job in jobs if job.rule != "report"])
    _order(rows)
    _place(rows)
    width = max((spot.x + spot.width / 2 for row in rows for spot in row), default=BOX) + EDGE
    slowest = max((timing.seconds for timing in timings.values()), default=0.0) or 1.0
    shares = {name: timing.seconds / slowest for name, timing in timings.items()}
    boxes = [
        _box(spot.job, timings.get(name), x=spot.x - BOX / 2, y=_y(spot.layer), share=shares.get(name, 0.0))
        for row in rows
        for spot in row
        if spot.job is not None and (name := spot.job.id)
    ]
    height = float(_y(len(rows)) - DROP / 2 if rows else EDGE)
    for job in (job for job in jobs if job.rule == "report"):
        told = job if job.label else job.model_copy(update={"label": "reads every result"})
        share = shares.get(job.id, 0.0)
        boxes.append(_box(told, timings.get(job.id), x=EDGE, y=height, width=width - 2 * EDGE, share=share))
        height += TALL + GAP
    height += EDGE - GAP
    # it shrinks with the page down to what can be read, then its frame scrolls
    style = f"max-width:{width:.0f}px;min-width:{READABLE * width:.0f}px"
    box = f"0 0 {width:.0f} {height:.0f}"
    # attributes in camel case are SVG's own
    head = Html(f'<svg viewBox="{box}" style="{style}" role="img" aria-label="Jobs of the run">')
    return join([head, join(_lines(rows)), join(boxes), Html("</svg>")])
