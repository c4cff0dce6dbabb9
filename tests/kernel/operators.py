"""What tests of operators share: inputs and results, of recurrences too, how far off they are, reference numbers."""

import math
from itertools import pairwise

import numpy as np
import torch

from rwkvpipe.kernel.wkv5 import wkv5, wkv5_reference
from rwkvpipe.kernel.wkv6 import wkv6, wkv6_reference
from rwkvpipe.kernel.wkv7 import wkv7, wkv7_reference

OPERATORS = {"wkv7": (wkv7, wkv7_reference), "wkv6": (wkv6, wkv6_reference), "wkv5": (wkv5, wkv5_reference)}
NAMES = {"wkv7": "rwkvabs", "wkv6": "rwkvus", "wkv5": "rwkvus"}
CASES = [(which, case) for which in OPERATORS for case in ("typical", "t1", "t17n64", "extreme_decay")]
CASES += [("wkv7", case) for case in ("t16", "repeat_key", "unclamped")]
# decays of exactly 0, next to the least number there is, of nearly and of exactly 1
EXTREMES = [-math.inf, -60.0, -17.0, -8.0, 0.0, 3.0, 4.6, 20.0, 1e30]


def made(which, B, T, H, N, seed=0, w=None):
    """Inputs as a model makes them, or with decays out of `w`, and a state."""
    stream = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=stream)

    r, k, v, decay = (draw(B, T, H, N) for _ in range(4))
    decay = decay[0, 0] if which == "wkv5" else decay
    decay = -torch.nn.functional.softplus(decay) - 0.5 if which == "wkv7" else 1.5 * decay - 2
    if w is not None:
        decay = torch.tensor(w)[torch.randint(len(w), decay.shape, generator=stream)]
    if which != "wkv7":
        return [r, decay, k, v, draw(H, N), draw(B, H, N, N)]
    kk = torch.nn.functional.normalize(draw(B, T, H, N), dim=-1)
    return [r, decay, k, v, -kk, kk * torch.rand(B, T, H, N, generator=stream), draw(B, H, N, N)]


def with_gaps(inputs):
    """Some tokens, heads and channels of inputs, as views."""
    *inputs, state = inputs
    return [*(x[:, 1:, ::2, 3:] if x.dim() == 4 else x[::2, 3:] for x in inputs), state[:, ::2, 3:, 3:]]


def in_pieces(operator, inputs, borders):
    """y and the last state of rows that are computed from border to border, each piece from the state before it."""
    *inputs, S = inputs
    parts = []
    for first, end in pairwise(borders):
        y, S = operator(*(x[:, first:end] if x.dim() == 4 else x for x in inputs), S)
        parts.append(y)
    return torch.cat(parts, 1), S


def results(operator, inputs, seed=1, pulls=None):
    """What comes out, and all gradients of a random mixture of it, or of one weighed by `pulls`.

    Inputs are read where they lie.
    """
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = operator(*inputs)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    if pulls is None:
        stream = torch.Generator().manual_seed(seed)
        pulls = [torch.randn(y.shape, generator=stream, dtype=torch.float64) for y in out]
    pulls = [pull.to(y) for pull, y in zip(pulls, out, strict=True)]
    return [*(y.detach() for y in out), *torch.autograd.grad(out, inputs, pulls, materialize_grads=True)]


def error(found, wanted, least=1e-9):
    """Largest difference, as a share of the largest wanted value (of `least`, where that is smaller)."""
    found, wanted = found.detach().double(), torch.as_tensor(wanted).detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=least))


def exact(which, inputs):
    """Results in fp64. A decay that has no exponential forgets all, and has no gradient."""
    return [x.nan_to_num(0.0) for x in results(OPERATORS[which][1], [x.double() for x in inputs])]


def check_exact(which, inputs, tolerance):
    """An operator's values and gradients are those of fp64."""
    for found, wanted in zip(results(OPERATORS[which][0], inputs), exact(which, inputs), strict=True):
        assert error(found, wanted) < tolerance


def reference(goldens, which, case):
    """Names of all results, inputs, pulls and results of a case of the reference numbers."""
    golden = np.load(goldens / "rwkv" / f"op_{which}.npz")
    names = [*NAMES[which][:-1], "s0"]

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
