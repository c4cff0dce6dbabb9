"""The RWKV-5 operator against reference numbers, and its two forms against each other."""

import numpy as np
import pytest
import torch

from rwkvpipe.kernel.wkv5 import wkv5, wkv5_reference
from rwkvpipe.kernel.wkv6 import wkv6

NAMES = ("r", "w", "k", "v", "u", "s0")
CASES = ("typical", "t1", "t17n64", "extreme_decay")


def made(B, T, H, N):
    """Inputs as a model makes them, and a state."""
    stream = torch.Generator().manual_seed(T)
    shapes = [(B, T, H, N), (H, N), (B, T, H, N), (B, T, H, N), (H, N), (B, H, N, N)]
    return [torch.randn(shape, generator=stream, dtype=torch.float64).requires_grad_() for shape in shapes]


def results(operator, inputs):
    """y, the last state and all gradients of a random mixture of both."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y, S = operator(*inputs)
    stream = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=stream, dtype=torch.float64) for x in (y, S)]
    (y * weights[0]).sum().add((S * weights[1]).sum()).backward()
    return [y, S, *(x.grad for x in inputs)]


def error(found, wanted, least=1e-9):
    """Largest difference, as a share of the largest wanted value (of `least`, where that is smaller)."""
    found, wanted = found.detach().double(), torch.as_tensor(wanted).detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=least))


@pytest.mark.parametrize("operator", [wkv5_reference, wkv5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_reference_numbers(goldens, case, dtype, tolerance, operator):
    golden = np.load(goldens / "rwkv" / "op_wkv5.npz")
    inputs = [torch.tensor(golden[f"{case}/in/{name}"]).to(dtype) for name in NAMES]
    inputs[-1] = inputs[-1].mT.contiguous()  # the numbers hold [key, value]
    inputs = [x.requires_grad_() for x in inputs]
    y, S = operator(*inputs)
    pulls = [torch.tensor(golden[f"{case}/in/{name}"]) for name in ("gy", "gsT")]
    (y * pulls[0]).sum().add((S.mT * pulls[1]).sum()).backward()
    assert error(y, golden[f"{case}/out/y"]) < tolerance
    assert error(S.mT, golden[f"{case}/out/sT"]) < tolerance
    inputs[-1].grad = inputs[-1].grad.mT
    for name, x in zip(NAMES, inputs, strict=True):
        assert error(x.grad, golden[f"{case}/grad/{name}"]) < tolerance, name


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33, 131])
def test_chunks_of_any_length_equal_the_loop(T):
    inputs = made(2, T, 3, 8)
    for found, wanted in zip(results(wkv5, inputs), results(wkv5_reference, inputs), strict=True):
        assert error(found, wanted) < 1e-12


def test_it_is_the_operator_of_rwkv6_with_one_decay_for_all_tokens():
    r, w, k, v, u, S = made(2, 19, 2, 8)
    for found, wanted in zip(wkv5(r, w, k, v, u, S), wkv6(r, w.expand_as(r), k, v, u, S), strict=True):
        assert error(found, wanted) < 1e-13


def test_a_row_in_pieces_with_its_state_is_the_row_in_one():
    r, w, k, v, u, state = made(2, 37, 2, 8)
    whole, last = wkv5(r, w, k, v, u, state)
    S, parts = state, []
    for first, end in ((0, 1), (1, 18), (18, 18), (18, 37)):
        y, S = wkv5(r[:, first:end], w, k[:, first:end], v[:, first:end], u, S)
        parts.append(y)
    assert error(torch.cat(parts, 1), whole) < 1e-12
    assert error(S, last) < 1e-12


def test_a_single_token_without_gradients_is_the_same():
    inputs = [x.detach() for x in made(2, 1, 2, 8)]
    for found, wanted in zip(wkv5(*inputs), wkv5_reference(*inputs), strict=True):
        assert error(found, wanted) < 1e-13
