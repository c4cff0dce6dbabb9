"""The native operators of RWKV-5 and 6: exact for any sizes and decays, the same bits however they are run."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpipe.kernel import build
from rwkvpipe.kernel.wkv5 import wkv5, wkv5_reference
from rwkvpipe.kernel.wkv6 import wkv6, wkv6_reference
from tests.kernel.operators import error, results

pytestmark = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")
OPERATORS = {"wkv5": (wkv5, wkv5_reference), "wkv6": (wkv6, wkv6_reference)}
# decays: of exactly 0, next to the least number there is, of nearly and of exactly 1
EXTREMES = [-math.inf, -60.0, -17.0, -8.0, 0.0, 3.0, 4.6, 20.0, 1e30]


def made(which, B, T, H, N, seed=0, w=None):
    """Inputs as a model makes them, or with decays out of `w`, and a state."""
    stream = torch.Generator().manual_seed(seed)
    decays = (B, T, H, N) if which == "wkv6" else (H, N)
    shapes = [(B, T, H, N), decays, (B, T, H, N), (B, T, H, N), (H, N), (B, H, N, N)]
    found = [torch.randn(shape, generator=stream) for shape in shapes]
    if w is None:
        found[1] = 1.5 * found[1] - 2
    else:
        found[1] = torch.tensor(w)[torch.randint(len(w), decays, generator=stream)]
    return found


def exact(which, inputs):
    """The same in fp64. A decay that has no exponential forgets all, and has no gradient."""
    return [x.nan_to_num(0.0) for x in results(OPERATORS[which][1], [x.double() for x in inputs])]


@pytest.mark.parametrize("which", OPERATORS)
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
@pytest.mark.parametrize("N", [1, 7, 8, 20, 64, 128])
def test_a_single_token_without_gradients_is_the_same(which, N):
    inputs = made(which, 2, 1, 2, N)
    for found, wanted in zip(OPERATORS[which][0](*inputs), OPERATORS[which][1](*inputs), strict=True):
        assert error(found, wanted, 1.0) < 1e-6


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("T", [1, 50])
def test_any_number_of_threads_gives_the_same_bits(which, T, at_any_thread_count):
    inputs = made(which, 3, T, 3, 24)
    at_any_thread_count(lambda: results(OPERATORS[which][0], inputs))


@pytest.mark.parametrize("which", OPERATORS)
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(which):
    operator, (r, w, k, v, u, S) = OPERATORS[which][0], made(which, 3, 40, 2, 20)
    whole = operator(r, w, k, v, u, S)
    for row in range(3):
        at = slice(row, row + 1)
        alone = operator(r[at], w[at] if which == "wkv6" else w, k[at], v[at], u, S[at])
        assert all(torch.equal(one, other[at]) for one, other in zip(alone, whole, strict=True))


@pytest.mark.parametrize("which", OPERATORS)
def test_a_row_in_pieces_of_whole_chunks_has_the_bits_of_the_row_in_one(which):
    operator, (r, w, k, v, u, S) = OPERATORS[which][0], made(which, 2, 75, 2, 20)
    whole, last = operator(r, w, k, v, u, S)
    parts = []
    for first, end in ((0, 32), (32, 64), (64, 64), (64, 75)):
        at = slice(first, end)
        y, S = operator(r[:, at], w[:, at] if which == "wkv6" else w, k[:, at], v[:, at], u, S)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole) and torch.equal(S, last)


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("T, N", [(1, 7), (33, 7), (64, 16), (5, 33)])
def test_all_results_and_nothing_beside_them_is_written(which, T, N):
    sizes, guard = (2, T, 2, N), 64

    def room(*shape):
        whole = torch.full((guard + math.prod(shape) + guard,), torch.nan)
        return whole, whole[guard:-guard].view(shape)

    inputs = made(which, *sizes)
    *others, start = inputs
    kept = build.extension().wkv6_kept(*map(build.whole, sizes))
    forward = [room(*sizes), room(*start.shape), room(kept)]
    backward = [room(*x.shape) for x in (*others, start)] + [room(2 * 2 * 2 * N)]
    numbers = (*sizes, int(which == "wkv5"))
    build.call("wkv6_forward", numbers, *inputs, *(inner for _, inner in forward))
    y, S, states = (inner for _, inner in forward)
    build.call("wkv6_backward", numbers, *others, states, y, S, *(inner for _, inner in backward))
    for whole, inner in (*forward, *backward):
        assert inner.isfinite().all()
        assert whole[:guard].isnan().all() and whole[-guard:].isnan().all()
