"""Our own products of fp32, bf16 and whole numbers against fp64; what is used of them by models and the loss."""

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
OWN, WHOLE = Products(own=True), Products(torch.bfloat16, narrow=False, whole=True)
NARROW = Products(torch.bfloat16, own=True)
GUARD = 40


@pytest.fixture
def always(monkeypatch):
    """Own products are chosen, and used however small they are."""
    monkeypatch.setattr(product, "SPREAD", 0)
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


def check_product(how, x, matrix, turns, add):
    """What is put, or added to what was there, is that of fp64, and nothing beside it is written."""
    before = drawn(len(x), matrix.shape[1], seed=2)
    into, whole = between_guards(before if add else torch.full_like(before, torch.nan))
    with mock.patch.object(product, "SPREAD", 0):
        how.put(into, turned(x, turns[0]), turned(matrix, turns[1]), add=add)
    wanted, most = x.double() @ matrix.double(), x.double().abs() @ matrix.double().abs()
    assert near(into, wanted + before * add, most + before.abs() * add)
    assert whole[:GUARD].isnan().all() and whole[-GUARD:].isnan().all()


sizes = st.integers(1, 20) | st.integers(21, 70)
deep = sizes | st.sampled_from([255, 256, 257, 512, 769])
turns = st.tuples(st.booleans(), st.booleans())


@settings(max_examples=40)
@given(sizes, sizes | st.sampled_from([384, 385, 800]), sizes, turns, st.booleans())
def test_products_are_those_of_fp64_and_nothing_beside_them_is_written(n, k, m, turns, add):
    check_product(OWN, drawn(n, k), drawn(k, m, seed=1), turns, add)


@settings(max_examples=60)
@given(sizes, deep, sizes, turns, st.booleans())
def test_numbers_are_rounded_to_bf16_and_their_sums_are_not(n, k, m, turns, add):
    x, matrix = drawn(n, k), drawn(k, m, seed=1)
    check_product(NARROW, x.bfloat16().float(), matrix.bfloat16().float(), turns, add)
    found = NARROW.mm(turned(x, turns[0]), turned(matrix, turns[1]))
    assert torch.equal(found, NARROW.mm(x.bfloat16().float(), matrix.bfloat16().float()))


@settings(max_examples=60)
@given(sizes, deep, sizes, turns, st.booleans())
def test_whole_numbers_are_multiplied_exactly(n, k, m, turns, add):
    draw = torch.Generator().manual_seed(n + 71 * k + m)
    x, matrix = (
        torch.randint(-product.MOST, product.MOST + 1, size, generator=draw).float() for size in ((n, k), (k, m))
    )
    x[:, :: product.BLOCK], matrix[:: product.BLOCK] = product.MOST, -product.MOST  # so that a block is times 1
    check_product(WHOLE, x, matrix, turns, add)


@pytest.mark.parametrize("turned_too", [False, True])
@pytest.mark.parametrize("x_turned", [False, True])
@pytest.mark.parametrize(("n", "k", "m"), [(3, 8500, 5), (4100, 260, 7), (5, 259, 4120)])
def test_large_matrices_are_rounded_piece_by_piece(always, n, k, m, x_turned, turned_too):
    x, matrix, into = drawn(n, k), drawn(k, m, seed=1), drawn(n, m)
    wanted = into + product.evened(x.double(), -1) @ product.evened(matrix.double(), 0)
    WHOLE.put(into, turned(x, x_turned), turned(matrix, turned_too), add=True)
    assert (into - wanted).norm() <= 1e-4 * wanted.norm()


@settings(max_examples=30)
@given(sizes, deep, sizes, st.booleans(), st.booleans(), st.integers(-30, 30))
def test_what_is_rounded_to_whole_numbers_is_what_the_plain_form_rounds(n, k, m, x_turned, turned_too, size):
    x, matrix = drawn(n, k) * 10.0**size, drawn(k, m, seed=1)
    with mock.patch.object(product, "SPREAD", 0):
        found = WHOLE.mm(turned(x, x_turned), turned(matrix, turned_too)).double()
    wanted = product.evened(x.double(), -1) @ product.evened(matrix.double(), 0)
    true = x.double() @ matrix.double()
    most = (x.double().square().sum(1, keepdim=True) * matrix.double().square().sum(0)).sqrt()
    # where a number lies in the middle between two whole ones, its last digit says which it becomes
    assert bool(((found - wanted).abs() <= 1e-3 * most).all()) and (found - wanted).norm() <= 2e-4 * most.norm()
    assert (found - true).norm() <= 1.5e-3 * most.norm()


@pytest.mark.parametrize(
    ("n", "k", "m", "worth"),
    [(1024, 256, 256, True), (256, 512, 1024, True), (512, 768, 16, False), (512, 16, 768, False)],
)
def test_numbers_that_few_products_need_are_not_rounded(n, k, m, worth):
    x, matrix = drawn(n, k), drawn(k, m, seed=1)
    assert torch.equal(WHOLE.mm(x, matrix), x @ matrix) != worth


def test_one_number_beside_tiny_ones_costs_no_more_than_is_said():
    x, matrix = drawn(64, 2560) * 1e-3, drawn(2560, 64, seed=1)
    x[:, ::256] = 1.0
    with mock.patch.object(product, "SPREAD", 0):
        found = WHOLE.mm(x, matrix).double()
    true = x.double() @ matrix.double()
    said = (product.BLOCK / 12) ** 0.5 / product.MOST
    plain = (product.evened(x.double(), -1) @ matrix.double() - true).norm()
    assert 0.3 * said * true.norm() < plain <= 1.1 * said * true.norm()
    assert (found - true).norm() <= 1.3 * said * true.norm()


@pytest.mark.parametrize("how", [WHOLE, NARROW])
def test_without_native_code_the_plain_form_computes(monkeypatch, how):
    x, matrix, begun = drawn(2, 30, 300), drawn(300, 20, seed=1), drawn(60, 20)
    monkeypatch.setattr(product, "SPREAD", 0)
    natively = [how.mm(x, matrix), begun.clone()]
    how.put(natively[1], x.flatten(0, 1), matrix, add=True)
    monkeypatch.setattr(build, "native", lambda *given: None)
    plainly = [how.mm(x, matrix), begun.clone()]
    how.put(plainly[1], x.flatten(0, 1), matrix, add=True)
    for one, other in zip(natively, plainly, strict=True):
        assert (one - other).norm() <= 2e-4 * other.norm()
    assert not torch.allclose(plainly[0], x @ matrix, rtol=0, atol=1e-5)


def test_logits_and_their_gradients_are_rounded_to_bf16_where_products_are(monkeypatch):
    monkeypatch.setattr(product, "_chosen", ["bf16+own"])
    x, weight, ids = drawn(40, 65).requires_grad_(), drawn(300, 65, seed=1).requires_grad_(), torch.arange(40) % 300
    multiplied = []
    multiply = product._multiply
    monkeypatch.setattr(product, "_multiply", lambda *given: multiplied.append(given[-1]) or multiply(*given))
    loss = head_loss(x, weight, Wanted(ids, torch.ones(40), 1 / 40, dtype=torch.bfloat16))
    assert len(multiplied) == 3 and len(set(multiplied)) == 1
    rounded = (x.detach().bfloat16().double(), weight.detach().bfloat16().double())
    logits = rounded[0] @ rounded[1].mT
    assert abs(loss.item() - torch.nn.functional.cross_entropy(logits, ids)) < 1e-6 * loss.item()
    steps = logits.softmax(-1) - torch.nn.functional.one_hot(ids, 300)
    steps = steps.float().bfloat16().double() / 40
    loss.backward()
    for found, true in ((x.grad, steps @ rounded[1]), (weight.grad, steps.mT @ rounded[0])):
        assert (found - true).norm() <= 1e-4 * true.norm()


@pytest.mark.skipif(not build.extension() or not build.extension().multiply_bf16(), reason="no such products here")
@settings(max_examples=20)
@given(sizes, deep, sizes, turns)
def test_where_the_processor_has_no_products_of_bf16_others_have_their_bits(n, k, m, turns):
    x, matrix = turned(drawn(n, k), turns[0]), turned(drawn(k, m, seed=1), turns[1])
    found, into = NARROW.mm(x, matrix), drawn(n, m, seed=2)
    added = into.clone()
    NARROW.put(added, x, matrix, add=True)
    with mock.patch.object(build.extension(), "multiply_bf16", lambda: 0):
        assert torch.equal(NARROW.mm(x, matrix), found)
        NARROW.put(into, x, matrix, add=True)
    assert torch.equal(into, added)


def test_bf16_begins_at_the_smallest_normal_number():
    x = torch.tensor([[1e-20, 1e-20], [3e-38, 0.0]])
    found = NARROW.mm(x, torch.tensor([[1e-20, 2.0], [0.0, 2.0]]))
    wanted = x.bfloat16().double() @ torch.tensor([[1e-20, 2.0], [0.0, 2.0]]).bfloat16().double()
    assert ((found - wanted).abs() <= 2.0**-126).all() and found[1, 1] > 5e-38 and found[0, 1] > 0


def test_gradients_of_logits_are_not_rounded_to_whole_numbers(monkeypatch):
    monkeypatch.setattr(product, "SPREAD", 0)
    monkeypatch.setattr(product, "_chosen", ["whole"])
    x, weight, ids = drawn(40, 64).requires_grad_(), drawn(300, 64, seed=1).requires_grad_(), torch.arange(40) % 300
    wanted = Wanted(ids, torch.ones(40), 1 / 40, dtype=torch.bfloat16)
    multiplied = []
    multiply = product._multiply
    monkeypatch.setattr(product, "_multiply", lambda *given: multiplied.append(given[-1]) or multiply(*given))
    head_loss(x, weight, wanted).backward()
    assert multiplied == ["whole"]
    logits = product.evened(x.detach(), -1) @ product.evened(weight.detach(), -1).mT
    steps = (logits.softmax(-1) - torch.nn.functional.one_hot(ids, 300)) / 40
    for found, true in ((x.grad, steps @ weight.detach()), (weight.grad, steps.mT @ x.detach())):
        assert (found - true).norm() <= 1e-4 * true.norm()


@settings(max_examples=20)
@given(st.integers(1, 3), sizes, sizes, sizes)
def test_gradients_are_those_of_fp64(rows, n, k, m):
    x, matrix, grad = (
        drawn(rows, n, k).requires_grad_(),
        drawn(k, m, seed=1).requires_grad_(),
        drawn(rows, n, m, seed=2),
    )
    with mock.patch.object(product, "SPREAD", 0), mock.patch.object(product, "_chosen", ["own"]):
        y = linear(x, matrix)
        y.backward(grad)
    a, b, c = x.detach().double().flatten(0, 1), matrix.detach().double(), grad.double().flatten(0, 1)
    for found, (one, other) in ((y.detach(), (a, b)), (x.grad, (c, b.mT)), (matrix.grad, (a.mT, c))):
        assert near(found.flatten(0, -2), one @ other, one.abs() @ other.abs())


@pytest.mark.parametrize("how", [WHOLE, NARROW])
def test_rounded_numbers_give_the_same_bits_at_any_thread_count(at_any_thread_count, always, how):
    x, matrix, y = drawn(645, 790), drawn(790, 701, seed=1), drawn(645, 701)
    at_any_thread_count(lambda: [how.mm(x, matrix), how.mm(y, matrix.mT), how.mm(x.mT, y)])
    assert torch.equal(how.mm(x[:120], matrix), how.mm(x, matrix)[:120])  # nor do they depend on the rows beside


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


@pytest.mark.parametrize("how", [OWN, WHOLE, NARROW])
def test_what_is_not_finite_stays_where_it_is(always, how):
    x, matrix = drawn(40, 30), drawn(30, 20)
    x[3, 4], x[39, 29] = torch.inf, torch.nan
    for found in (how.mm(x, matrix), how.mm(x.mT.contiguous().mT, matrix)):
        rows = torch.isfinite(found).all(1)
        assert (~rows).nonzero().flatten().tolist() == [3, 39] and found[39].isnan().all()


@pytest.mark.parametrize("how", [OWN, WHOLE, NARROW])
def test_empty_products_are_zeros(always, how):
    assert how.mm(torch.empty(3, 0), torch.empty(0, 2)).eq(0).all()
    assert how.mm(torch.empty(0, 3), drawn(3, 2)).numel() == 0


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
    monkeypatch.setattr(product, "SPREAD", 0)
    monkeypatch.setattr(product, "_chosen", ["own"])
    count = []
    multiply = product._multiply
    monkeypatch.setattr(product, "_multiply", lambda *given: count.append(1) or multiply(*given))
    found = gradients(small_model(family))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()
    matrices = sum(math.prod(x.shape) > 64 and x.dim() >= 2 for x in found[1:]) - 1  # but the embedding
    assert len(count) >= 3 * matrices
