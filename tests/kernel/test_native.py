"""The native operators: exact for any sizes and decays, the same bits however they are run, within their tensors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpipe.kernel import build
from tests.kernel.operators import EXTREMES, OPERATORS, error, exact, in_pieces, made, results, with_gaps

pytestmark = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")
WITH_BONUS = ["wkv6", "wkv5"]


@pytest.mark.parametrize("which", WITH_BONUS)
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(8, 130)),
    w=st.one_of(st.none(), st.lists(st.sampled_from(EXTREMES), min_size=1, max_size=4)),
    seed=st.integers(0, 99),
)
def test_any_sizes_and_decays_are_exact_to_a_millionth(which, sizes, w, seed):
    inputs = made(which, *sizes, seed, w)
    operator, reference = OPERATORS[which]
    plain = [x.nan_to_num(0.0) for x in results(reference, inputs)]
    # what fp32 costs every form: sums that cancel, and a decay next to 1, off by up to 2^-25 each token again
    most = 1e-6 + (sizes[1] * 2**-25 if w and {-17.0, -8.0} & {*w} else 0)
    for found, wanted, other in zip(results(operator, inputs), exact(which, inputs), plain, strict=True):
        assert error(found, wanted, 1.0) < most + 4 * error(other, wanted, 1.0)


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("T", [1, 50])
def test_any_number_of_threads_gives_the_same_bits(which, T, at_any_thread_count):
    inputs = made(which, 3, T, 3, 24)
    at_any_thread_count(lambda: results(OPERATORS[which][0], inputs))


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("B", [2, 5])
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(which, B):
    operator, inputs = OPERATORS[which][0], made(which, B, 40, 2, 20)
    whole = operator(*inputs)
    for row in range(B):
        alone = operator(*(x[row : row + 1] if x.dim() == 4 else x for x in inputs))
        assert all(torch.equal(one[0], other[row]) for one, other in zip(alone, whole, strict=True))


@pytest.mark.parametrize("which", WITH_BONUS)
def test_a_row_in_pieces_of_whole_chunks_has_the_bits_of_the_row_in_one(which):
    operator, inputs = OPERATORS[which][0], made(which, 2, 75, 2, 20)
    found = in_pieces(operator, inputs, (0, 32, 64, 64, 75))
    assert all(torch.equal(one, other) for one, other in zip(found, operator(*inputs), strict=True))


@pytest.mark.parametrize("which", OPERATORS)
def test_views_with_gaps_give_the_same(which):
    operator, parts = OPERATORS[which][0], with_gaps(made(which, 2, 19, 4, 12))
    for found, wanted in zip(results(operator, parts), results(operator, [x.contiguous() for x in parts]), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("T, N", [(1, 7), (33, 7), (64, 16), (5, 33)])
def test_all_results_and_nothing_beside_them_is_written(which, T, N):
    sizes, guard, function = (2, T, 2, N), 64, "wkv7" if which == "wkv7" else "wkv6"

    def room(*shape):
        whole = torch.full((guard + math.prod(shape) + guard,), torch.nan)
        return whole, whole[guard:-guard].view(shape)

    *inputs, start = made(which, *sizes)
    kept = getattr(build.extension(), f"{function}_kept")(*map(build.whole, sizes))
    forward, backward = [room(*sizes), room(*start.shape), room(kept)], [room(*x.shape) for x in (*inputs, start)]
    numbers = sizes if which == "wkv7" else (*sizes, int(which == "wkv5"))
    if which == "wkv7":
        forward.append(room(*sizes))  # u
    else:
        backward.append(room(2 * 2 * 2 * N))  # sums of each head
    y, S, *kept = (inner for _, inner in forward)
    build.call(f"{function}_forward", numbers, *inputs, start, y, S, *kept)
    build.call(f"{function}_backward", numbers, *inputs, *kept, y, S, *(inner for _, inner in backward))
    for whole, inner in (*forward, *backward):
        assert inner.isfinite().all()
        assert whole[:guard].isnan().all() and whole[-guard:].isnan().all()
