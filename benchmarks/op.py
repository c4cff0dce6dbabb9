"""The WKV operator of a family, forward and backward, one thread: native, by chunks in PyTorch, and token by token.

The loop over tokens is what public trainers run on a CPU. All three compute with the same numbers; what they find is
compared with the loop in fp64 before anything is timed. They run in a process that is started as jobs are, and a turn
of each is as many runs as take a quarter of a second, so that none begins with what another one left of the caches.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from unittest import mock

import torch
from torch import Tensor

from benchmarks.train import conditions
from rwkvpipe.kernel import build
from rwkvpipe.kernel.wkv5 import wkv5, wkv5_reference
from rwkvpipe.kernel.wkv6 import wkv6, wkv6_reference
from rwkvpipe.kernel.wkv7 import wkv7, wkv7_reference
from rwkvpipe.launch import surroundings

SIZES = (8, 512, 4, 64)  # B T H N
OPERATORS = {"wkv7": (wkv7, wkv7_reference), "wkv6": (wkv6, wkv6_reference), "wkv5": (wkv5, wkv5_reference)}
WORST = 1e-5  # error of a form, as a share of the largest number
TURN = 0.25  # CPU seconds that a turn takes at least


def drawn(operator: str) -> list[Tensor]:
    """Inputs as a model makes them, and a state."""
    B, T, H, N = SIZES
    if operator != "wkv7":
        stream = torch.Generator().manual_seed(0)
        decays = (B, T, H, N) if operator == "wkv6" else (H, N)
        shapes = [(B, T, H, N), decays, (B, T, H, N), (B, T, H, N), (H, N), (B, H, N, N)]
        found = [torch.randn(shape, generator=stream) for shape in shapes]
        return [(x - 2 * (n == 1)).requires_grad_() for n, x in enumerate(found)]
    stream = torch.Generator().manual_seed(0)
    r, k, v, w = (torch.randn(B, T, H, N, generator=stream) for _ in range(4))
    kk = torch.nn.functional.normalize(torch.randn(B, T, H, N, generator=stream), dim=-1)
    rate = torch.rand(B, T, H, N, generator=stream)
    state = torch.randn(B, H, N, N, generator=stream)
    decay = torch.nn.functional.logsigmoid(w) - 0.5
    return [x.requires_grad_() for x in (r, decay, k, v, -kk, kk * rate, state)]


def forms(operator: str) -> dict:
    """The native form, that which computes where there is no compiler, and the loop."""
    native, loop = OPERATORS[operator]

    def chunks(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        with mock.patch.object(build, "native", lambda *inputs: None):
            return native(*inputs)

    return {"native": native, "chunks": chunks, "loop": loop}


def gradients(form, inputs: list[Tensor], above: list[Tensor]) -> list[Tensor]:
    """Forward and backward, from the gradients `above` of y and of the state."""
    found = form(*inputs)
    return [*(x.detach() for x in found), *torch.autograd.grad(found, inputs, above)]


def measure(operator: str, rounds: int) -> dict:
    """What `found` finds, in a process of its own. Raises SystemExit for a wrong form."""
    command = [sys.executable, "-m", "benchmarks.op", operator, str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | surroundings("pretrain"))
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def turn(run: Callable) -> float:
    """CPU seconds of one of the runs of a turn, on average."""
    times, begin = 0, time.process_time()
    while (took := time.process_time() - begin) < TURN:
        run()
        times += 1
    return took / times


def found(operator: str, rounds: int) -> dict:
    """Errors of each form, then CPU seconds of forward and backward, in turns. Raises SystemExit for a wrong form."""
    if build.extension() is None:
        raise SystemExit(f"there are no native kernels to measure: {build.why_not()}")
    torch.set_num_threads(1)
    inputs, each = drawn(operator), forms(operator)
    above = [torch.randn_like(inputs[0]), torch.randn_like(inputs[-1])]
    exact = gradients(each["loop"], [x.detach().double().requires_grad_() for x in inputs], [x.double() for x in above])
    errors = {}
    for name, form in each.items():
        pairs = zip(gradients(form, inputs, above), exact, strict=True)
        errors[name] = max(float((found - wanted).abs().max() / wanted.abs().max()) for found, wanted in pairs)
    if max(errors.values()) > WORST:
        raise SystemExit(f"the forms differ, so there is nothing to compare: {errors}")
    seconds: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(rounds):
        for name, form in each.items():
            seconds[name].append(turn(lambda form=form: gradients(form, inputs, above)))
    ratios = [loop / ours for loop, ours in zip(seconds["loop"], seconds["native"], strict=True)]
    return {
        "what": "op",
        "operator": operator,
        "sizes": dict(zip("BTHN", SIZES, strict=True)),
        "error": errors,
        "cpu_seconds": seconds,
        "ratio": median(ratios),
        "ratios": ratios,
        **conditions(),
    }


def table(found: dict) -> str:
    """The numbers for people."""
    tokens = found["sizes"]["B"] * found["sizes"]["T"]
    lines = [
        f"| {found['operator']} | error | CPU ms | tokens a CPU s | times as fast |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, seconds in found["cpu_seconds"].items():
        times = [loop / own for loop, own in zip(found["cpu_seconds"]["loop"], seconds, strict=True)]
        said = f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})" if name != "loop" else "1"
        middle, error = median(seconds), found["error"][name]
        lines.append(f"| {name} | {error:.1e} | {1e3 * middle:,.1f} | {tokens / middle:,.0f} | {said} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(found(sys.argv[1], int(sys.argv[2]))))
