"""Whose products of fp32 compute on the CPU, torch's or our own: whichever is faster, found out once for a machine.

They are timed beside each other on matrices of a model's size, and what was found is kept beside the compiled kernels,
for each processor, version of torch and of the kernels. The two differ in last digits: a training goes on with those
that it began with, wherever it goes on.
"""

import logging
import os
import platform
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkvpipe.base import compiler
from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import read_json, write_json
from rwkvpipe.base.lock import lock
from rwkvpipe.kernel import build, product
from rwkvpipe.kernel.product import Products

log = logging.getLogger("rwkvpipe")

ROWS, WIDEST = 512, 2048  # of the products that are timed
ROUNDS = 5
GAIN = 1.05  # how many times as fast ours must be to be worth it


def begin(model: nn.Module) -> None:
    """Choose products for a model, unless that has been done."""
    if product.chosen() is None:
        settle(model)


def settle(model: nn.Module, began: str | None = None) -> str:
    """Choose products for a model from here on, `torch` or `own`; those that a training `began` with stay."""
    asked, shape = compiler.products(), _shape(model)
    if began is not None:
        name, why = began, "as this training began"
        if asked not in (None, began):
            log.warning("RWKVPIPE_PRODUCTS asks for %s; this training began with %s and goes on so", asked, began)
    elif shape is None or build.native(*model.parameters()) is None:
        name, why = "torch", ""
    elif asked is not None:
        name, why = asked, "as RWKVPIPE_PRODUCTS says"
    else:
        name, why = _faster(shape)
    if name == "own" and build.extension() is None:
        log.warning("products: own ones were to compute, and cannot: %s", build.why_not())
    if why:
        log.info("products of fp32: %s, %s", name, why)
    product.choose(name)
    return name


def _shape(model: nn.Module) -> tuple[int, int] | None:
    """The sizes of the matrices that hold most of a model's numbers, the smaller one first."""
    numbers: Counter[tuple[int, int]] = Counter()
    for value in model.parameters():
        if value.dim() == 2:
            numbers[min(value.shape), max(value.shape)] += value.numel()
    return numbers.most_common(1)[0][0] if numbers else None


def _faster(shape: tuple[int, int]) -> tuple[str, str]:
    """Which is faster, and why it is chosen: torch's where what is found cannot be kept, lest the next one differ."""
    sizes = [min(size, WIDEST) for size in shape]
    mark = compiler.short_digest(processor(), torch.__version__, build.name(build.level()), *map(str, sizes))
    path = compiler.folder() / f"products-{mark}.json"
    try:
        if not path.exists():
            held = lock(path.with_suffix(".lock"), waiting="products: being timed")
            try:
                if not path.exists():
                    write_json(path, _timed(sizes))
            finally:
                os.close(held)
        ratio = float(read_json(path)["times_as_fast"])
    except (OSError, DataError, KeyError, TypeError, ValueError) as error:
        return "torch", f"for what is faster here cannot be kept ({compiler.reason(error)})"
    name = "own" if ratio >= GAIN else "torch"
    return name, f"own ones are {ratio:.2f} times as fast as torch's here, at {sizes[0]} x {sizes[1]}"


def processor() -> str:
    """The processor's name, as its system has it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _timed(sizes: list[int]) -> dict:
    """Both on one thread, in turns: a product and those of its gradients. Times are of this process alone."""
    narrow, wide = sizes
    draw, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    x, y, matrix = (torch.randn(n, m, generator=draw) for n, m in ((ROWS, narrow), (ROWS, wide), (wide, narrow)))
    ways, spent = (Products(), Products(own=True)), ([], [])
    torch.set_num_threads(1)
    try:
        for _ in range(ROUNDS):
            for how, seconds in zip(ways, spent, strict=True):
                seconds.append(_seconds(how, x, y, matrix))
    finally:
        torch.set_num_threads(threads)
    found = {"processor": processor(), "torch": torch.__version__, "kernels": build.level(), "sizes": sizes}
    return found | {"times_as_fast": min(spent[0]) / min(spent[1])}


def _seconds(how: Products, x: Tensor, y: Tensor, matrix: Tensor) -> float:
    began = time.thread_time()
    how.mm(x, matrix.mT), how.mm(y, matrix), how.mm(y.mT, x)
    return time.thread_time() - began
