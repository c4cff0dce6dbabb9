"""RWKV World tokenisation on one core: ours with every engine, the Rust package pyrwkv-tokenizer, and RWKV-LM's trie.

All encode the same documents, in turns, each program in a process of its own. Before anything is timed, all must give
the same ids. Times are of the process's CPU; the trie, which is slow, gets a part of the text.
"""

import json
import platform
import sys
from pathlib import Path
from statistics import median

from benchmarks.train import Worker

OURS, RUST, TRIE = "rwkvpipe", "pyrwkv-tokenizer", "RWKV-LM trie"
COLD = f"{OURS} numpy cold"
SHARE = {TRIE: 8, "rwkvpipe plain": 8}  # encodes every so-many-th document


def corpus(files: list[Path], folder: Path, megabytes: float) -> Path:
    """Documents of the given files, or of Python's own library and this project's papers, as JSON Lines."""
    if not files:
        root = Path(__file__).resolve().parents[1]
        library = Path(json.__file__).resolve().parents[1]
        files = [*sorted(root.glob("*.md")), *sorted(root.glob("*/*.md")), *sorted(library.rglob("*.py"))]
        files += sorted(Path(sys.prefix).rglob("*.md")) + sorted(Path(sys.prefix).rglob("*.rst"))
    folder.mkdir(parents=True, exist_ok=True)
    size, out = 0, folder / "tokenize.jsonl"
    with open(out, "w", encoding="utf-8") as file:
        for path in files:
            text = path.read_text(encoding="utf-8", errors="ignore")
            for document in text.splitlines() if path.suffix == ".jsonl" else [text]:
                file.write(json.dumps(document) + "\n")
                size += len(document)
            if size > megabytes * 1e6:
                break
    return out


def measure(peer: Path, folder: Path, rounds: int, files: list[Path], megabytes: float = 8) -> dict:
    """Megabytes a CPU second of each program, in turns. Raises SystemExit when any gives other ids."""
    text = corpus(files, folder, megabytes)
    ours, theirs = "tokenize_ours.py", "tokenize_peers.py"
    programs = {f"{OURS} {engine}": (sys.executable, ours, engine) for engine in ("native", "native list", "numpy")}
    programs |= {RUST: (peer, theirs, "rust"), TRIE: (peer, theirs, "trie")}
    workers = {
        name: Worker(python, script, text, which, str(SHARE.get(name, 1)))
        for name, (python, script, which) in programs.items()
    }
    parity = {name: worker.ask("parity")["digest"] for name, worker in workers.items()}
    if len(set(parity.values())) > 1:
        raise SystemExit(f"the ids differ, so there is nothing to compare: {parity}")
    for worker in workers.values():
        worker.ask("encode")
    memory = {name: worker.ask("memory")["megabytes_added"] for name, worker in workers.items()}
    rates: dict[str, list[float]] = {name: [] for name in (*workers, COLD)}
    for _ in range(rounds):
        for name, worker in workers.items():
            if name == f"{OURS} numpy":  # what it remembers goes, and comes again
                rates[COLD].append(worker.ask("cold")["megabytes_per_second"])
            rates[name].append(worker.ask("encode")["megabytes_per_second"])
    for worker in workers.values():
        worker.close()
    return {
        "benchmark": "tokenize",
        "text_megabytes": round(text.stat().st_size / 1e6, 2),
        "megabytes_per_cpu_second": rates,
        "megabytes_added": memory,
        "ratio_to_rust": {name: _ratio(rates[name], rates[RUST]) for name in rates},
        "ratio_to_trie": {name: _ratio(rates[name], rates[TRIE]) for name in rates},
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def table(found: dict) -> str:
    """The numbers for people."""
    lines = [f"{'':22} {'MB/s':>7} {'x Rust':>7} {'x trie':>7} {'MB added':>9}"]
    for name, rates in found["megabytes_per_cpu_second"].items():
        added = found["megabytes_added"].get(name)
        lines.append(
            f"{name:22} {median(rates):7.2f} {found['ratio_to_rust'][name]:7.2f}"
            f" {found['ratio_to_trie'][name]:7.2f} {'' if added is None else round(added):>9}"
        )
    return "\n".join(lines)
