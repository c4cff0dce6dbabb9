"""Rows read in chunks give what whole rows give."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rwkvpipe.base.config import LoraConfig, RwkvConfig, StageConfig, TrainConfig
from rwkvpipe.data.batches import Batch
from rwkvpipe.model.family import build, detect
from rwkvpipe.train import infctx
from rwkvpipe.train.dist import ALONE
from rwkvpipe.train.infctx import chunked_lm_losses
from rwkvpipe.train.loop import _gradient
from rwkvpipe.train.loss import lm_losses, mean_loss
from rwkvpipe.train.stop import Stops
from rwkvpipe.weights.lora import inject


def config(**changes) -> TrainConfig:
    return TrainConfig(steps=1, **changes)


def gradients(model, losses, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for part in losses(model, batch):
        if part.requires_grad:
            part.backward()
        total += part.item()
    return total, {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.fixture
def golden(goldens):
    data = np.load(goldens / "tune/tiny_rwkv7.npz", allow_pickle=False)
    tensors = {name: torch.from_numpy(data[name]) for name in data.files if not name.startswith("__")}
    model = build(detect(tensors))
    model.load_state_dict({name: value for name, value in tensors.items() if name in model.state_dict()})
    return model, np.load(goldens / "tune/model_infctx.npz", allow_pickle=False)


@pytest.mark.parametrize("chunk", [16, 32])
@pytest.mark.parametrize("bptt", ["truncated", "full"])
def test_loss_and_gradients_are_met(golden, chunk, bptt):
    model, data = golden
    ids, labels = torch.from_numpy(data["input_ids"]), torch.from_numpy(data["labels"])
    batch = Batch(ids[:, :-1], ids[:, 1:], (labels[:, 1:] >= 0).float())
    loss, grads = gradients(model, chunked_lm_losses(1, config(l2_wrap=0, chunk=chunk, bptt=bptt)), batch)
    case = f"chunk{chunk}_{bptt}"
    assert loss == pytest.approx(float(data[f"{case}/loss"]), abs=1e-5)
    assert loss == pytest.approx(float(data["whole/loss"]), abs=1e-5)
    checked = 0
    for key in (key for key in data.files if key.startswith(case)):
        _, kind, name = [*key.split("/", 2), ""][:3]
        if kind == "grad":
            np.testing.assert_allclose(grads[name].flatten(), data[key], atol=1e-4 * np.abs(data[key]).max())
        elif kind == "gradnorm":
            assert grads[name].norm().item() == pytest.approx(float(data[key]), rel=1e-4), name
            checked += 1
    assert checked == 8


def small(family: str, **changes) -> torch.nn.Module:
    sizes = RwkvConfig(family=family, n_layer=2, n_embd=32, head_size=16, vocab_size=20, **changes)
    model = build(sizes)
    model.initialise(1)
    with torch.no_grad():
        for number, value in enumerate(model.parameters()):  # initial zeros hide whole paths
            value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
    return model


def ragged() -> Batch:
    """Rows of 23, 5 and 14 tokens; the masks leave whole chunks without a target, and others with half of one."""
    stream = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (3, 24), generator=stream)
    targets, mask = ids[:, 1:].clone(), torch.zeros(3, 23)
    mask[0, 17:20], mask[1, 1:5], mask[2, 12] = 1, 0.5, 3
    for row, length in enumerate((23, 5, 14)):
        targets[row, length:] = -1
    return Batch(ids[:, :-1], targets, mask)


@pytest.mark.parametrize("l2_wrap", [0.0, 1e-2])
@pytest.mark.parametrize(
    ("family", "changes"), [("rwkv5", {}), ("rwkv6", {"time_state": True}), ("rwkv7", {"time_state": True})]
)
def test_the_full_gradient_of_ragged_rows_is_that_of_whole_rows(family, changes, l2_wrap):
    model, batch = small(family, **changes), ragged()
    loss, wanted = gradients(model, lm_losses(3, config(l2_wrap=l2_wrap)), batch)
    for chunk, micro_batch in ((1, 3), (4, 1), (4, 2), (7, 3), (23, 2), (40, 1)):
        asked = config(l2_wrap=l2_wrap, chunk=chunk, bptt="full")
        found, grads = gradients(model, chunked_lm_losses(micro_batch, asked), batch)
        assert found == pytest.approx(loss, abs=1e-5)
        assert grads.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(grads[name], value, atol=1e-5, rtol=1e-4, msg=f"{name}, chunk {chunk}")


@pytest.mark.parametrize("bptt", ["truncated", "full"])
def test_the_factor_of_fp16_is_in_the_gradient_once_however_many_chunks_it_comes_through(bptt):
    found = {}
    for factor in (1.0, 1024.0):
        model = small("rwkv7")
        losses = chunked_lm_losses(3, config(chunk=4, bptt=bptt))(model, ragged())
        loss, _ = _gradient(model, losses, 1e9, ALONE, Stops(), factor)
        found[factor] = loss, {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    assert found[1.0][0] == found[1024.0][0] and found[1.0][1].keys() == found[1024.0][1].keys()
    for name, value in found[1.0][1].items():
        assert torch.equal(found[1024.0][1][name], value), name


def test_truncation_leaves_the_loss_and_changes_the_gradient():
    model, batch = small("rwkv7"), ragged()
    loss, whole = gradients(model, lm_losses(3, config(l2_wrap=0)), batch)
    for micro_batch in (1, 3):
        found, cut = gradients(model, chunked_lm_losses(micro_batch, config(l2_wrap=0, chunk=4)), batch)
        assert found == pytest.approx(loss, abs=1e-5)
        assert not torch.allclose(cut["emb.weight"], whole["emb.weight"], rtol=1e-2)
    one, same = gradients(model, chunked_lm_losses(1, config(l2_wrap=0, chunk=23)), batch)
    torch.testing.assert_close(same["emb.weight"], whole["emb.weight"], atol=1e-6, rtol=1e-4)


def test_a_batch_without_targets_yields_nothing():
    batch = ragged()
    empty = Batch(batch.ids, batch.targets, batch.mask * 0)
    for bptt in ("truncated", "full"):
        assert not list(chunked_lm_losses(2, config(l2_wrap=0, chunk=4, bptt=bptt))(small("rwkv7"), empty))


def test_the_held_out_loss_is_that_of_whole_rows():
    model, batch = small("rwkv7"), ragged()
    whole = mean_loss(model, iter([batch]), 2, "fp32")
    assert mean_loss(model, iter([batch]), 2, "fp32", 5) == pytest.approx(whole, abs=1e-5)


def test_both_readings_of_a_chunk_drop_the_same_and_chunks_differ():
    model, batch = small("rwkv7"), ragged()
    inject(model, LoraConfig(rank=2, dropout=0.5), 0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("lora_B"):
                value += 0.1
    model.train()
    results = []
    for micro_batch in (1, 3):
        torch.manual_seed(3)
        results.append(gradients(model, chunked_lm_losses(micro_batch, config(chunk=4, bptt="full")), batch))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bptt", ["truncated", "full"])
def test_what_backward_keeps_does_not_grow_with_the_row(bptt):
    model, most = small("rwkv7"), []
    for length in (64, 320):
        ids = torch.randint(0, 20, (1, length + 1), generator=torch.Generator().manual_seed(0))
        held = [0]

        def keep(value, held=held):
            held[0] += value.numel()
            return value

        largest = 0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            for part in chunked_lm_losses(1, config(chunk=16, bptt=bptt))(model, Batch(ids[:, :-1], ids[:, 1:])):
                part.backward()
                largest, held[0] = max(largest, held[0]), 0
        most.append(largest)
    assert most[1] <= 1.01 * most[0]


@pytest.mark.parametrize("kept", [1, 2, 3, 7])
def test_states_that_are_found_once_more_give_the_same_gradient_to_the_last_bit(monkeypatch, kept):
    model, batch, most = small("rwkv7"), ragged(), []
    asked, real = config(chunk=4, bptt="full"), infctx._states
    loss, wanted = gradients(model, chunked_lm_losses(3, asked), batch)

    def states(*given):
        most.append(real(*given))
        return most[-1]

    monkeypatch.setattr(infctx, "_states", states)
    monkeypatch.setattr(infctx, "KEPT", kept)
    again, found = gradients(model, chunked_lm_losses(3, asked), batch)
    assert loss == again and all(torch.equal(found[name], value) for name, value in wanted.items())
    assert len(most) == {1: 2, 2: 3, 3: 4, 7: 7}[kept]  # once for the borders, once a stretch; 6 chunks


def test_states_before_chunks_keep_nothing_else_in_memory(monkeypatch):
    model, batch, real, seen = small("rwkv7"), ragged(), infctx._read, []

    def read(model, part, state, step, counts):
        if state is not None and torch.is_grad_enabled():
            seen.extend(value.untyped_storage().nbytes() - value.nbytes for value in infctx._flat(state))
        return real(model, part, state, step, counts)

    monkeypatch.setattr(infctx, "_read", read)
    gradients(model, chunked_lm_losses(3, config(chunk=4, bptt="full")), batch)
    assert seen and not any(seen)


def test_settings_that_could_do_nothing_are_refused():
    with pytest.raises(ValidationError, match="give chunk"):
        TrainConfig(steps=1, bptt="full")
    with pytest.raises(ValidationError, match=r"train\.chunk belongs"):
        StageConfig(name="a", kind="grpo", data="b", start="c", train={"steps": 1, "chunk": 8})
