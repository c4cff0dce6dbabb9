"""What the operators of all families have in common: the reference numbers, and their forms against each other."""

import pytest
import torch

from rwkvpipe.kernel import build
from tests.kernel.operators import (
    CASES,
    OPERATORS,
    check_exact,
    check_reference,
    error,
    in_pieces,
    made,
    results,
)

every = pytest.mark.parametrize("which", OPERATORS)
WIDE, PLAIN = torch.float64, torch.float32


def wide(inputs):
    return [x.double() for x in inputs]


@pytest.mark.parametrize("form", ["native", "by chunks", "loop"])
@pytest.mark.parametrize("dtype, tolerance", [(PLAIN, 1e-5), (WIDE, 1e-11)])
@pytest.mark.parametrize("which, case", CASES)
def test_values_and_gradients_are_the_reference_numbers(goldens, monkeypatch, which, case, dtype, tolerance, form):
    if form == "by chunks":
        monkeypatch.setattr(build, "native", lambda *inputs: None)
    check_reference(goldens, which, case, OPERATORS[which][form == "loop"], dtype, tolerance)


@every
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33, 131])
def test_chunks_of_any_length_equal_the_loop(which, T):
    check_exact(which, wide(made(which, 2, T, 3, 8, seed=T)), 1e-12)


@every
@pytest.mark.parametrize("T, H, N", [(70, 40, 8), (65, 130, 2), (40, 5, 64)])
def test_more_heads_than_one_task_takes_are_each_exact(which, T, H, N):
    check_exact(which, made(which, 2, T, H, N), 3e-6)


@every
@pytest.mark.parametrize("dtype, tolerance", [(PLAIN, 1e-6), (WIDE, 1e-12)])
def test_a_row_in_pieces_with_its_state_is_the_row_in_one(which, dtype, tolerance):
    inputs, operator = [x.to(dtype) for x in made(which, 2, 37, 2, 8)], OPERATORS[which][0]
    for found, wanted in zip(in_pieces(operator, inputs, (0, 1, 18, 18, 37)), operator(*inputs), strict=True):
        assert error(found, wanted) < tolerance


@every
@pytest.mark.parametrize("dtype, tolerance", [(PLAIN, 1e-6), (WIDE, 1e-13)])
@pytest.mark.parametrize("N", [1, 7, 8, 20, 64, 128])
def test_a_single_token_without_gradients_is_the_same(which, N, dtype, tolerance):
    inputs, (operator, loop) = [x.to(dtype) for x in made(which, 2, 1, 2, N)], OPERATORS[which]
    for found, wanted in zip(operator(*inputs), loop(*inputs), strict=True):
        assert error(found, wanted) < tolerance


@pytest.mark.parametrize("which", ["wkv6", "wkv7"])
@pytest.mark.parametrize("dtype", [PLAIN, WIDE])
def test_padding_leaves_the_state_as_it_was(which, dtype):
    inputs, operator = [x.to(dtype) for x in made(which, 1, 20, 2, 8)], OPERATORS[which][0]
    _, wanted = in_pieces(operator, inputs, (0, 7))
    inputs[1][:, 7:], inputs[2][:, 7:] = -torch.inf, 0
    if which == "wkv7":
        inputs[5][:, 7:] = 0
    assert error(operator(*inputs)[1], wanted) < 1e-13
    assert all(x.isfinite().all() for x in results(operator, inputs))


@every
def test_half_precision_goes_in_and_out_while_the_state_stays_wide(which):
    inputs, (operator, loop) = [x.bfloat16() for x in made(which, 1, 9, 2, 8)[:-1]], OPERATORS[which]
    y, S = operator(*inputs)
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert error(S, loop(*wide(inputs))[1]) < 1e-5


@every
def test_a_state_of_other_sizes_is_refused(which):
    *inputs, state = made(which, 2, 3, 2, 8)
    with pytest.raises(ValueError, match="state is"):
        OPERATORS[which][0](*inputs, state[:1])
