"""Whose products compute on the CPU: torch's of fp32 or our own, and where it may be rounded to bf16 the processor's or
those of whole numbers, too.

Whichever is faster, found out once for a machine: they are timed beside each other on matrices of a model's size, and
what was found is kept beside the compiled kernels, for each processor, version of torch and of the kernels. They differ
in last digits: a training goes on with those that it began with, wherever it goes on.
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
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import read_json, write_json
from rwkvpipe.base.lock import lock
from rwkvpipe.kernel import build, product
from rwkvpipe.kernel.product import Products, one_thread

log = logging.getLogger("rwkvpipe")

ROWS, WIDEST = 512, 2048  # of the products that are timed
ROUNDS = 5
GAIN = 1.05  # how many times as fast as torch's of fp32 others must be to be worth it
# of those that are about as fast the first is chosen: own ones have the same bits at any number of threads, and only
# large products are worth rounding to whole numbers
CALLED = {
    "own": "own ones",
    "bf16+own": "own ones of bf16",
    "whole": "those of whole numbers of 12 bits",
    "bf16": "the processor's of bf16",
}


def begin(model: nn.Module) -> None:
    """Choose products for a model, unless that has been done."""
    if product.chosen() is None:
        settle(model)


def settle(model: nn.Module, began: str | None = None, *, rounded: bool = False) -> str:
    """Choose products for a model from here on, `torch`, `own` or, for what may be rounded, `bf16`, `bf16+own`,
    `whole` or `whole+own`; those that a training `began` with stay. Raises ConfigError where the environment asks for
    what there is not."""
    asked, shape, ways = compiler.products(), _shape(model), _ways(model, rounded)
    if began is not None:
        name, why = began, "as this training began"
        if asked not in (None, began):
            log.warning("RWKVPIPE_PRODUCTS asks for %s; this training began with %s and goes on so", asked, began)
    elif shape is None or not ways:
        name, why = "torch", ""
    elif asked == "own" and "own" not in ways:
        raise ConfigError(f"RWKVPIPE_PRODUCTS asks for own products, and there are none here: {build.why_not()}")
    elif asked is not None:
        name, why = asked, "as RWKVPIPE_PRODUCTS says"
    elif len(ways) == 1:
        name, why = "torch", "there is nothing faster here" if rounded else ""
    else:
        name, why = _fastest(ways, shape, rounded)
    parts = name.split("+")
    if {"own", "whole"} & set(parts) and build.extension() is None:
        log.warning("products: %s were to compute, and cannot: %s", CALLED.get(name, CALLED[parts[0]]), build.why_not())
    if why and "whole" in parts:
        log.info("products of bf16: whole numbers of 12 bits in their place, which round less; %s", why)
    elif why:
        whose = "own" if "own" in parts else "torch"
        library = build.extension()
        narrow = "bf16" in parts and ("own" not in parts or (library and library.multiply_bf16()))
        where = f" in {'bf16' if narrow else 'fp32'}" if rounded else ""
        log.info("products of %s: %s%s, %s", "numbers rounded to bf16" if rounded else "fp32", whose, where, why)
    product.choose(name)
    return name


def _ways(model: nn.Module, rounded: bool) -> list[str]:
    """Whose products can compute for a model; none are chosen on cards, and in fp64."""
    if any(value.device.type != "cpu" or value.dtype != torch.float32 for value in model.parameters()):
        return []
    library = build.extension()
    ways = {"torch": True, "own": library}
    if rounded:
        ways |= {"bf16": product.has_bf16(), "bf16+own": library and library.multiply_bf16(), "whole": library}
    return [way for way, there in ways.items() if there]


def _shape(model: nn.Module) -> tuple[int, int] | None:
    """The sizes of the matrices that hold most of a model's numbers, the smaller one first."""
    numbers: Counter[tuple[int, int]] = Counter()
    for value in model.parameters():
        if value.dim() == 2:
            numbers[min(value.shape), max(value.shape)] += value.numel()
    return numbers.most_common(1)[0][0] if numbers else None


def _fastest(ways: list[str], shape: tuple[int, int], rounded: bool) -> tuple[str, str]:
    """Which is fastest, and why it is chosen: torch's where what is found cannot be kept, lest the next one differ."""
    sizes = [min(size, WIDEST) for size in shape]
    about = (processor(), torch.__version__, build.name(build.level()), *ways, str(rounded), *map(str, sizes))
    path = compiler.folder() / f"products-{compiler.short_digest(*about)}.json"
    try:
        ratios = _kept(path, ways)
        if ratios is None:
            held = lock(path.with_suffix(".lock"), waiting="products: being timed")
            try:
                if _kept(path, ways) is None:
                    write_json(path, _timed(sizes, ways, torch.bfloat16 if rounded else None))
            finally:
                os.close(held)
            ratios = _kept(path, ways) or dict.fromkeys(ways[1:], 1.0)
    except OSError as error:
        return "torch", f"for what is faster here cannot be kept ({compiler.reason(error)})"
    fastest = max(ratios.values())
    best = next(way for way in CALLED if GAIN * ratios.get(way, 0) >= fastest) if fastest >= GAIN else "torch"
    said = ", ".join(f"{CALLED[way]} are {ratio:.2f} times as fast as torch's" for way, ratio in ratios.items())
    if best == "whole" and ratios["own"] >= GAIN:
        best = "whole+own"
    return best, f"{said} here, at {sizes[0]} x {sizes[1]}"


def _kept(path: Path, ways: list[str]) -> dict[str, float] | None:
    """How many times as fast as torch's others were found to be; None where that was not, or is damaged."""
    try:
        found = read_json(path)["seconds"]
        seconds = {way: float(found[way]) for way in ways}
    except (FileNotFoundError, DataError, KeyError, TypeError, ValueError):
        return None
    return {way: seconds["torch"] / seconds[way] for way in ways[1:]} if 0 < min(seconds.values()) < 1e9 else None


def processor() -> str:
    """The processor's name, as its system has it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _timed(sizes: list[int], ways: list[str], dtype: torch.dtype | None) -> dict:
    """All on one thread, in turns: a product and those of its gradients. Times are of this process alone."""
    narrow, wide = sizes
    draw = torch.Generator().manual_seed(0)
    x, y, matrix = (torch.randn(n, m, generator=draw) for n, m in ((ROWS, narrow), (ROWS, wide), (wide, narrow)))
    spent: dict[str, list[float]] = {way: [] for way in ways}
    how = {way: Products.by(way, dtype) for way in ways}
    with one_thread():
        for _ in range(ROUNDS):
            for way, seconds in spent.items():
                seconds.append(_seconds(how[way], x, y, matrix))
    found = {"processor": processor(), "torch": torch.__version__, "kernels": build.level(), "sizes": sizes}
    return found | {"rounded": dtype is not None, "seconds": {way: min(seconds) for way, seconds in spent.items()}}


def _seconds(how: Products, *inputs: Tensor) -> float:
    began = time.thread_time()
    x, y, matrix = map(how.take, inputs)
    how.mm(x, matrix.mT), how.mm(y, matrix), how.mm(y.mT, x)
    return time.thread_time() - began
