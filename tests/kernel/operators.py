"""What tests of the recurrences share: results of an operator, how far they are off, and the reference numbers."""

import numpy as np
import torch


def results(operator, inputs, seed=1, pulls=None):
    """y, the last state and all gradients of a random mixture of both, or of one weighed by `pulls`."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y, S = operator(*inputs)
    if pulls is None:
        stream = torch.Generator().manual_seed(seed)
        pulls = [torch.randn(x.shape, generator=stream, dtype=torch.float64) for x in (y, S)]
    torch.autograd.backward((y, S), [pull.to(x) for pull, x in zip(pulls, (y, S), strict=True)])
    return [y.detach(), S.detach(), *(x.grad for x in inputs)]


def error(found, wanted, least=1e-9):
    """Largest difference, as a share of the largest wanted value (of `least`, where that is smaller)."""
    found, wanted = found.detach().double(), torch.as_tensor(wanted).detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=least))


TOGETHER = [(70, 40, 8), (65, 130, 2), (40, 5, 64)]  # tokens, heads, channels: more heads than one task takes


def check_exact(operator, loop, inputs, tolerance=3e-6):
    """An operator's values and gradients in fp32 are the loop's in fp64."""
    exact = [x.detach().double() for x in inputs]
    for found, wanted in zip(results(operator, inputs), results(loop, exact), strict=True):
        assert error(found, wanted) < tolerance


NAMES = {"wkv7": "rwkvab", "wkv6": "rwkvu", "wkv5": "rwkvu"}


def reference(goldens, which, case):
    """Names of all results, inputs, pulls and results of a case of the reference numbers."""
    golden = np.load(goldens / "rwkv" / f"op_{which}.npz")
    names = [*NAMES[which], "s0"]

    def read(name):  # the numbers of 5 and 6 hold states as [key, value]
        x = torch.tensor(golden[f"{case}/{name}"])
        state = name.split("/")[1] in ("s0", "sT", "gsT")
        return x.mT.contiguous() if state and which != "wkv7" else x

    told = ["out/y", "out/sT", *(f"grad/{name}" for name in names)]
    inputs = [read(f"in/{name}") for name in names]
    return told, inputs, [read("in/gy"), read("in/gsT")], [read(name) for name in told]


def check_reference(goldens, which, case, operator, dtype, tolerance):
    """An operator's values and gradients are the reference numbers."""
    names, inputs, pulls, wanted = reference(goldens, which, case)
    found = results(operator, [x.to(dtype) for x in inputs], pulls=pulls)
    for name, x, true in zip(names, found, wanted, strict=True):
        assert error(x, true) < tolerance, name
