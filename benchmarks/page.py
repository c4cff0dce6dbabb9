"""The tables of docs/data.md, out of what pack, bpe and memory last measured."""

import json
from pathlib import Path
from statistics import median

PAGE = Path(__file__).resolve().parents[1] / "docs/data.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->\n"


def rows(head: list[str], body: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _pack(found: dict) -> str:
    said = [
        [name, f"{found['megabytes'][size]:.0f}", f"{median(found['megabytes_per_cpu_second'][name]):.1f}",
         f"{max(turn['megabytes'] for turn in found['turns'][name]):.0f}"]
        for name, size in (("rwkvpipe", "whole"), ("make_data.py", "part"))
    ]  # fmt: skip
    told = f"The same bytes; ours packs {found['ratio']:.1f} times as much in a CPU second, starts not counted"
    told += " (`python -m benchmarks pack`)."
    return rows(["JSON lines, World", "MB", "MB a CPU second", "MB of memory"], said) + f"\n{told}\n"


def _bpe(found: dict) -> str:
    said = [
        [name, f"{median(rates):.2f}", f"{found['ratios'][name]:.2f}" if name in found["ratios"] else ""]
        for name, rates in found["megabytes_per_cpu_second"].items()
    ]
    told = "One tokenizer.json, the same ids, one core (`python -m benchmarks bpe`)."
    return rows(["JSON lines, BPE", "MB a CPU second", "ours beside it"], said) + f"\n{told}\n"


def _memory(found: dict) -> str:
    said = [
        [case, f"{each['input_megabytes']:,.0f}", f"{each['held_megabytes']:.0f}", f"{each['resident_megabytes']:.0f}"]
        for case, each in found.items()
    ]
    told = "Two workers, three processes together; resident counts what they share in each"
    told += " (`python -m benchmarks memory`)."
    return rows(["input", "MB", "MB held", "resident"], said) + f"\n{told}\n"


def _last(file: Path) -> dict | None:
    return json.loads(file.read_text().splitlines()[-1]) if file.is_file() else None


def write(folder: Path) -> None:
    """Put what was measured, as far as it was, between the page's two marks."""
    cases: dict = {}
    memory = folder / "memory.jsonl"
    for line in memory.read_text().splitlines() if memory.is_file() else ():
        cases |= json.loads(line)["cases"]
    pack, bpe = _last(folder / "pack.jsonl"), _last(folder / "bpe.jsonl")
    parts = [_pack(pack) if pack else "", _bpe(bpe) if bpe else "", _memory(cases) if cases else ""]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(part for part in parts if part) + "\n" + END + after)
