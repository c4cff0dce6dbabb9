"""The RWKV-6 operator where decays are far from what models have, or rows long."""

import pytest
import torch

from rwkvpipe.kernel.wkv6 import wkv6
from tests.kernel.operators import check_exact, made, results


@pytest.mark.parametrize("w", [-30.0, -3.0, 1.5, 3.6, 9.0, 87.0])
def test_decays_from_none_to_complete_are_exact(w):
    check_exact("wkv6", made("wkv6", 1, 70, 2, 8, w=[w]), 1e-5)


def test_a_decay_beyond_all_numbers_is_complete_and_has_no_gradient():
    found = results(wkv6, made("wkv6", 1, 35, 1, 8, w=[1e30]))
    assert all(x.isfinite().all() for x in found)
    assert not found[3].any()


def test_decays_of_one_chunk_may_differ_as_far_as_they_like():
    inputs = made("wkv6", 1, 40, 1, 8)
    inputs[1][:, ::3] = 7.3
    inputs[1][:, 1::5] = -20.0
    check_exact("wkv6", inputs, 1e-5)


def test_long_rows_lose_no_digits():
    check_exact("wkv6", made("wkv6", 1, 2000, 1, 8, w=[-7.0]), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_are_left_as_they_were(dtype):
    inputs = [x.to(dtype) for x in made("wkv6", 1, 1, 1, 8)]
    before = [x.clone() for x in inputs]
    results(wkv6, inputs)
    wkv6(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
