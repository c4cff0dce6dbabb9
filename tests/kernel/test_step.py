"""A token of every row through a whole model by a card's kernels, built for the host: PyTorch's logits and states."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from rwkvpipe.base.config import LoraConfig, RwkvConfig
from rwkvpipe.infer import graph, packed
from rwkvpipe.infer.decode_card import MOST, CardDecoder, card_decoder
from rwkvpipe.infer.graph import Graphs
from rwkvpipe.infer.packed import keep
from rwkvpipe.kernel import gpu
from rwkvpipe.kernel.wkv7 import wkv7
from rwkvpipe.model.family import build
from rwkvpipe.model.layers import State
from rwkvpipe.weights.lora import folded, inject
from rwkvpipe.weights.rounded import rounded


def made(n_embd=64, dim_ffn=None, n_layer=3, vocab_size=37, kind="fp32", seed=0, **more):
    """A model in which nothing is zero; in bf16 and int8 its matrices are rounded."""
    config = RwkvConfig(n_layer=n_layer, n_embd=n_embd, head_size=64, vocab_size=vocab_size, dim_ffn=dim_ffn, **more)
    model, stream = build(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if n_layer > 1:
            model.initialise(seed)
        else:  # which has no initial values
            torch._foreach_zero_(list(model.parameters()))
        for name, x in model.named_parameters():
            x.add_((0.5 if x.numel() == n_embd else 0.08) * torch.randn(x.shape, generator=stream))
            if kind != "fp32" and (x.dim() == 2 and "emb" not in name):
                low = packed.LOW.fullmatch(name)
                found = rounded(x.mT if low else x, kind).open()
                x.copy_(found.mT if low else found)
    return model.eval()


def narrowed(model, kind):
    """The same, its layers of a matrix in bf16 or int8 as a card keeps them."""
    if kind == "fp32":
        return model
    with mock.patch.object(packed, "on_card", lambda weight: True):
        keep(model, kind)
    return model


def state_of(model, rows, seed=1):
    state, stream = model.start(rows), torch.Generator().manual_seed(seed)
    for part in (*state.att_x, *state.wkv, *state.ffn_x):
        part.copy_(torch.randn(part.shape, generator=stream))
    return state


def parts(state):
    return [*state.att_x, *state.wkv, *state.ffn_x]


def copied(state, rows=slice(None)):
    return State(*([x[rows].clone() for x in each] for each in (state.att_x, state.wkv, state.ffn_x)))


def exactly(model, ids, state):
    """Logits and state in fp64."""
    wide = build(model.config).double()
    wide.load_state_dict(model.state_dict())
    state = State(*([x.double() for x in each] for each in (state.att_x, state.wkv, state.ffn_x)))
    logits, after = wide.eval()(ids[:, None], state)
    return logits[:, 0], after


KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
CASES = [
    ({}, 1), ({}, 5), ({"n_embd": 128, "dim_ffn": 36, "vocab_size": 6}, 2),
    ({"n_embd": 192, "d_decay": 3, "d_gate": 70}, 3), ({"n_embd": 1088, "dim_ffn": 2052, "n_layer": 2}, 8),
    ({"n_embd": 1088, "n_layer": 2}, 1), ({"ln0": False}, 4),
    ({"dim_ffn": 8196 + 64, "n_layer": 2, "vocab_size": 4200}, 1),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes, rows", CASES)
@torch.inference_mode()
def test_logits_and_states_are_the_model_s(on_host, sizes, rows, kind):
    model = made(**sizes, kind=kind)
    ids = torch.randint(model.config.vocab_size, (rows,), generator=torch.Generator().manual_seed(2))
    state = state_of(model, rows)
    wanted, after = exactly(model, ids, state)
    found = torch.full((rows, model.config.vocab_size), torch.nan)
    steps = card_decoder(narrowed(model, kind))
    assert steps.kind == KINDS[kind]
    steps.step(ids, state, found)
    for one, other in zip((found, *parts(state)), (wanted, *parts(after)), strict=True):
        assert float((one - other).abs().max()) < 1e-5 * float(other.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("kind, tolerance", [("fp32", 1e-6), ("bf16", 1.5e-2)])
@pytest.mark.parametrize("sizes, rows", [({}, 9), ({"n_embd": 192, "d_decay": 3, "d_gate": 70, "ln0": False}, 2)])
@torch.inference_mode()
def test_many_rows_have_the_model_s_logits_and_states(on_host, sizes, rows, kind, tolerance):
    model = made(**sizes, kind=kind)
    ids = torch.randint(model.config.vocab_size, (rows,), generator=torch.Generator().manual_seed(2))
    state, logits = state_of(model, rows), torch.full((rows, model.config.vocab_size), torch.nan)
    wanted, after = exactly(model, ids, state)
    steps = card_decoder(narrowed(model, kind))
    (steps.step if rows > MOST else steps.many)(ids, state, logits)
    for one, other in zip((logits, *parts(state)), (wanted, *parts(after)), strict=True):
        assert float((one - other).norm() / other.norm()) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it_and_in_any_order_of_threads(on_host, kind):
    model = made(n_embd=1088, dim_ffn=4356, n_layer=2, vocab_size=1061, kind=kind)
    steps = CardDecoder(narrowed(model, kind))
    ids, state = torch.arange(8) % 37, state_of(model, 8)

    def stepped(rows):
        logits, mine = torch.full((len(ids[rows]), 1061), torch.nan), copied(state, rows)
        steps.step(ids[rows], mine, logits)
        return [logits, *parts(mine)]

    whole = stepped(slice(None))
    for rows in (slice(7, 8), slice(1, 3), slice(2, 5), slice(1, 8)):
        on_host.grid_order(rows.start % 3)
        assert all(torch.equal(one, other[rows]) for one, other in zip(stepped(rows), whole, strict=True))


@torch.inference_mode()
def test_more_rows_beside_int8_are_computed_a_few_at_a_time(on_host, monkeypatch):
    model, ids = made(kind="int8"), torch.arange(20) % 37
    state, logits = state_of(model, 20), torch.full((20, 37), torch.nan)
    wanted, after = exactly(model, ids, state)
    steps, ran, few = CardDecoder(narrowed(model, "int8")), [], CardDecoder.few
    monkeypatch.setattr(CardDecoder, "few", lambda self, ids, *more: ran.append(len(ids)) or few(self, ids, *more))
    alone, one = copied(state, slice(19, 20)), torch.full((1, 37), torch.nan)
    steps.step(ids, state, logits), steps.step(ids[19:], alone, one)
    assert ran == [8, 8, 4, 1]
    for found, other in zip((logits, *parts(state)), (wanted, *parts(after)), strict=True):
        assert float((found - other).abs().max()) < 1e-5 * float(other.abs().max().clamp(min=1.0))
    for found, other in zip((one, *parts(alone)), (logits, *parts(state)), strict=True):
        assert torch.equal(found, other[19:])


@torch.inference_mode()
def test_of_int8_a_step_of_many_rows_is_the_model_s_own(on_host, recording, monkeypatch, caplog):
    model = narrowed(made(), "int8")
    monkeypatch.setattr(gpu, "_said", set())
    with caplog.at_level("INFO", logger="rwkvpipe"):
        steps = Graphs(model)
    assert "writing token by token, up to 64 rows, by our kernels" in caplog.text
    assert steps.decoder.takes(64) and not steps.decoder.takes(96)
    few = mock.patch.object(steps.decoder, "few", side_effect=RuntimeError("not these"))
    with few as asked:
        found = steps.step(torch.arange(65) % 37, model.start(65))
    assert not asked.called
    torch.testing.assert_close(found, model(torch.arange(65)[:, None] % 37)[0][:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_nothing_is_written_beside_logits_states_and_room(on_host, guards, kind):
    model = made(kind=kind)
    steps, like = CardDecoder(narrowed(model, kind)), model.start(3)
    state = State(*([torch.empty_like(x).zero_() for x in each] for each in (like.att_x, like.wkv, like.ffn_x)))
    logits = torch.empty(3, 37)
    steps.step(torch.tensor([1, 2, 3]), state, logits)
    assert logits.isfinite().all()
    guards(11)


@torch.inference_mode()
def test_an_id_that_there_is_not_gives_no_numbers_to_its_row_alone(on_host):
    model = made()
    logits, state = torch.zeros(3, 37), state_of(model, 3)
    CardDecoder(model).step(torch.tensor([5, 37, -1]), state, logits)
    assert logits[0].isfinite().all() and logits[1:].isnan().all()
    assert all(part[0].isfinite().all() for part in parts(state))


def test_sizes_that_it_is_not_made_for_are_refused(on_host):
    model = made()
    halves = build(RwkvConfig(n_layer=3, n_embd=64, head_size=32, vocab_size=37)).start(1)
    for place, size, state in ((2, 2, halves), (3, 66, model.start(1))):  # two heads of 32; dim_ffn no multiple of 4
        odd = CardDecoder(model)
        odd.sizes = (*odd.sizes[:place], size, *odd.sizes[place + 1 :])
        with pytest.raises(RuntimeError, match="step7: CUDA error -1"):
            odd.few(torch.zeros(1, dtype=torch.long), state, torch.zeros(1, 37))
    with pytest.raises(RuntimeError, match="step7: CUDA error -1"):
        CardDecoder(model).few(torch.zeros(9, dtype=torch.long), model.start(9), torch.zeros(9, 37))
    mixed = CardDecoder(model)
    mixed.matrices[0] = mixed.matrices[0].bfloat16()
    with pytest.raises(TypeError, match="matrices is torch.bfloat16, which its sizes deny"):
        mixed.step(torch.zeros(1, dtype=torch.long), model.start(1), torch.zeros(1, 37))
    with pytest.raises(RuntimeError, match="recall7: CUDA error -1"):
        gpu.call("recall7", (1, 1, 2, 2, 2, 2, 1), torch.zeros(64).bfloat16(), *[torch.zeros(64)] * 3,
                 *[[torch.zeros(4)] * 4] * 2, [torch.zeros(64)] * 8, torch.zeros(4096), torch.zeros(64))  # fmt: skip


def adapted():
    model = made()
    inject(model, LoraConfig(rank=2))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.add_(0.1)
    return model.eval()


@torch.inference_mode()
def test_adapters_that_are_folded_into_their_matrices_are_in_it(on_host):
    model, ids = adapted(), torch.tensor([3, 1])
    wanted, _ = model(ids[:, None])
    assert card_decoder(model) is None
    with folded(model):
        logits = torch.zeros(2, 37)
        card_decoder(model).step(ids, model.start(2), logits)
    torch.testing.assert_close(logits, wanted[:, 0], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_weights_that_begin_at_odd_places_are_laid_down_anew(on_host):
    model, state = made(), state_of(made(), 2)
    ids, found = torch.tensor([3, 1]), [torch.zeros(2, 37), torch.zeros(2, 37)]
    CardDecoder(model).step(ids, copied(state), found[0])
    for x in model.parameters():
        x.data = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    assert any(x.data_ptr() % 16 for x in model.parameters())
    CardDecoder(model).step(ids, copied(state), found[1])
    assert torch.equal(*found)


def in_panels():
    model = made()
    keep(model, "int8")
    return model


OTHERS = {
    "heads": lambda: build(RwkvConfig(n_layer=2, n_embd=64, head_size=32, vocab_size=9)),
    "rwkv6": lambda: made(family="rwkv6"),
    "ffn": lambda: made(dim_ffn=90), "panels": in_panels, "adapters": adapted,
}  # fmt: skip


@pytest.mark.parametrize("which", OTHERS)
def test_other_models_go_their_own_way(on_host, which):
    assert card_decoder(OTHERS[which]()) is None


def test_without_a_card_s_kernels_there_is_none():
    assert card_decoder(made()) is None


@pytest.fixture
def recording(monkeypatch):
    """What is to be recorded is done at once, a few times before."""
    monkeypatch.setattr(graph, "recorded", lambda work, device, pool: [work() for _ in range(graph.WARM)] and work)


@pytest.mark.parametrize("family, rows", [("rwkv7", 3), ("rwkv7", 9), ("rwkv6", 3), ("rwkv5", 9)])
@torch.inference_mode()
def test_recorded_steps_take_it_and_write_states_where_they_lie(on_host, recording, monkeypatch, family, rows):
    model = made(family=family)
    steps, called, states = Graphs(model), [], []
    started, copied_ = gpu.call, torch.Tensor.copy_

    def call(function, *given):
        called.append(function)
        return started(function, *given)

    def copy(mine, found, *more):
        states.append(mine.shape) if mine.dim() == 4 else None
        return copied_(mine, found, *more)

    monkeypatch.setattr(gpu, "call", call)
    ids, state = torch.arange(rows * 4).view(rows, 4) % 37, model.start(rows)
    found = []
    for t in range(4):
        found.append(steps.step(ids[:, t], state).clone())
        monkeypatch.setattr(torch.Tensor, "copy_", copy)  # the first state is copied in
    monkeypatch.setattr(torch.Tensor, "copy_", copied_)
    assert not states and (("step7" if rows <= MOST else "recall7") in called) == (family == "rwkv7")
    wanted, after = model(ids)
    torch.testing.assert_close(torch.stack(found, 1), wanted, atol=2e-5, rtol=2e-5)
    for one, other in zip(parts(state), parts(after), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


def test_states_are_written_over_only_where_that_is_asked_for_and_nothing_is_learnt(on_host):
    inputs = [0.3 * torch.randn(2, 3, 2, 64) for _ in range(6)]
    start = torch.randn(2, 2, 64, 64)
    _, wanted = wkv7(*inputs, start)
    for over, learnt in ((False, False), (True, False), (True, True)):
        S = start.clone().requires_grad_(learnt)
        with torch.set_grad_enabled(learnt), gpu.over_states() if over else nullcontext():
            _, after = wkv7(*inputs, S)
        assert (after.data_ptr() == S.data_ptr()) == (over and not learnt)
        assert torch.equal(after, wanted) and (torch.equal(S, start) or (over and not learnt))


@torch.inference_mode()
def test_kernels_that_a_card_refuses_leave_the_model_s_own_step_and_a_line_says_so(
    on_host, recording, monkeypatch, caplog
):
    def refused(*given):
        raise RuntimeError("step7: CUDA error 701")

    model = made()
    steps = Graphs(model)
    monkeypatch.setattr(steps.decoder, "step", refused)
    found = steps.step(torch.tensor([3]), model.start(1))
    torch.testing.assert_close(found, model(torch.tensor([[3]]))[0][:, 0], atol=1e-5, rtol=1e-5)
    assert "kernels for a token are not used: step7: CUDA error 701" in caplog.text


def check_on_card(model, rows, kind, way, near):
    """A step on the card gives logits and states as in fp64."""
    ids, state = torch.arange(rows) * 5 % 37, state_of(model, rows)
    wanted, after = exactly(model, ids, state)
    mine = State(*([x.cuda() for x in each] for each in (state.att_x, state.wkv, state.ffn_x)))
    logits = torch.full((rows, model.config.vocab_size), torch.nan).cuda()
    steps = card_decoder(narrowed(model.cuda(), kind))
    getattr(steps, way)(ids.cuda(), mine, logits)
    for one, other in zip((logits, *parts(mine)), (wanted, *parts(after)), strict=True):
        assert near(one.cpu().double(), other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@torch.inference_mode()
def test_a_card_computes_few_rows_exactly(rows, kind):
    model = made(n_embd=128, dim_ffn=260, n_layer=2, vocab_size=1061, kind=kind)
    check_on_card(model, rows, kind, "few", lambda one, other: float((one - other).norm() / other.norm()) < 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("kind, tolerance", [("fp32", 1e-5), ("bf16", 2e-2)])
@torch.inference_mode()
def test_a_card_computes_many_rows(kind, tolerance):
    model = made(n_embd=128, n_layer=2, kind=kind)
    check_on_card(model, 9, kind, "many", lambda one, other: float((one - other).norm() / other.norm()) < tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_card_gives_the_same_bits_each_time_though_kernels_follow_each_other(kind):
    """What PyTorch writes just before is read, and what it reads just after is written."""
    model = made(n_embd=128, n_layer=4, kind=kind)
    given = State(*([x.cuda() for x in each] for each in vars(state_of(model, 2)).values()))
    state = copied(given)
    steps, ids = card_decoder(narrowed(model.cuda(), kind)), torch.tensor([3, 5]).cuda()
    logits, found = torch.zeros(2, 37).cuda(), []
    for _ in range(10):
        for mine, start in zip(parts(state), parts(given), strict=True):
            mine.copy_(start)
        steps.step(ids, state, logits.zero_())
        found.append([x.clone() for x in (logits, *parts(state))])
    assert all(torch.equal(one, other) for again in found[1:] for one, other in zip(again, found[0], strict=True))
    assert found[0][0].isfinite().all() and found[0][0].any()
