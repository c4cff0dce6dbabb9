"""The RWKV-5 operator against reference numbers, and its two forms against each other."""

import pytest
import torch

from rwkvpipe.kernel.wkv5 import wkv5, wkv5_reference
from rwkvpipe.kernel.wkv6 import wkv6
from tests.kernel.operators import check_reference, error, results

CASES = ("typical", "t1", "t17n64", "extreme_decay")


def made(B, T, H, N):
    """Inputs as a model makes them, and a state."""
    stream = torch.Generator().manual_seed(T)
    shapes = [(B, T, H, N), (H, N), (B, T, H, N), (B, T, H, N), (H, N), (B, H, N, N)]
    return [torch.randn(shape, generator=stream, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("operator", [wkv5_reference, wkv5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_reference_numbers(goldens, case, dtype, tolerance, operator):
    check_reference(goldens, "wkv5", case, operator, dtype, tolerance)


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
