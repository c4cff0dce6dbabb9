"""What surrounds the recurrence on a card, built for the host: values and gradients are PyTorch's."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from rwkvpipe.kernel import blend, build, gate, gpu, loss, passes
from rwkvpipe.kernel.blend import mix, squared_relu
from rwkvpipe.kernel.loss import Wanted, head_loss

KINDS = {"fp32": (torch.float32, 3e-6), "bf16": (torch.bfloat16, 1.5e-2), "mixed": (torch.bfloat16, 1.5e-2)}
SIZES = [(1, 1, 1, 5), (2, 37, 3, 20), (1, 70, 2, 64), (2, 9, 5, 100), (1, 33, 20, 16), (3, 8, 1, 128), (1, 5, 30, 2)]


def learnt(function, inputs, device="cpu"):
    """Values, and gradients of a random mixture."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    found = function(*inputs)
    stream = torch.Generator().manual_seed(1)
    pulls = [torch.randn(y.shape, generator=stream, dtype=torch.float64).to(device) for y in found]
    total = sum((y.double() * pull).sum() for y, pull in zip(found, pulls, strict=True))
    return [*(y.detach() for y in found), *torch.autograd.grad(total, inputs)]


def in_torch(function, inputs):
    """The same by PyTorch, in fp64."""
    ours, natively = mock.patch.object(passes, "fit", lambda *x, **y: False), mock.patch.object(build, "native", no)
    with ours, natively:
        return learnt(function, [x.double() for x in inputs])


def no(*inputs):
    """What `build.native` says where there is nothing."""


def mixed(x, last, *shares):
    return mix(x, last, shares)


def prepared(draw, B, T, H, N):
    rows = [draw(1, 1, H * N) for _ in range(4)]
    return lambda k, w, a, *rows: blend.prepare(k, w, a, rows, H), [3 * draw(B, T, H * N) for _ in range(3)], rows


def leaned(draw, B, T, H, N):
    return lambda *inputs: [blend.lean(*inputs)], [draw(B, T, H * N) for _ in range(3)], [draw(1, 1, H * N)]


def finished(draw, B, T, H, N):
    tokens, rows = [*(draw(B, T, H, N) for _ in range(4)), draw(B, T, H * N)], [draw(H, N), draw(H * N), draw(H * N)]
    return lambda y, r, k, v, g, *rows: [blend.finish(y, r, k, v, g, rows, 0.05)], tokens, rows


def gated(draw, B, T, H, N):
    tokens, rows = [draw(B, T, H, N), 2 * draw(B, T, H * N)], [draw(H * N), draw(H * N)]
    return lambda y, z, *rows: [gate.gate(y, z, *rows, 0.05)], tokens, rows


BY_HEAD = [prepared, leaned, finished, gated]


def case(made, sizes, kind="fp32", seed=0):
    """An operation and its inputs; of `mixed` ones what all tokens share is fp32, as weights are."""
    stream = torch.Generator().manual_seed(seed)
    function, tokens, rows = made(lambda *shape: torch.randn(*shape, generator=stream), *sizes)
    narrow = KINDS[kind][0]
    return function, [*(x.to(narrow) for x in tokens), *(x if kind == "mixed" else x.to(narrow) for x in rows)]


@pytest.fixture
def as_on_a_card(on_host, monkeypatch):
    """What products give goes on as it is, in bf16, where a CPU would widen it."""
    for module in (blend, gate):
        monkeypatch.setattr(module, "widened", lambda row, *inputs: list(inputs))
    return on_host


def same(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        limit = tolerance * float(other.abs().max().clamp(min=1.0))
        assert float((one.cpu().double() - other).abs().max()) < limit


@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
@pytest.mark.parametrize("B, T, D, count", [(1, 1, 3, 1), (3, 5, 300, 6), (2, 70, 7, 2), (1, 64, 20, 5), (4, 32, 9, 4)])
def test_mixes_and_their_gradients_are_pytorch_s(on_host, B, T, D, count, kind, tolerance):
    stream = torch.Generator().manual_seed(T)
    shapes = [(B, T, D), (B, D), *[(1, 1, D)] * count]
    inputs = [torch.randn(shape, generator=stream).to(kind) for shape in shapes]
    assert passes.alike(*inputs)
    found = learnt(mixed, inputs)
    assert all(x.dtype == kind for x in found)
    same(found, in_torch(mixed, inputs), tolerance)


@pytest.mark.parametrize("D", [30, 32])
def test_mixes_for_products_in_bf16_are_rounded_once_and_gradients_stay_wide(on_host, D):
    inputs = [torch.randn(2, 9, D), torch.randn(2, D), torch.randn(1, 1, D), torch.randn(1, 1, D)]
    with torch.autocast("cpu", torch.bfloat16):
        found = learnt(mixed, inputs)
    wide = learnt(mixed, inputs)
    assert [x.dtype for x in found] == [torch.bfloat16] * 2 + [torch.float32] * 4
    assert all(torch.equal(one, other.bfloat16()) for one, other in zip(found[:2], wide[:2], strict=True))
    same(found[2:], [x.double() for x in wide[2:]], 1e-2)


@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("count", [1, 2047, 2049])
def test_squares_and_their_gradients_are_pytorch_s(on_host, count, kind, tolerance):
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(kind)
    for found, wanted in zip(learnt(lambda x: [squared_relu(x)], [x]), in_torch(lambda x: [squared_relu(x)], [x]),
                             strict=True):  # fmt: skip
        assert float((found.double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def beside(x):
    """The same numbers, where no two of them begin at a multiple of 16 bytes."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def mixing(draw, B, T, H, N):
    return mixed, [draw(B, T, H * N), draw(B, H * N)], [draw(1, 1, H * N) for _ in range(6)]


def squares(draw, B, T, H, N):
    return lambda x: [squared_relu(x)], [draw(B, T, H * N)], []


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("made", [*BY_HEAD, mixing, squares])
def test_views_that_begin_anywhere_give_the_same_bits(as_on_a_card, made, kind):
    function, inputs = case(made, (2, 37, 2, 32), kind)
    moved = [beside(x) for x in inputs]
    assert all(x.data_ptr() % 16 for x in moved)
    # gradients of random pulls come in a view of their own, too
    found = learnt(lambda *x: [beside(y) for y in function(*x)], moved)
    assert all(torch.equal(one, other) for one, other in zip(found, learnt(function, inputs), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("made", BY_HEAD)
def test_what_is_done_head_by_head_and_its_gradients_are_pytorch_s(as_on_a_card, made, sizes, kind):
    function, inputs = case(made, sizes, kind, seed=sizes[1])
    found = learnt(function, inputs)
    same(found, in_torch(function, inputs), KINDS[kind][1])
    for x, grad in zip(inputs, found[-len(inputs) :], strict=True):
        assert grad.dtype == x.dtype
    if made is prepared:
        assert [x.dtype for x in found[:4]] == [inputs[3].dtype, *[inputs[0].dtype] * 3]


@pytest.mark.parametrize("made", BY_HEAD)
def test_pytorch_s_form_gives_the_same_kinds_as_ours(as_on_a_card, monkeypatch, made):
    function, inputs = case(made, (2, 9, 3, 20), "mixed")
    ours = function(*inputs)
    monkeypatch.setattr(passes, "fit", lambda *x, **more: False)
    for one, other in zip(ours, function(*inputs), strict=True):
        assert one.dtype == other.dtype
        assert float((one.double() - other.double()).norm()) < 6e-3 * float(other.double().norm())


@pytest.mark.parametrize("made", BY_HEAD)
def test_a_token_has_the_same_bits_whatever_tokens_are_beside_it(on_host, made):
    function, inputs = case(made, (3, 41, 3, 20))
    whole = function(*inputs)
    for row, first, end in ((1, 0, 41), (2, 5, 12)):
        parts = [x[row : row + 1, first:end] if x.shape[:2] == (3, 41) else x for x in inputs]
        for one, other in zip(function(*parts), whole, strict=True):
            assert torch.equal(one[0], other[row, first:end])


@pytest.mark.parametrize("made", BY_HEAD)
def test_the_order_in_which_threads_run_changes_nothing_head_by_head(on_host, made):
    function, inputs = case(made, (1, 45, 5, 60))
    found = []
    for way in (0, 1, 2):
        on_host.grid_order(way)
        found.append(learnt(function, inputs))
    assert all(torch.equal(one, two) for other in found[1:] for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("made", BY_HEAD)
def test_all_results_and_nothing_beside_them_is_written_head_by_head(on_host, guards, made):
    function, inputs = case(made, (1, 35, 5, 60))
    assert all(x.isfinite().all() for x in learnt(function, inputs))
    guards(4)


def test_extremes_are_finite_and_what_is_no_number_stays_none(on_host):
    far = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4, 3.0]).view(1, 1, 8)
    zero, one = torch.zeros(1, 1, 8), torch.ones(1, 1, 8)
    w, k, a, b = blend.prepare(zero, far, far, (zero, zero, one, one), 1)
    assert torch.allclose(w.flatten(), torch.nn.functional.logsigmoid(far).flatten() - 0.5)
    assert not k.any() and not a.any() and not b.any()
    spoilt = far.clone()
    spoilt[..., 3] = torch.nan
    assert blend.prepare(zero, spoilt, far, (zero, zero, one, one), 1)[0].isnan().sum() == 1
    assert blend.prepare(spoilt, far, far, (zero, zero, one, one), 1)[2].isnan().all()
    inputs = [torch.full((1, 3, 2, 40), 5.0), torch.ones(1, 3, 80), torch.ones(80), torch.zeros(80)]

    def even(*inputs):  # heads without any difference
        return [gate.gate(*inputs, 1e-3)]

    same(learnt(even, inputs), in_torch(even, inputs), 1e-6)


def test_a_head_far_from_zero_is_normalised_as_exactly_as_any_other(on_host):
    function, inputs = case(gated, (1, 9, 2, 64))
    inputs[0] = (inputs[0] + 1000.0).detach()
    same(learnt(function, inputs)[:1], in_torch(function, inputs)[:1], 3e-4)  # fp32 itself moves such numbers by 6e-5


def test_the_order_in_which_threads_run_changes_nothing(on_host):
    x, last, share = torch.randn(2, 40, 30), torch.randn(2, 30), torch.randn(1, 1, 30)
    found = []
    for way in (0, 1, 2):
        on_host.grid_order(way)
        found.append(learnt(mixed, [x, last, share]))
    assert all(torch.equal(one, two) for other in found[1:] for one, two in zip(found[0], other, strict=True))


def test_what_is_of_several_kinds_or_empty_or_too_wide_is_left_to_pytorch(on_host):
    x, last, share = torch.randn(2, 4, 8), torch.randn(2, 8), torch.randn(1, 1, 8)
    assert not passes.alike(x, share.bfloat16()) and not passes.fit(x.double()) and not passes.fit(x[:, :0])
    assert not passes.fit(x, share.half()) and not passes.fit(x, width=129)
    (found,) = mix(x.bfloat16(), last, [share])
    assert found.shape == x.shape
    function, inputs = case(finished, (1, 3, 1, 130))
    same(learnt(function, inputs), in_torch(function, inputs), 3e-6)


def weighed(wanted: Wanted) -> Wanted:
    """The same, each position with a weight of its own."""
    weights = 2 * torch.rand(len(wanted.chosen), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return replace(wanted, weights=weights)


@pytest.mark.parametrize("n, D, V", [(1, 3, 2), (70, 5, 31), (9, 7, 513), (3, 4, 9000)])
def test_the_head_s_loss_and_its_gradients_are_pytorch_s(on_host, drawn, n, D, V):
    x, weight, wanted = drawn(n, D, V, n)
    wanted = weighed(wanted) if n == 70 else wanted
    found = learnt(lambda x, weight: [head_loss(x, weight, wanted)], [x, weight])
    same(found, in_torch(lambda x, weight: [head_loss(x, weight, wanted)], [x, weight]), 4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_id_that_has_no_logit_makes_the_loss_of_a_card_nan(on_host, dtype):
    logits, chosen, losses = torch.zeros(3, 5, dtype=dtype), torch.tensor([1, 5, -1]), torch.zeros(3)
    gpu.call("loss_rows", (3, 5, gpu.halves(logits)), logits, chosen, torch.zeros_like(chosen), 1.0, 0.0, losses)
    assert losses[0] == torch.tensor(5.0).log() and losses[1].isnan() and losses[2] == 0


def test_weights_of_bf16_logits_are_not_rounded_themselves(on_host, drawn):
    x, weight, wanted = drawn(40, 6, 700, 1)
    wanted, logits = weighed(replace(wanted, pull=0.0)), (x @ weight.mT).bfloat16()
    alike, whole = logits.clone(), slice(0, 40)
    losses = loss._gradients(alike, replace(wanted, weights=None), whole)
    assert torch.equal(loss._gradients(logits, wanted, whole), losses * wanted.weights.float())
    assert torch.equal(logits, (alike.float() * wanted.weights.float()[:, None]).bfloat16())


def test_bf16_logits_become_the_gradient_that_wide_ones_become_rounded_once(on_host, drawn):
    x, weight, wanted = drawn(40, 6, 700, 1)
    logits = (x @ weight.mT).bfloat16()
    wide, narrow, apart, more = logits.float(), beside(logits), beside(logits.float()), logits.clone()
    losses, first = (loss._gradients(x, wanted, slice(0, 40)) for x in (wide, more))
    assert torch.equal(loss._gradients(narrow, wanted, slice(0, 40)), loss._gradients(apart, wanted, slice(0, 40)))
    assert torch.equal(narrow, apart.bfloat16())
    same([first], [losses.double()], 1e-6)  # a thread has other numbers, so sums are in another order
    same([more.float()], [wide.double()], 4e-3)
    on_host.grid_order(1)
    assert torch.equal(loss._gradients(logits, wanted, slice(0, 40)), first) and torch.equal(logits, more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V, first", [(16, 3), (16, 11), (9000, 8992), (9000, 4097), (513, 1)])
def test_of_equal_logits_the_first_is_drawn_to_zero_also_where_there_is_no_loss(on_host, dtype, V, first):
    logits, chosen = torch.zeros(2, V, dtype=dtype), torch.tensor([-1, first + 1])
    logits[:, first:] = 2.0
    found = logits.clone()
    loss._gradients(found, Wanted(chosen, torch.ones(2), 1.0, 0.5), slice(0, 2))
    wanted = torch.zeros(2, V, dtype=torch.float64)
    wanted[1] = logits[1].double().softmax(-1)
    wanted[1, first + 1] -= 1.0
    wanted[:, first] += 1.0
    same([found], [wanted], 1e-6 if dtype == torch.float32 else 4e-3)


def test_a_logit_that_is_no_number_makes_the_loss_none_and_minus_infinity_is_a_logit(on_host):
    logits = torch.randn(3, 600)
    logits[0, 5], logits[1, 7] = torch.nan, -torch.inf
    wanted = Wanted(torch.tensor([1, 1, 1]), torch.ones(3), 1.0, 0.0)
    whole = torch.nn.functional.cross_entropy(logits, wanted.chosen, reduction="none")
    found = loss._gradients(logits, wanted, slice(0, 3))
    assert found[0].isnan() and torch.allclose(found[1:], whole[1:]) and logits[1:].isfinite().all()


@pytest.mark.parametrize("family", ["rwkv7", "rwkv6"])
def test_a_model_in_bf16_learns_what_it_learns_in_fp32_but_for_rounding(as_on_a_card, small_model, monkeypatch, family):
    monkeypatch.setattr("rwkvpipe.model.rwkv7.fits", lambda *inputs: False)  # what only the CPU has
    model = small_model(family)
    ids = torch.arange(2 * 20).view(2, 20) * 7 % 30

    def learnt_in(narrow):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow is not None):
            x, _ = model.features(ids)
            wanted = Wanted(ids.flatten().roll(-1), torch.ones(40), 1 / 40, 1e-4 / 40, narrow)
            head_loss(model.ln_out(x).flatten(0, 1), model.head.weight, wanted).backward()
        return torch.cat([x.grad.flatten() for x in model.parameters()])

    found, wanted = learnt_in(torch.bfloat16), learnt_in(None)
    assert 1e-4 < float((found - wanted).norm() / wanted.norm()) < 3e-2
    monkeypatch.setattr(passes, "fit", lambda *x, **more: False)
    assert float((found - learnt_in(torch.bfloat16)).norm() / wanted.norm()) < 3e-2


def test_a_line_says_that_our_kernels_compute_what_surrounds_the_recurrence(on_host, caplog):
    gpu._said.clear()
    with caplog.at_level("INFO", logger="rwkvpipe"):
        squared_relu(torch.ones(3))
    assert "kernel: what surrounds the recurrence by our kernels on cpu (" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
def test_a_card_mixes_and_squares_as_pytorch_does(kind, tolerance):
    shapes = [(3, 70, 300), (3, 300), *[(1, 1, 300)] * 6]
    inputs = [torch.randn(shape).to(kind) for shape in shapes]
    given = [x.cuda() for x in inputs]
    assert passes.alike(*given), gpu.at_hand(given[0].device)[1]
    for function, count in ((mixed, len(inputs)), (lambda x: [squared_relu(x)], 1)):
        same(learnt(function, given[:count], "cuda"), in_torch(function, inputs[:count]), tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [*SIZES, (4, 257, 12, 64)])
@pytest.mark.parametrize("made", BY_HEAD)
def test_a_card_does_head_by_head_what_pytorch_does_and_the_same_bits_again(made, sizes, kind):
    function, inputs = case(made, sizes, kind)
    given = [x.cuda() for x in inputs]
    found, again = (learnt(function, given, "cuda") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    same(found, in_torch(function, inputs), KINDS[kind][1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("uneven", [False, True])
def test_a_card_s_loss_is_pytorch_s(drawn, uneven):
    x, weight, wanted = drawn(300, 64, 65536, 2)
    wanted = weighed(wanted) if uneven else wanted
    moved = {name: value.cuda() for name, value in vars(wanted).items() if isinstance(value, torch.Tensor)}
    on_card = replace(wanted, **moved)
    found = learnt(lambda x, weight: [head_loss(x, weight, on_card)], [x.cuda(), weight.cuda()], "cuda")
    same(found, in_torch(lambda x, weight: [head_loss(x, weight, wanted)], [x, weight]), 2e-5)
