"""Products of rounded numbers against what they say, in values and gradients; what a model does with them."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.kernel import block7, build, product
from rwkvpipe.kernel.product import Products, linear, through
from rwkvpipe.model.family import build as model_of

needs_native = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")
ROUNDING = torch.autocast("cpu", torch.bfloat16)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def computed(narrow, name=None):
    """Rounded numbers are multiplied by the processor's own product, or in fp32; or by what is named."""
    return mock.patch.object(product, "_chosen", [name or ("bf16" if narrow else "torch")])


def rounded(x):
    return x.bfloat16().double()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_what_is_rounded_is_what_goes_in_and_sums_are_fp32(rows, k, m, narrow):
    x, matrix, grad = drawn(2, rows, k), drawn(k, m), drawn(2, rows, m)
    x.requires_grad_(), matrix.requires_grad_()
    with computed(narrow), ROUNDING:
        y = linear(x, matrix)
        y.backward(grad)
    assert y.dtype == x.grad.dtype == matrix.grad.dtype == torch.float32
    a, b, c = rounded(x.detach()), rounded(matrix.detach()), rounded(grad)
    wanted = a @ b, c @ b.mT, a.flatten(0, 1).mT @ c.flatten(0, 1)
    for found, true in zip((y.detach(), x.grad, matrix.grad), wanted, strict=True):
        assert (found - true).norm() <= (2**-8 if narrow else 1e-6) * true.norm()


def test_without_autocast_products_are_those_of_torch():
    x, layer = drawn(2, 5, 7), nn.Linear(7, 3, bias=False)
    assert torch.equal(linear(x, layer.weight.mT), x @ layer.weight.mT)
    assert torch.equal(through(layer, x), layer(x)) and product.asked() == Products()


def test_a_layer_that_is_more_than_a_matrix_computes_itself():
    x, layer = drawn(2, 5, 7), nn.Linear(7, 3)
    with ROUNDING:
        assert torch.equal(through(layer, x), layer(x)) and through(layer, x).dtype == torch.bfloat16
        assert linear(x.double(), layer.weight.mT.double()).dtype == torch.float64


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_product_is_written_or_added_where_it_is_to_be(narrow, add):
    how, a, b, into = Products(torch.bfloat16, narrow), drawn(4, 6), drawn(6, 5), drawn(4, 5)
    wanted = into * add + how.mm(how.take(a), how.take(b))
    how.put(into, how.take(a), how.take(b), add=add)
    assert torch.allclose(into, wanted, atol=1e-6)


def gradients(family, narrow=False, packed=False, name=None):
    model = model_of(RwkvConfig(family=family, n_layer=2, n_embd=64, head_size=32, vocab_size=20))
    model.initialise(1)
    with torch.no_grad():
        for number, value in enumerate(model.parameters()):  # initial zeros hide whole paths
            value += 0.05 * drawn(*value.shape, seed=number)
    ids = torch.arange(2 * 21).view(2, 21) * 7 % 20
    starts = ids == 0 if packed else None
    with computed(narrow, name):
        features, _ = model.features(ids, starts=starts)
        logits = model.logits(features)
        (logits * drawn(*logits.shape)).sum().backward()
    return [logits.detach(), *(value.grad for value in model.parameters())]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
def test_a_model_computed_with_rounded_products_is_near_to_what_it_is(family, narrow, packed):
    wanted = gradients(family, packed=packed)
    with ROUNDING:
        found = gradients(family, narrow, packed)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32 and 0 < (one - other).norm() <= 0.1 * other.norm()


@pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
def test_a_model_computed_with_whole_numbers_is_nearer_than_with_bf16(family, monkeypatch):
    wanted = gradients(family)
    monkeypatch.setattr(product, "SPREAD", 0)
    with ROUNDING:
        found, narrow = gradients(family, name="whole"), gradients(family)
    far = [
        [(one - other).norm() / other.norm() for one, other in zip(each, wanted, strict=True)]
        for each in (found, narrow)
    ]
    assert 0 < max(far[0]) <= 0.05 and sum(far[0]) < 0.5 * sum(far[1])


@needs_native
@pytest.mark.parametrize("narrow", [False, True])
def test_the_large_operations_round_as_the_products_they_are_made_of_do(narrow):
    with ROUNDING:
        whole = gradients("rwkv7", narrow)
        with mock.patch("rwkvpipe.model.rwkv7.fits", lambda *given: False):
            parts = gradients("rwkv7", narrow)
        assert block7.fits([nn.Linear(4, 4, bias=False)], drawn(1, 1, 4))
    for one, other in zip(whole, parts, strict=True):  # a last digit may tip a number to its other neighbour
        assert (one - other).norm() <= 0.01 * other.norm()
