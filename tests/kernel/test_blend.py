"""The native element-wise operations against what they are in PyTorch, in values and in gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpipe.kernel import blend, build, gate
from tests.kernel.operators import results

needs_native = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(8, 40))


def drawn(seed):
    stream = torch.Generator().manual_seed(seed)
    return lambda *shape: 2 * torch.randn(*shape, generator=stream, dtype=torch.float64)


def mix(B, T, H, N, seed):
    draw, D = drawn(seed), H * N
    shares = [draw(1, 1, D) for _ in range((1, 2, 4, 5, 6)[seed % 5])]
    return lambda x, last, *shares: blend.mix(x, last, shares), [draw(B, T, D), draw(B, D), *shares]


def prepare(B, T, H, N, seed):
    draw, D = drawn(seed), H * N
    inputs = [*(4 * draw(B, T, D) for _ in range(3)), *(draw(1, 1, D) for _ in range(4))]
    return lambda k, w, a, *rows: blend.prepare(k, w, a, rows, H), inputs


def lean(B, T, H, N, seed):
    draw = drawn(seed)
    return blend.lean, [*(draw(B, T, H * N) for _ in range(3)), draw(1, 1, H * N)]


def finish(B, T, H, N, seed):
    draw = drawn(seed)
    inputs = [*(draw(B, T, H, N) for _ in range(4)), draw(B, T, H * N), draw(H, N), draw(H * N), draw(H * N)]
    return lambda y, r, k, v, g, *rows: blend.finish(y, r, k, v, g, rows, 0.05), inputs


def norm(B, T, H, N, seed):
    draw = drawn(seed)
    return lambda *inputs: blend.norm(*inputs, 1e-5), [3 * draw(B, T, H * N) + 1, draw(H * N), draw(H * N)]


def squared_relu(B, T, H, N, seed):
    return blend.squared_relu, [drawn(seed)(B, T, H * N)]


def drift(B, T, H, N, seed):
    draw, D = drawn(seed), H * N
    inputs = [draw(B, T, D), draw(B, D), *(draw(B, T, D) for _ in range(5)), *(draw(1, 1, D) for _ in range(5))]
    return lambda x, last, *others: gate.drift(x, last, others[:5], others[5:]), inputs


def gated(B, T, H, N, seed):
    draw, D = drawn(seed), H * N
    inputs = [draw(B, T, H, N), 2 * draw(B, T, D), draw(D), draw(D)]
    return lambda y, z, *rows: gate.gate(y, z, *rows, 0.05), inputs


def sift(B, T, H, N, seed):
    return gate.sift, [4 * drawn(seed)(B, T, H * N), drawn(seed + 1)(B, T, H * N)]


EACH = [mix, prepare, lean, finish, norm, squared_relu, drift, gated, sift]


def near(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one.double() - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))


@needs_native
@pytest.mark.parametrize("case", EACH)
@settings(max_examples=12, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_native_and_pytorch_agree_in_values_and_gradients(case, sizes, seed):
    operator, inputs = case(*sizes, seed)
    assert build.native(*(x.float() for x in inputs)) and not build.native(*inputs)
    near(results(operator, [x.float() for x in inputs], seed), results(operator, inputs, seed), 3e-6)


@needs_native
@pytest.mark.parametrize("case", EACH)
def test_any_number_of_threads_gives_the_same_bits(case, at_any_thread_count):
    operator, inputs = case(4, 50, 3, 20, 4)
    inputs = [x.float() for x in inputs]
    at_any_thread_count(lambda: results(operator, inputs))


@needs_native
@pytest.mark.parametrize("case", EACH)
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(case):
    operator, inputs = case(3, 33, 2, 20, 9)
    inputs = [x.float() for x in inputs]
    shared = {n for n, x in enumerate(inputs) if len(x) != 3}
    whole = operator(*inputs)
    whole = [whole] if isinstance(whole, torch.Tensor) else whole
    for row in range(3):
        alone = operator(*(x if n in shared else x[row : row + 1] for n, x in enumerate(inputs)))
        alone = [alone] if isinstance(alone, torch.Tensor) else alone
        assert all(torch.equal(one[0], other[row]) for one, other in zip(alone, whole, strict=True))


@needs_native
def test_extremes_are_finite_and_what_is_no_number_stays_none():
    far = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4, 3.0]).view(1, 1, 8)
    zero, one = torch.zeros(1, 1, 8), torch.ones(1, 1, 8)
    w, k, a, b = blend.prepare(zero, far, far, (zero, zero, one, one), 1)
    assert torch.allclose(w.flatten(), torch.nn.functional.logsigmoid(far).flatten() - 0.5)
    assert not k.any() and not a.any() and not b.any()
    spoilt = far.clone()
    spoilt[..., 3] = torch.nan
    assert blend.squared_relu(spoilt).isnan().sum() == 1
    assert blend.prepare(zero, spoilt, far, (zero, zero, one, one), 1)[0].isnan().sum() == 1
    assert blend.mix(spoilt, far[:, 0], [one])[0].isnan().sum() == 1


@pytest.mark.parametrize("case", EACH)
@pytest.mark.parametrize("B, T", [(0, 3), (2, 0)])
def test_nothing_gives_nothing(case, B, T):
    operator, inputs = case(B, T, 2, 8, 0)
    found = operator(*(x.float() for x in inputs))
    assert not sum(y.numel() for y in ([found] if isinstance(found, torch.Tensor) else found))
