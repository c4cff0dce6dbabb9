import re

from rwkvpipe.show.evidence import Job, Timing
from rwkvpipe.show.graph import draw, kind, layers_of, legend, needed

JOBS = [
    Job(id="pack a", rule="pack", label="a"),
    Job(id="pretrain b", rule="pretrain", label="b", needs=("pack a",)),
    Job(id="bench b q", rule="bench", label="b q", needs=("pretrain b", "pack a")),
    Job(id="report", rule="report", needs=("bench b q", "pretrain b")),
]


def test_lines_that_others_imply_are_left_out():
    assert needed(JOBS)["bench b q"] == ["pretrain b"]


def test_a_step_stands_below_what_it_needs():
    layer = layers_of(needed(JOBS))
    assert all(layer[above] < layer[name] for name, needs in needed(JOBS).items() for above in needs)


def test_every_step_is_drawn_once_with_its_time():
    drawn = draw(JOBS, {"pack a": Timing(12.0, 5.0), "pretrain b": Timing(200.0, None)})
    titles = re.findall(r"<title>(.*?)</title>", drawn)
    assert titles == ["pack a: 12 s, 5 MB", "pretrain b: 3 min 20 s", "bench b q: not measured", "report: not measured"]
    assert ">12 s</text>" in drawn and ">3.3 min</text>" in drawn


def test_boxes_lie_inside_the_drawing_and_do_not_overlap():
    jobs = [Job(id=f"plot {n}", rule="plot", label=str(n), needs=("pack a",)) for n in range(9)]
    drawn = draw([JOBS[0], *jobs], {})
    width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', drawn).groups())
    corners = [
        tuple(map(float, found)) for found in re.findall(r'class="box" x="([\d.]+)" y="([\d.]+)" width="140', drawn)
    ]
    assert len(corners) == 10 and all(x >= 0 and x + 140 <= width and y >= 0 and y + 48 <= height for x, y in corners)
    row = sorted(x for x, y in corners if y == corners[-1][1])
    assert all(right - left >= 140 for left, right in zip(row, row[1:], strict=False))


def test_no_step_and_only_the_report_can_be_drawn():
    assert draw([], {}).startswith("<svg") and "report" in draw([JOBS[-1]], {})


def test_the_legend_names_the_kinds_that_are_there():
    assert re.findall(r'class="key (\w+)"', legend(JOBS)) == ["data", "training", "measuring", "showing"]
    assert kind("pretrain_lora") == "training" and kind("plot_grpo") == "showing"
