"""What the GPU's kernels cost a card: registers, spilled bytes and shared memory, as the compiler reports them.

Compiles every kernel for a few kinds of card, which needs nvcc but no card, and keeps the report in docs/gpu.json.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rwkvpipe.base import compiler
from rwkvpipe.kernel import gpu

REPORT = Path(__file__).resolve().parents[1] / "docs/gpu.json"
# a kernel's line, and what follows it; names are as C++ has them in files: Forward, I5ShapeILi64EE, I3WayILl3ELi4EE (of
# tensors 0 and 1 in bf16, four numbers at once; n1 for any), ILi4EE, ILi2ELi8EE (matrices of two bytes a number, for
# eight rows) or ILi2ELb0EE (of two bytes, what is multiplied in fp32)
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'(.*?)(?=Compiling entry function|\Z)", re.S)
NAMED = re.compile(
    r"\d([A-Z][A-Za-z]*?)(?:I3WayILl(n?\d+)E|I5ShapeI|(?:(?<=Few)|(?<=Recall))ILi(\d)E(?:Lb(\d)E)?|I|E)(?:Li(\d+)|E)"
)
# what the numbers in such names say of blend.cu, prepare.cu, finish.cu and loss.cu; others are all tensors in bf16
KINDS = {"n1": "any kinds", "0": "fp32", "2": "fp32 to bf16", "263": "bf16, decays fp32"}
BYTES = {"4": "fp32", "2": "bf16", "1": "int8"}
FIGURES = {
    "registers": re.compile(r"Used (\d+) registers"),
    "spilled": re.compile(r"(\d+) bytes spill stores"),
    "reloaded": re.compile(r"(\d+) bytes spill loads"),
}


def known() -> list[str]:
    """The kinds of card that nvcc knows, from the oldest on."""
    told = subprocess.run([*compiler.nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return [f"sm_{number}" for number in sorted(map(int, re.findall(r"sm_(\d+)$", told, re.M)))]


def targets() -> list[str]:
    """The kinds of card that the report is about."""
    return ["sm_80", "sm_90a", known()[-1]]


def parsed(file: str, told: str) -> list[dict]:
    """What ptxas -v tells of each kernel."""
    found = []
    for name, target, said in ENTRY.findall(told):
        kernel, kinds, size, narrow, width = NAMED.search(name).groups()
        if kinds is not None:
            kernel, width = f"{kernel}, {KINDS.get(kinds, 'bf16')}", None
        if size is not None:
            alone = BYTES[size] == {"1": "bf16", "0": "fp32"}.get(narrow)
            kernel += f", {'all' if alone else 'matrices'} in {BYTES[size]}"
        line = {"file": file, "kernel": kernel, "width": int(width or 0), "target": target}
        found.append(line | {figure: int(look.search(said)[1]) for figure, look in FIGURES.items()})
    return sorted(found, key=lambda line: (line["kernel"], line["width"]))


def report(file: Path, target: str, *flags: str) -> list[dict]:
    """Compile a file for a kind of card. Raises SystemExit where that fails."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*compiler.nvcc(), "-std=c++17", "-O3", "-cubin", f"-arch={target}", "-Xptxas", "-v", *flags]
        done = subprocess.run([*words, str(file), "-o", f"{folder}/out"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[:3000])
    return parsed(file.name, done.stderr)


def measure() -> dict:
    """The report of all kernels. Raises SystemExit without nvcc."""
    if compiler.nvcc() is None:
        raise SystemExit("there is no nvcc")
    lines = [line for target in targets() for file in gpu.sources() for line in report(file, target)]
    return {"what": "registers", "sources": gpu.name(), "nvcc": compiler.version(compiler.nvcc()), "kernels": lines}


def keep(report: Path, found: dict, rows: str) -> None:
    """A report as JSON, with each of its `rows` in a line."""
    lines = ",\n".join(json.dumps(line) for line in found[rows])
    head = json.dumps({key: value for key, value in found.items() if key != rows})
    report.write_text(f'{head[:-1]}, "{rows}": [\n{lines}\n]}}\n')


def write(found: dict) -> None:
    """Keep a report where the page finds it."""
    keep(REPORT, found, "kernels")


def table(found: dict) -> str:
    """The numbers for people: a kernel a line, registers and, where there are any, bytes that were spilled."""
    kinds = list(dict.fromkeys(line["target"] for line in found["kernels"]))
    rows: dict[tuple, dict[str, str]] = {}
    for line in found["kernels"]:
        spilled = f" ({line['spilled']} spilled)" if line["spilled"] else ""
        row = rows.setdefault((line["file"], line["kernel"], line["width"]), {})
        row[line["target"]] = f"{line['registers']}{spilled}"
    return "\n".join(_lines(kinds, rows))


def _lines(kinds: Sequence[str], rows: dict[tuple, dict[str, str]]) -> list[str]:
    head = [f"| registers | channels of a head, rows | {' | '.join(kinds)} |", f"| --- | --- |{' --- |' * len(kinds)}"]
    for (file, kernel, width), row in rows.items():
        heads = f"64, {16 * width} rows a block" if kernel.startswith("Chunks") else f"up to {width}" if width else ""
        if kernel.startswith("Few"):
            heads = f"up to {width} rows" if width > 1 else "1 row"
        head.append(f"| {file}: {kernel} | {heads} | {' | '.join(row.get(kind, '') for kind in kinds)} |")
    return head
