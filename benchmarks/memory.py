"""What packing holds in memory, all its processes together, on inputs of gigabytes made on the spot.

Documents of Python's library and papers follow one another, each with its number before it, so that no two are equal.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from benchmarks.pack import documents, run

BPE_IDS = 32768
CASES = (
    "world, JSON lines", "world, parquet", "bpe, JSON lines", "bpe by gigatoken, JSON lines", "world, one text",
    "world, one line of 64 MB",
)  # fmt: skip


def texts(source: Path, gigabytes: float) -> Iterator[str]:
    """Documents until there are so many gigabytes."""
    found = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    size = 0
    for number in count():
        text = f"{number}\n{found[number % len(found)]}"
        size += len(text.encode())
        yield text
        if size >= gigabytes * 1e9:
            return


def write(case: str, source: Path, folder: Path, gigabytes: float) -> Path:
    """The input of a case."""
    path = (
        folder
        / f"memory-{CASES.index(case)}.{'parquet' if 'parquet' in case else 'txt' if 'text' in case else 'jsonl'}"
    )
    if "parquet" in case:
        import pyarrow as pa
        from pyarrow import parquet

        with parquet.ParquetWriter(path, pa.schema([("text", pa.string()), ("number", pa.int64())])) as sink:
            some: list[str] = []
            for number, text in enumerate(texts(source, gigabytes), 1):
                some.append(text)
                if number % 2000 == 0:
                    sink.write_table(pa.table({"text": some, "number": [number] * len(some)}))
                    some = []
            if some:
                sink.write_table(pa.table({"text": some, "number": [0] * len(some)}))
        return path
    with open(path, "w", encoding="utf-8") as file:
        if "one line" in case:
            for letters in ("a", "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo", "\u4e2d"):
                file.write(
                    json.dumps({"text": letters * (64_000_000 // len(letters.encode()))}, ensure_ascii=False) + "\n"
                )
        else:
            for text in texts(source, gigabytes):
                file.write(text + "\n" if "one text" in case else json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def measure(folder: Path, gigabytes: float, files: list[Path], cases: list[str], workers: int = 2) -> dict:
    """Megabytes held and megabytes a second of each case."""
    source = documents(files, folder, 30)
    words = {"world": folder / "world", "bpe": folder / "bpe"}
    for kind, spec in (
        ("world", {"kind": "world"}),
        ("bpe", {"kind": "bpe", "corpora": ["c"], "vocab_size": BPE_IDS, "sample": 8}),
    ):
        if not (words[kind] / "tokenizer.json").exists():
            call = [sys.executable, "-m", "rwkvpipe.vocab", *([source] if kind == "bpe" else [])]
            subprocess.run([*call, "--spec", json.dumps(spec), "--out", words[kind]], check=True)
    found = {}
    for case in cases:
        path = write(case, source, folder, gigabytes)
        call = [sys.executable, "-m", "rwkvpipe.pack", path, "--spec", json.dumps({"path": "x", "tokenizer": "w"})]
        began = time.monotonic()
        call += ["--tokenizer", words[case.partition(",")[0].split()[0]], "--workers", workers]
        call += ["--bpe-engine", "gigatoken"] if "gigatoken" in case else []
        used = run([*call, "--out", folder / "packed"],
                   folder / "memory.log")  # fmt: skip
        found[case] = {"input_megabytes": path.stat().st_size / 1e6, "held_megabytes": used["megabytes"],
                       "resident_megabytes": used["resident"], "seconds": time.monotonic() - began,
                       "cpu_seconds": used["cpu_seconds"]}  # fmt: skip
        path.unlink()
    return {"benchmark": "memory", "cases": found, "workers": workers, "machine": platform.machine()}


def table(found: dict) -> str:
    """The numbers for people."""
    lines = [f"{'':26} {'MB in':>7} {'held':>6} {'RSS':>6} {'s':>6} {'CPU s':>7}"]
    for case, each in found["cases"].items():
        lines.append(
            f"{case:26} {each['input_megabytes']:7.0f} {each['held_megabytes']:6.0f} {each['resident_megabytes']:6.0f}"
            f" {each['seconds']:6.0f} {each['cpu_seconds']:7.0f}"
        )
    return "\n".join([*lines, f"{found['workers']} workers; held: MB of all processes together, shared pages once"])
