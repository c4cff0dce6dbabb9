"""Our own products of fp32 against fp64, in values and gradients; what is used of them by models and the loss."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpipe.kernel import build, product
from rwkvpipe.kernel.loss import Wanted, head_loss
from rwkvpipe.kernel.panels import pack, times
from rwkvpipe.kernel.product import Products, linear

pytestmark = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")
OWN = Products(own=True)
GUARD = 40


@pytest.fixture
def always(monkeypatch):
    """Own products are chosen, and used however small they are."""
    monkeypatch.setattr(product, "WORTH", 1)
    monkeypatch.setattr(product, "_chosen", ["own"])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def between_guards(values):
    """The same numbers between numbers that are none, and the memory around them."""
    whole = torch.full((2 * GUARD + values.numel(),), torch.nan)
    inside = whole[GUARD : GUARD + values.numel()].view(values.shape)
    return inside.copy_(values), whole


def turned(x, whether):
    """As it is, or the same matrix the other way round in memory, between guards either way."""
    return between_guards(x.mT.contiguous())[0].mT if whether else between_guards(x)[0]


def near(found, true, most):
    return bool(((found.double() - true).abs() <= 1e-6 * most + 1e-30).all())


sizes = st.integers(1, 20) | st.integers(21, 70)


@settings(max_examples=40)
@given(sizes, sizes | st.sampled_from([384, 385, 800]), sizes, st.booleans(), st.booleans(), st.booleans())
def test_products_are_those_of_fp64_and_nothing_beside_them_is_written(n, k, m, x_turned, turned_too, add):
    x, matrix, before = drawn(n, k), drawn(k, m, seed=1), drawn(n, m, seed=2)
    into, whole = between_guards(before if add else torch.full((n, m), torch.nan))
    with mock.patch.object(product, "WORTH", 1):
        OWN.put(into, turned(x, x_turned), turned(matrix, turned_too), add=add)
    wanted, most = x.double() @ matrix.double(), x.double().abs() @ matrix.double().abs()
    assert near(into, wanted + before * add, most + before.abs() * add)
    assert whole[:GUARD].isnan().all() and whole[-GUARD:].isnan().all()


@settings(max_examples=20)
@given(st.integers(1, 3), sizes, sizes, sizes)
def test_gradients_are_those_of_fp64(rows, n, k, m):
    x, matrix, grad = (
        drawn(rows, n, k).requires_grad_(),
        drawn(k, m, seed=1).requires_grad_(),
        drawn(rows, n, m, seed=2),
    )
    with mock.patch.object(product, "WORTH", 1), mock.patch.object(product, "_chosen", ["own"]):
        y = linear(x, matrix)
        y.backward(grad)
    a, b, c = x.detach().double().flatten(0, 1), matrix.detach().double(), grad.double().flatten(0, 1)
    for found, (one, other) in ((y.detach(), (a, b)), (x.grad, (c, b.mT)), (matrix.grad, (a.mT, c))):
        assert near(found.flatten(0, -2), one @ other, one.abs() @ other.abs())


def test_the_same_bits_come_out_at_any_thread_count(at_any_thread_count):
    x, matrix, begun = drawn(345, 790), drawn(790, 701, seed=1), drawn(345, 701)

    def results():
        into = begun.clone()
        OWN.put(into, x, matrix, add=True)
        return [into, OWN.mm(x, matrix), OWN.mm(x[:120], matrix)]

    at_any_thread_count(results)
    whole = results()[1]
    assert torch.equal(OWN.mm(x[:120], matrix), whole[:120])  # nor do they depend on the rows beside
    assert torch.equal(times(x, pack(matrix.mT.contiguous(), "fp32")), whole)  # or on how the matrix lies


def test_what_is_not_finite_stays_where_it_is(always):
    x, matrix = drawn(40, 30), drawn(30, 20)
    x[3, 4], x[39, 29] = torch.inf, torch.nan
    found = OWN.mm(x, matrix)
    rows = torch.isfinite(found).all(1)
    assert (~rows).nonzero().flatten().tolist() == [3, 39] and found[39].isnan().all()


def test_empty_products_are_zeros(always):
    assert (
        OWN.mm(torch.empty(3, 0), torch.empty(0, 2)).eq(0).all() and OWN.mm(torch.empty(0, 3), drawn(3, 2)).numel() == 0
    )


def gradients(model):
    ids = torch.arange(2 * 19).view(2, 19) * 7 % 21
    features, _ = model.features(ids)
    count = features.shape[0] * features.shape[1]
    loss = head_loss(features.flatten(0, 1), model.head.weight, Wanted(ids.flatten(), torch.ones(count), 1 / count))
    (loss + model.logits(features).square().mean()).backward()
    return [loss.detach(), *(value.grad for value in model.parameters())]


@pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
def test_all_matrices_of_a_model_that_trains_are_multiplied_so(family, small_model, monkeypatch):
    wanted = gradients(small_model(family))
    monkeypatch.setattr(product, "WORTH", 1)
    monkeypatch.setattr(product, "_chosen", ["own"])
    count = []
    multiply = product._multiply
    monkeypatch.setattr(product, "_multiply", lambda *given, **more: count.append(1) or multiply(*given, **more))
    found = gradients(small_model(family))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()
    matrices = sum(math.prod(x.shape) > 64 and x.dim() >= 2 for x in found[1:]) - 1  # but the embedding
    assert len(count) >= 3 * matrices
