"""The RWKV-7 operator against reference numbers, and its three forms against each other."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpipe.kernel import build
from rwkvpipe.kernel.wkv7 import wkv7, wkv7_reference
from tests.kernel.operators import TOGETHER, check_exact, check_reference, error, results

CASES = ("typical", "t1", "t16", "t17n64", "extreme_decay", "repeat_key", "unclamped")


def chunks(*inputs):
    """The form by chunks, also where there is a native one."""
    with mock.patch.object(build, "native", lambda *inputs: None):
        return wkv7(*inputs)


def made(B, T, H, N, dtype=torch.float64, seed=0, w=None):
    """Inputs as a model makes them, and a state."""
    stream = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=stream, dtype=torch.float64)

    kk = torch.nn.functional.normalize(draw(B, T, H, N), dim=-1)
    decay = -torch.nn.functional.softplus(draw(B, T, H, N)) - 0.5 if w is None else torch.full((B, T, H, N), w).double()
    rate = torch.rand(B, T, H, N, generator=stream, dtype=torch.float64)
    found = (draw(B, T, H, N), decay, draw(B, T, H, N), draw(B, T, H, N), -kk, kk * rate, draw(B, H, N, N))
    return [x.to(dtype).requires_grad_() for x in found]


@pytest.mark.parametrize("operator", [wkv7_reference, wkv7, chunks])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_reference_numbers(goldens, case, dtype, tolerance, operator):
    check_reference(goldens, "wkv7", case, operator, dtype, tolerance)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33, 131])
def test_chunks_of_any_length_equal_the_loop(T):
    inputs = made(2, T, 3, 8, seed=T)
    for found, wanted in zip(results(wkv7, inputs), results(wkv7_reference, inputs), strict=True):
        assert error(found, wanted) < 1e-12


@pytest.mark.parametrize("operator", [wkv7, chunks])
@pytest.mark.parametrize("w", [-30.0, 1.5, 3.0, 3.6, 20.0])
def test_decays_from_none_to_complete_are_exact_and_finite(w, operator):
    inputs = made(1, 21, 2, 8, torch.float32, w=w)
    exact = [x.detach().double() for x in inputs]
    for found, wanted in zip(results(operator, inputs), results(wkv7_reference, exact), strict=True):
        # where all is forgotten the gradient of w is 0, found as a difference of numbers of the size of the others
        assert error(found, wanted.nan_to_num(), least=5.0) < 2e-5


@pytest.mark.parametrize("operator", [wkv7, chunks])
def test_decays_of_one_chunk_may_differ_as_far_as_they_like(operator):
    inputs = made(1, 40, 1, 8, torch.float32)
    with torch.no_grad():
        inputs[1][:, ::3] = 3.3
        inputs[1][:, 1::5] = -20.0
    for found, wanted in zip(results(operator, inputs), results(wkv7_reference, inputs), strict=True):
        assert error(found, wanted) < 2e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_row_in_pieces_with_its_state_is_the_row_in_one(dtype, tolerance):
    inputs = made(2, 37, 2, 8, dtype)
    whole, last = wkv7(*inputs)
    S, parts = inputs[-1], []
    for first, end in ((0, 1), (1, 18), (18, 18), (18, 37)):
        y, S = wkv7(*(x[:, first:end] for x in inputs[:-1]), S)
        parts.append(y)
    assert error(torch.cat(parts, 1), whole) < tolerance
    assert error(S, last) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("N", [1, 8, 20, 64])
def test_a_single_token_without_gradients_is_the_same(N, dtype, tolerance):
    inputs = [x.detach() for x in made(2, 1, 2, N, dtype)]
    for found, wanted in zip(wkv7(*inputs), wkv7_reference(*inputs), strict=True):
        assert error(found, wanted) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_padding_leaves_the_state_as_it_was(dtype):
    r, w, k, v, a, b, S = (x.detach() for x in made(1, 20, 2, 8, dtype))
    w[:, 7:] = -torch.inf
    k[:, 7:] = b[:, 7:] = 0
    _, padded = wkv7(r, w, k, v, a, b, S)
    _, wanted = wkv7(*(x[:, :7] for x in (r, w, k, v, a, b)), S)
    assert error(padded, wanted) < 1e-13
    assert all(x.isfinite().all() for x in results(wkv7, (r, w, k, v, a, b, S)))


def test_half_precision_goes_in_and_out_while_the_state_stays_wide():
    inputs = [x.detach().bfloat16() for x in made(1, 9, 2, 8)[:-1]]
    y, S = wkv7(*inputs)
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert error(S, wkv7_reference(*(x.double() for x in inputs))[1]) < 1e-5


def test_a_state_of_other_sizes_is_refused():
    inputs = made(2, 3, 2, 8)
    with pytest.raises(ValueError, match="state is"):
        wkv7(*inputs[:-1], inputs[-1][:1])


needs_native = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")


@pytest.mark.parametrize("T, H, N", TOGETHER)
def test_heads_that_are_worked_on_together_are_each_exact(T, H, N):
    check_exact(wkv7, wkv7_reference, made(2, T, H, N, torch.float32))


@needs_native
@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(1, 130)),
    w=st.one_of(st.none(), st.floats(-12, 4)),
    seed=st.integers(0, 99),
)
def test_the_native_form_of_any_sizes_and_decays_is_exact_to_a_millionth(sizes, w, seed):
    inputs = made(*sizes, torch.float32, seed, w)
    exact = [x.detach().double() for x in inputs]
    plain = results(wkv7_reference, [x.detach() for x in inputs])  # sums that cancel cost every form digits
    for found, wanted, other in zip(results(wkv7, inputs), results(wkv7_reference, exact), plain, strict=True):
        assert error(found, wanted, least=1.0) < 1e-6 + 4 * error(other, wanted, least=1.0)


@needs_native
@pytest.mark.parametrize("T", [1, 50])
def test_any_number_of_threads_gives_the_same_bits(T):
    inputs, threads, all_found = made(3, T, 3, 24, torch.float32), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            all_found += [results(wkv7, inputs) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for found in all_found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found, all_found[0], strict=True))


@needs_native
@pytest.mark.parametrize("B", [2, 5])
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(B):
    inputs = [x.detach() for x in made(B, 40, 2, 20, torch.float32)]
    y, S = wkv7(*inputs)
    for row in range(B):
        alone = wkv7(*(x[row : row + 1] for x in inputs))
        assert torch.equal(alone[0], y[row : row + 1]) and torch.equal(alone[1], S[row : row + 1])


@needs_native
@pytest.mark.parametrize("T, N", [(1, 7), (33, 7), (64, 16), (5, 33)])
def test_all_results_and_nothing_beside_them_is_written(T, N):
    sizes, guard = (2, T, 2, N), 64

    def room(*shape):
        whole = torch.full((guard + math.prod(shape) + guard,), torch.nan)
        return whole, whole[guard:-guard].view(shape)

    *inputs, start = (x.detach() for x in made(*sizes, torch.float32))
    kept = build.extension().wkv7_kept(*map(build.whole, sizes))
    forward = [room(*sizes), room(*start.shape), room(kept), room(*sizes)]
    backward = [*(room(*sizes) for _ in range(6)), room(*start.shape)]
    build.call("wkv7_forward", sizes, *inputs, start, *(inner for _, inner in forward))
    y, S, states, u = (inner for _, inner in forward)
    build.call("wkv7_backward", sizes, *inputs, states, u, y, S, *(inner for _, inner in backward))
    for whole, inner in (*forward, *backward):
        assert inner.isfinite().all()
        assert whole[:guard].isnan().all() and whole[-guard:].isnan().all()


@needs_native
def test_views_with_gaps_give_the_same():
    wide = [x.detach() for x in made(2, 19, 4, 12, torch.float32)]
    parts = [x[:, 1:, ::2, 3:] if x is not wide[-1] else x[:, ::2, 3:, 3:] for x in wide]
    for found, wanted in zip(results(wkv7, parts), results(wkv7, [x.contiguous() for x in parts]), strict=True):
        assert torch.equal(found, wanted)
