"""RWKV-6 and 5.2 on tensor cores, built for the host: tensors choose a kernel by kind and place, not the results."""

import pytest
import torch

from rwkvpipe.kernel import gpu
from rwkvpipe.kernel.wkv5 import wkv5
from rwkvpipe.kernel.wkv6 import wkv6
from tests.kernel.operators import results

OPERATORS = {"wkv6": wkv6, "wkv5": wkv5}
HALF, FULL = torch.bfloat16, torch.float32
SIZES = (2, 37, 2, 64)


@pytest.fixture(autouse=True)
def tiled(on_host, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")


def made(which):
    """Inputs and pulls that bf16 holds, as fp32, but for the states."""
    stream = torch.Generator().manual_seed(3)
    r, w, k, v, dy = (torch.randn(SIZES, generator=stream).bfloat16().float() for _ in range(5))
    w = (w[0, 0] if which == "wkv5" else w) - 2
    u, S, dS = (torch.randn(shape, generator=stream) for shape in ((2, 64), (2, 2, 64, 64), (2, 2, 64, 64)))
    return [r, w.bfloat16().float(), k, v, u.bfloat16().float(), S], [dy, dS]


def shifted(x):
    """The same numbers, where 16 bytes cannot be read at once."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("kinds", [
    (HALF, FULL, HALF, HALF, FULL), (HALF, HALF, HALF, HALF, HALF), (HALF, HALF, HALF, FULL, FULL),
    (FULL, HALF, HALF, HALF, HALF),
])  # fmt: skip
def test_kinds_choose_a_kernel_and_change_no_more_than_rounding_does(monkeypatch, which, parts, kinds):
    monkeypatch.setattr(gpu, "_parts", lambda operator, v: parts)
    inputs, pulls = made(which)
    wanted = results(OPERATORS[which], inputs, pulls=pulls)
    given = [x.to(kind) for x, kind in zip(inputs, (*kinds, FULL), strict=True)]
    for n, (found, real) in enumerate(zip(results(OPERATORS[which], given, pulls=pulls), wanted, strict=True)):
        rounded = real.to(found.dtype)
        assert found.dtype == (*kinds[3:4], FULL, *kinds, FULL)[n]
        assert float((found.double() - rounded.double()).norm()) < 1e-3 * float(real.double().norm()), n


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("kind", [HALF, FULL])
def test_tensors_may_begin_anywhere(monkeypatch, which, kind):
    inputs, pulls = made(which)
    plain = [*(x.to(kind) for x in inputs[:-1]), inputs[-1]]
    started = []
    monkeypatch.setattr(gpu, "_started", lambda *given, start=gpu._started: started.append(given) or start(*given))
    for n in range(4):
        given = [shifted(x) if i == n else x for i, x in enumerate(plain)]
        wanted, found = (results(OPERATORS[which], inputs, pulls=pulls) for inputs in (plain, given))
        assert started[-1][3 + n].data_ptr() % 16, "the kernel was handed a copy"
        assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
