import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image

from rwkvpipe.base.errors import ConfigError
from rwkvpipe.report import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# the report has no scripts; a page around it asks how wide it came out, and what sticks out of it
FRAME = """<!doctype html><style>iframe {border: 0; width: WIDTHpx; height: 3000px} body {margin: 0}</style>
<iframe src="REPORT"></iframe>
<script>addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument, out = [];
  for (const found of page.querySelectorAll("details")) found.open = OPEN;
  for (const node of page.querySelectorAll("body *:not(.graph *)")) {
    const box = node.getBoundingClientRect();
    if (box.width && (box.right > WIDTH + 0.5 || box.left < -0.5)) out.push(node.tagName + "." + node.className);
  }
  const {scrollWidth, scrollHeight} = page.documentElement;
  document.title = JSON.stringify({wide: scrollWidth, high: scrollHeight, out});
});</script>"""


def report(story: dict, out: str = "results/demo/report.html") -> Path:
    main(["--spec", json.dumps(story), "--out", out])
    return Path(out)


def browse(*words: str | Path) -> str:
    """What headless chromium prints; skipped where there is none."""
    if BROWSER is None:
        pytest.skip("no chromium here, so nobody can look at the report")
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-dev-shm-usage",
    ]
    command += [
        "--allow-file-access-from-files",
        "--virtual-time-budget=3000",
        f"--user-data-dir={Path('browser').resolve()}",
    ]
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_declared_file_is_written(finished_run):
    report(finished_run)
    assert sorted(str(path) for path in Path("results/demo/plots").iterdir()) == [
        "results/demo/plots/scores.csv",
        "results/demo/plots/scores.png",
    ]
    assert Path("results/demo/plots/scores.png").read_bytes().startswith(b"\x89PNG")
    with open("results/demo/plots/scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and [row["subject"] for row in rows][-1] == "reason"


def test_equal_evidence_gives_equal_files(finished_run):
    first = report(finished_run, "one/report.html").read_bytes()
    assert first == report(finished_run, "two/report.html").read_bytes()
    assert Path("one/plots/scores.png").read_bytes() == Path("two/plots/scores.png").read_bytes()


def test_without_scores_there_is_a_page_and_no_chart(finished_run):
    for subject in finished_run["subjects"]:
        subject["bench"] = []
    assert report(finished_run).is_file() and not Path("results/demo/plots").exists()


def test_a_story_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--spec"):
        main(["--spec", "{", "--out", str(tmp_path / "report.html")])


def test_a_broken_file_ends_the_program_in_one_line(finished_run):
    Path("results/demo/base/bench/exact.json").write_text("{")
    command = [sys.executable, "-m", "rwkvpipe.report", "--spec", json.dumps(finished_run), "--out", "report.html"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "results/demo/base/bench/exact.json:1: not JSON" in done.stderr


def test_the_report_does_not_load_torch():
    probe = "import sys, rwkvpipe.report; assert not {'torch', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("opened", ["true", "false"])
def test_the_page_is_no_wider_than_the_window(finished_run, width, opened):
    long = {"prompt": "a" * 300, "text": "b " + "https://" + "c" * 400, "question": "q" * 200, "answer": "r" * 200}
    for file in ("samples.jsonl", "bench/exact.samples.jsonl"):
        Path("results/demo/chat", file).write_text(json.dumps(long | {"gold": "g" * 200, "correct": 0}) + "\n")
    page = report(finished_run).resolve()
    frame = FRAME.replace("REPORT", page.as_uri()).replace("WIDTH", str(width)).replace("OPEN", opened)
    Path("frame.html").write_text(frame)
    dom = browse("--window-size=1400,3000", "--dump-dom", Path("frame.html").resolve().as_uri())
    found = json.loads(dom.split("<title>")[1].split("</title>")[0])
    assert found["wide"] == width and found["high"] > 3000 and found["out"] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_can_be_seen(finished_run, width, scheme):
    page = report(finished_run).resolve()
    Path("frame.html").write_text(
        f'<!doctype html><body style="margin:0"><iframe src="{page.as_uri()}"'
        f' style="border:0;width:{width}px;height:2400px"></iframe>'
    )
    # 0 is dark, 1 light
    chosen = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    shot = Path(f"{scheme}-{width}.png").resolve()
    browse(chosen, "--window-size=1280,2400", f"--screenshot={shot}", Path("frame.html").resolve().as_uri())
    picture = image.imread(shot)[:, :width, :3]
    assert picture.shape[:2] == (2400, width)
    around = picture[5, 5].mean()
    assert around < 0.3 if scheme == "dark" else around > 0.9
    # text and curves in each third, in ink that stands out from what is around it
    for third in range(3):
        part = picture[800 * third : 800 * (third + 1)].mean(axis=2)
        assert (abs(part - around) > 0.4).mean() > 0.005
