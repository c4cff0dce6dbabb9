"""The RWKV-7 operator where decays are far from what models have, and its native form for any sizes."""

from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpipe.kernel import build
from rwkvpipe.kernel.wkv7 import wkv7, wkv7_reference
from tests.kernel.operators import error, exact, made, results


def chunks(*inputs):
    """The form by chunks, also where there is a native one."""
    with mock.patch.object(build, "native", lambda *inputs: None):
        return wkv7(*inputs)


@pytest.mark.parametrize("operator", [wkv7, chunks])
@pytest.mark.parametrize("w", [-30.0, 1.5, 3.0, 3.6, 20.0])
def test_decays_from_none_to_complete_are_exact_and_finite(w, operator):
    inputs = made("wkv7", 1, 21, 2, 8, w=[w])
    for found, wanted in zip(results(operator, inputs), exact("wkv7", inputs), strict=True):
        # where all is forgotten the gradient of w is 0, found as a difference of numbers of the size of the others
        assert error(found, wanted, least=5.0) < 2e-5


@pytest.mark.parametrize("operator", [wkv7, chunks])
def test_decays_of_one_chunk_may_differ_as_far_as_they_like(operator):
    inputs = made("wkv7", 1, 40, 1, 8)
    inputs[1][:, ::3] = 3.3
    inputs[1][:, 1::5] = -20.0
    for found, wanted in zip(results(operator, inputs), exact("wkv7", inputs), strict=True):
        assert error(found, wanted) < 2e-5


@pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")
@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(1, 130)),
    w=st.one_of(st.none(), st.tuples(st.floats(-12, 4))),
    seed=st.integers(0, 99),
)
def test_the_native_form_of_any_sizes_and_decays_is_exact_to_a_millionth(sizes, w, seed):
    inputs = made("wkv7", *sizes, seed, w)
    plain = results(wkv7_reference, inputs)  # sums that cancel cost every form digits
    for found, wanted, other in zip(results(wkv7, inputs), exact("wkv7", inputs), plain, strict=True):
        assert error(found, wanted, least=1.0) < 1e-6 + 4 * error(other, wanted, least=1.0)
