"""The RWKV-6 operator against reference numbers, and its two forms against each other."""

import pytest
import torch

from rwkvpipe.kernel.wkv6 import wkv6, wkv6_reference
from tests.kernel.operators import TOGETHER, check_exact, check_reference, error, results

CASES = ("typical", "t1", "t17n64", "extreme_decay")


def made(B, T, H, N, dtype=torch.float64, w=None):
    """Inputs as a model makes them, and a state."""
    stream = torch.Generator().manual_seed(T)
    shapes = [(B, T, H, N)] * 4 + [(H, N), (B, H, N, N)]
    found = [torch.randn(shape, generator=stream, dtype=torch.float64) for shape in shapes]
    found[1] = found[1] - 2 if w is None else torch.full_like(found[1], w)
    return [x.to(dtype).requires_grad_() for x in found]


@pytest.mark.parametrize("operator", [wkv6_reference, wkv6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_reference_numbers(goldens, case, dtype, tolerance, operator):
    check_reference(goldens, "wkv6", case, operator, dtype, tolerance)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33, 131])
def test_chunks_of_any_length_equal_the_loop(T):
    inputs = made(2, T, 3, 8)
    for found, wanted in zip(results(wkv6, inputs), results(wkv6_reference, inputs), strict=True):
        assert error(found, wanted) < 1e-12


@pytest.mark.parametrize("w", [-30.0, -3.0, 1.5, 3.6, 9.0, 87.0])
def test_decays_from_none_to_complete_are_exact(w):
    inputs = made(1, 70, 2, 8, torch.float32, w=w)
    check_exact(wkv6, wkv6_reference, inputs, 1e-5)


def test_a_decay_beyond_all_numbers_is_complete_and_has_no_gradient():
    inputs = made(1, 35, 1, 8, torch.float32, w=1e30)
    found = results(wkv6, inputs)
    assert all(x.isfinite().all() for x in found)
    assert not found[3].any()


def test_decays_of_one_chunk_may_differ_as_far_as_they_like():
    inputs = made(1, 40, 1, 8, torch.float32)
    with torch.no_grad():
        inputs[1][:, ::3] = 7.3
        inputs[1][:, 1::5] = -20.0
    check_exact(wkv6, wkv6_reference, inputs, 1e-5)


@pytest.mark.parametrize("T, H, N", TOGETHER)
def test_heads_that_are_worked_on_together_are_each_exact(T, H, N):
    check_exact(wkv6, wkv6_reference, made(2, T, H, N, torch.float32))


def test_long_rows_lose_no_digits():
    inputs = made(1, 2000, 1, 8, torch.float32, w=-7.0)
    check_exact(wkv6, wkv6_reference, inputs, 1e-5)


def test_a_row_in_pieces_with_its_state_is_the_row_in_one():
    *inputs, u, state = made(2, 37, 2, 8)
    whole, last = wkv6(*inputs, u, state)
    S, parts = state, []
    for first, end in ((0, 1), (1, 18), (18, 18), (18, 37)):
        y, S = wkv6(*(x[:, first:end] for x in inputs), u, S)
        parts.append(y)
    assert error(torch.cat(parts, 1), whole) < 1e-12
    assert error(S, last) < 1e-12


def test_a_single_token_without_gradients_is_the_same():
    inputs = [x.detach() for x in made(2, 1, 2, 8)]
    for found, wanted in zip(wkv6(*inputs), wkv6_reference(*inputs), strict=True):
        assert error(found, wanted) < 1e-13


def test_inputs_are_left_as_they_were():
    inputs = made(1, 1, 1, 8)
    before = [x.detach().clone() for x in inputs]
    results(wkv6, inputs)
    wkv6(*inputs)[0].sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_padding_leaves_the_state_as_it_was():
    r, w, k, v, u, S = (x.detach() for x in made(1, 20, 2, 8))
    w[:, 7:] = -torch.inf
    k[:, 7:] = 0
    _, padded = wkv6(r, w, k, v, u, S)
    _, wanted = wkv6(*(x[:, :7] for x in (r, w, k, v)), u, S)
    assert error(padded, wanted) < 1e-13


def test_half_precision_goes_in_and_out_while_the_state_stays_wide():
    inputs = [x.detach().bfloat16() for x in made(1, 9, 2, 8)[:-1]]
    y, S = wkv6(*inputs)
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert error(S, wkv6_reference(*(x.double() for x in inputs))[1]) < 1e-5


def test_a_state_of_other_sizes_is_refused():
    inputs = made(2, 3, 2, 8)
    with pytest.raises(ValueError, match="state is"):
        wkv6(*inputs[:-1], inputs[-1][:1])
