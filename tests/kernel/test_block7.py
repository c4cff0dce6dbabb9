"""The large operations of a block of RWKV-7 against the passes that they are made of, in values and in gradients."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.kernel import blend, block7, build, product
from rwkvpipe.kernel.wkv7 import wkv7_reference
from rwkvpipe.model.family import build as model_of
from tests.kernel.operators import results

needs_native = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")
EPS = 0.05


def drawn(seed):
    stream = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=stream, dtype=torch.float64)


def project(B, T, H, N, seed):
    draw, D = drawn(seed), H * N
    which = [(0, 7), (1, D), (2, 3), (1, 5)][: 1 + seed % 4]
    shares = [draw(1, 1, D) for _ in range(4)]
    inputs = [draw(B, T, D), draw(B, D), *shares, *(draw(D, out) for _, out in which)]

    def whole(x, last, *others):
        return block7.project(x, last, others[:4], [(n, m) for (n, _), m in zip(which, others[4:], strict=True)])

    def parts(x, last, *others):
        mixes = blend.mix(x, last, others[:4])
        return [mixes[n] @ m for (n, _), m in zip(which, others[4:], strict=True)]

    return whole, parts, inputs


def recall(B, T, H, N, seed):
    draw, D = drawn(seed), H * N
    lean = [draw(B, T, D), draw(B, T, D), draw(1, 1, D)] if seed % 2 else []
    token, rows = [draw(B, T, D) for _ in range(6)], [draw(1, 1, D) for _ in range(4)]
    inputs = [*token, *rows, draw(H, N), draw(D), draw(D), draw(B, H, N, N), *lean]

    def whole(*given):
        return block7.recall(given[:6], given[6:10], given[10:13], given[13], eps=EPS, lean=given[14:])

    def parts(r, k, v, decay, rate, gate, *others):
        rows, norm, memory, lean = others[:4], others[4:7], others[7], others[8:]
        v = blend.lean(v, *lean) if lean else v
        w, k, a, b = blend.prepare(k, decay, rate, rows, H)
        r, v = r.unflatten(-1, (H, N)), v.unflatten(-1, (H, N))
        y, memory = wkv7_reference(r, w, k, v, a, b, memory)
        return blend.finish(y, r, k, v, gate, norm, EPS), memory

    return whole, parts, inputs


def square_mix(B, T, H, N, seed):
    draw, D, F = drawn(seed), H * N, 1 + seed
    inputs = [draw(B, T, D), draw(B, D), draw(1, 1, D), draw(F, D), draw(D, F)]

    def parts(x, last, share, key, value):
        return blend.squared_relu(blend.mix(x, last, [share])[0] @ key.mT) @ value.mT

    return block7.square_mix, parts, inputs


EACH = [project, recall, square_mix]


@needs_native
@pytest.mark.parametrize("case", EACH)
@settings(max_examples=12, deadline=None)
@given(sizes=st.tuples(*(st.integers(1, most) for most in (3, 40, 3, 20))), seed=st.integers(0, 99))
def test_values_and_gradients_are_those_of_the_parts(case, sizes, seed):
    whole, parts, inputs = case(*sizes, seed)
    wanted = results(parts, inputs, seed)
    found = results(whole, [x.float() for x in inputs], seed)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one.double() - other).abs().max()) <= 2e-5 * max(1.0, float(other.abs().max()))


@needs_native
@pytest.mark.parametrize("case", EACH)
def test_any_number_of_threads_gives_the_same_bits(case, at_any_thread_count, monkeypatch):
    monkeypatch.setattr(product, "_chosen", ["own"])  # torch's products promise nothing
    whole, _, inputs = case(3, 50, 3, 20, 7)
    inputs = [x.float() for x in inputs]
    at_any_thread_count(lambda: results(whole, inputs))


@needs_native
def test_a_frozen_matrix_gets_no_gradient_and_what_is_before_it_does():
    whole, _, inputs = square_mix(2, 5, 1, 8, 11)
    inputs = [x.float().requires_grad_(n not in (3, 4)) for n, x in enumerate(inputs)]
    whole(*inputs).sum().backward()
    assert [x.grad is None for x in inputs] == [False, False, False, True, True]


def tiny():
    model = model_of(RwkvConfig(vocab_size=30, n_layer=3, n_embd=64, head_size=32))
    model.initialise(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    return model


def step(model):
    ids = torch.arange(80).view(2, 40) % 30
    model.zero_grad()
    logits, state = model(ids)
    (logits.logsumexp(-1).sum() + sum(memory.square().sum() for memory in state.wkv)).backward()
    return [logits.detach(), *(x.grad for x in model.parameters())]


@needs_native
def test_a_model_gives_the_same_with_its_blocks_in_large_operations_or_in_parts():
    model = tiny()
    with mock.patch("rwkvpipe.model.rwkv7.fits", return_value=False):
        wanted = step(model)
    for one, other in zip(step(model), wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * max(1.0, float(other.abs().max()))


@needs_native
def test_a_step_keeps_a_third_less_than_its_parts_would():
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def held(model):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.arange(400).view(2, 200) % 30)[0].sum()
        weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
        return sum(size for place, size in kept.items() if place not in weights)

    model = tiny()
    whole = held(model)
    with mock.patch("rwkvpipe.model.rwkv7.fits", return_value=False):
        assert whole < 0.7 * held(model)


@needs_native
def test_layers_with_adapters_and_other_numbers_than_fp32_go_through_the_parts():
    x = torch.randn(1, 2, 4)
    plain = nn.Linear(4, 4)
    assert block7.fits([plain], x)
    assert not block7.fits([nn.Sequential(plain)], x) and not block7.fits([plain.double()], x)
