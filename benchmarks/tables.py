"""The tables of several pages in docs/, out of what lies beside them: `python -m benchmarks.tables`.

A run of `python -m benchmarks` appends a line to a file of its own; those to be shown are copied to the latter. Of
runs of the same thing the last one counts.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    busy,
    counts,
    decode,
    demo,
    families,
    gpu,
    infer,
    op,
    perplexity,
    precision,
    product,
    registers,
    same,
    train,
    tune,
)

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLES = {
    "op": op.table,
    "product": product.table,
    "train": train.table,
    "tune": tune.table,
    "families": families.table,
    "decode": decode.table,
    "busy": busy.table,
    "demo": demo.table,
    "perplexity": perplexity.table,
}
PRECISION = {"precision": precision.table}
INFERENCE = {"infer": infer.table, "same": same.table}


def runs(name: str = "kernels") -> dict[str, dict]:
    """The last run of each thing, by its name, of those beside a page; what ran on a processor of AMD's says so."""
    found = {}
    for line in (DOCS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        case = run.get("operator") or f"{run['case']['n_layer']}x{run['case']['n_embd']}"
        if (family := run.get("case", {}).get("family", "rwkv7")) != "rwkv7":
            case = f"{family} {case}"
        maker = " on AMD" if run["machine"].startswith("AMD") else ""
        found[f"{run['what']} {case}{maker}"] = run
    return found


def filled(page: str, name: str = "kernels", made: dict[str, Callable[[dict], str]] = TABLES) -> str:
    """A page with the table of each run between its marks."""
    for what, run in runs(name).items():
        about = f"{run['machine']}, load {run['load']:.0f}, {run['kernel']}, torch {run['torch']}"
        text = f"<!-- {what} -->\n{made[run['what']](run)}\n\n{about}\n<!-- end -->"
        place = re.compile(rf"<!-- {re.escape(what)} -->\n.*?<!-- end -->", re.S)
        page, count = place.subn(lambda _, new=text: new, page)
        if count != 1:
            raise SystemExit(f"docs/{name}.md has no place for: {what}")
    return page


def rounded(page: str) -> str:
    """A page with what bf16 was last measured to do to a training between its marks."""
    return filled(page, "memory", PRECISION)


def inferred(page: str) -> str:
    """A page with what the engine was last measured to do between its marks."""
    lines = (DOCS / "inference.jsonl").read_text(encoding="utf-8").splitlines()
    for name, run in {run["what"]: run for run in map(json.loads, lines)}.items():
        text = f"<!-- {name} -->\n{INFERENCE[name](run)}\n\n{run['machine']}, torch {run['torch']}\n<!-- end -->"
        page, count = re.subn(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _, new=text: new, page, flags=re.S)
        if count != 1:
            raise SystemExit(f"docs/inference.md has no place for: {name}")
    return page


def reported(page: str) -> str:
    """A page with what is known of the GPU's kernels between its marks: of the compiler, counted, and measured."""
    parts = {"gpu": gpu.table(gpu.kept(DOCS / "gpu.jsonl"))}
    for name, report in {"registers": registers, "counts": counts}.items():
        found = json.loads(report.REPORT.read_text(encoding="utf-8"))
        parts[name] = f"{report.table(found)}\n\n{found['nvcc']}"
    for name, text in parts.items():
        text = f"<!-- {name} -->\n{text}\n<!-- end -->"
        page = re.sub(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _, new=text: new, page, flags=re.S)
    return page


def write() -> None:
    """Put the tables into the pages."""
    pages = {"kernels": filled, "memory": rounded, "inference": inferred, "gpu": reported}
    for name, fill in pages.items():
        path = DOCS / f"{name}.md"
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
