"""A product of matrices and those of its gradients, of fp32 by torch and by our own kernel, and by that of bf16, where
the processor multiplies it, and of whole numbers of 12 bits: CPU time on one thread."""

import time
from statistics import median

import torch

from benchmarks.page import rows
from benchmarks.train import conditions
from rwkvpipe.kernel import build
from rwkvpipe.kernel.product import Products

SIZES = ((1024, 256, 256), (1024, 256, 1024), (256, 768, 768), (256, 768, 3072), (2048, 128, 512))
WAYS = {
    "torch": Products(),
    "own": Products(own=True),
    "bf16": Products(torch.bfloat16, own=True),
    "whole": Products(torch.bfloat16, False, whole=True),
}
# the most that a product may differ from torch's, as a share of the largest number
FAR = {"own": 1e-5, "bf16": 1e-2, "whole": 2e-3}
SPEED = {"torch": "GFLOP/s by torch", "own": "by our own", "bf16": "of bf16", "whole": "of whole numbers"}


def _seconds(how: Products, x: torch.Tensor, y: torch.Tensor, matrix: torch.Tensor) -> float:
    begin = time.thread_time()
    how.mm(x, matrix.mT), how.mm(y, matrix), how.mm(y.mT, x)
    return time.thread_time() - begin


def measure(rounds: int) -> dict:
    """CPU seconds of all, in turns, at each size. Raises SystemExit when their results differ."""
    torch.set_num_threads(1)
    library = build.extension()
    ways = [name for name in WAYS if name != "bf16" or (library and library.multiply_bf16())]
    draw, found = torch.Generator().manual_seed(0), {}
    for tokens, narrow, wide in SIZES:
        x, y, matrix = (
            torch.randn(n, m, generator=draw) for n, m in ((tokens, narrow), (tokens, wide), (wide, narrow))
        )
        true = x @ matrix.mT
        for name in ways[1:]:
            if float((WAYS[name].mm(x, matrix.mT) - true).abs().max()) > FAR[name] * float(true.abs().max()):
                raise SystemExit(f"the products by {name} differ, so there is nothing to compare")
        turns = [{name: _seconds(WAYS[name], x, y, matrix) for name in ways} for _ in range(4 * rounds)]
        found[f"{tokens} x {narrow} x {wide}"] = {name: [turn[name] for turn in turns] for name in ways}
    return {"what": "product", "operator": "fp32", "cpu_seconds": found, **conditions()}


def table(found: dict) -> str:
    """The numbers for people: billions of operations a second, and the median of the ratios of turns."""
    body = []
    for name, seconds in found["cpu_seconds"].items():
        tokens, narrow, wide = map(int, name.split(" x "))
        speeds = [f"{6e-9 * tokens * narrow * wide / median(spent):.0f}" for spent in seconds.values()]
        said = []
        for way in list(seconds)[1:]:
            ratios = [a / b for a, b in zip(seconds["torch"], seconds[way], strict=True)]
            said.append(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        body.append([name, *speeds, *said])
    first, *others = list(seconds)[1:]
    head = ["tokens and sizes", *(SPEED[way] for way in seconds), f"{first}: times as fast", *others]
    return rows(head, body).rstrip("\n")
