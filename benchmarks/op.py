"""The WKV operator of RWKV-7, forward and backward, on one thread: native, by chunks in PyTorch, and token by token.

The loop over tokens is what public trainers run on a CPU. All three compute with the same numbers; what they find is
compared with the loop in fp64 before anything is timed.
"""

import os
import platform
import time
from importlib.metadata import version
from statistics import median
from unittest import mock

import torch
from torch import Tensor

from rwkvpipe.kernel import build
from rwkvpipe.kernel.wkv7 import wkv7, wkv7_reference

SIZES = (8, 512, 4, 64)  # B T H N
WORST = 1e-5  # error of a form, as a share of the largest number


def drawn() -> list[Tensor]:
    """Inputs as a model makes them, and a state."""
    B, T, H, N = SIZES
    stream = torch.Generator().manual_seed(0)
    r, k, v, w = (torch.randn(B, T, H, N, generator=stream) for _ in range(4))
    kk = torch.nn.functional.normalize(torch.randn(B, T, H, N, generator=stream), dim=-1)
    rate = torch.rand(B, T, H, N, generator=stream)
    state = torch.randn(B, H, N, N, generator=stream)
    decay = torch.nn.functional.logsigmoid(w) - 0.5
    return [x.requires_grad_() for x in (r, decay, k, v, -kk, kk * rate, state)]


def chunks(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The form that computes where there is no compiler."""
    with mock.patch.object(build, "native", lambda *inputs: None):
        return wkv7(*inputs)


FORMS = {"native": wkv7, "chunks": chunks, "loop": wkv7_reference}


def gradients(form, inputs: list[Tensor]) -> list[Tensor]:
    """Forward and backward."""
    y, state = form(*inputs)
    return [y.detach(), state.detach(), *torch.autograd.grad(y.sum() + state.sum(), inputs)]


def measure(rounds: int) -> dict:
    """Errors of each form, then CPU seconds of forward and backward, in turns. Raises SystemExit for a wrong form."""
    if build.extension() is None:
        raise SystemExit(f"there are no native kernels to measure: {build.why_not()}")
    torch.set_num_threads(1)
    inputs = drawn()
    exact = gradients(wkv7_reference, [x.detach().double().requires_grad_() for x in inputs])
    errors = {}
    for name, form in FORMS.items():
        pairs = zip(gradients(form, inputs), exact, strict=True)
        errors[name] = max(float((found - wanted).abs().max() / wanted.abs().max()) for found, wanted in pairs)
    if max(errors.values()) > WORST:
        raise SystemExit(f"the forms differ, so there is nothing to compare: {errors}")
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(rounds):
        for name, form in FORMS.items():
            begin = time.process_time()
            gradients(form, inputs)
            seconds[name].append(time.process_time() - begin)
    ratios = [loop / ours for loop, ours in zip(seconds["loop"], seconds["native"], strict=True)]
    return {
        "what": "op",
        "operator": "wkv7",
        "sizes": dict(zip("BTHN", SIZES, strict=True)),
        "error": errors,
        "cpu_seconds": seconds,
        "ratio": median(ratios),
        "ratios": ratios,
        "kernel": f"{build.level()}, {build.why_not()}",
        "machine": platform.processor() or platform.machine(),
        "load": os.getloadavg()[0],
        "torch": version("torch"),
    }


def table(found: dict) -> str:
    """The numbers for people."""
    sizes = ", ".join(f"{name} {value}" for name, value in found["sizes"].items())
    tokens = found["sizes"]["B"] * found["sizes"]["T"]
    lines = [
        f"{found['operator']}, forward and backward, one thread, fp32: {sizes} ({found['kernel']})",
        f"{'':8} {'error':>9} {'CPU ms':>8} {'tokens/s':>9}",
    ]
    for name, seconds in found["cpu_seconds"].items():
        middle = median(seconds)
        lines.append(f"{name:8} {found['error'][name]:9.1e} {1e3 * middle:8.1f} {tokens / middle:9.0f}")
    low, high, turns = min(found["ratios"]), max(found["ratios"]), len(found["ratios"])
    lines.append(f"the loop takes {found['ratio']:.1f} times as long ({low:.1f} to {high:.1f} in {turns} turns)")
    return "\n".join(lines)
