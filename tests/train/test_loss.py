"""Cross-entropy and L2Wrap at their edges."""

from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rwkvpipe.base.config import LoraConfig, RwkvConfig, TrainConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.data.batches import Batch
from rwkvpipe.model.family import build
from rwkvpipe.train import dist
from rwkvpipe.train.infctx import chunked_lm_losses
from rwkvpipe.train.loss import l2_wrap, lm_losses, masked_cross_entropy, mean_loss
from rwkvpipe.weights.lora import inject


class Table(torch.nn.Module):
    """Logits that depend on the present token alone."""

    def __init__(self, size=7):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))
        self.ln_out, self.head = torch.nn.Identity(), torch.nn.Linear(size, size, bias=False)
        self.head.weight = torch.nn.Parameter(torch.eye(size), requires_grad=False)
        self.config = SimpleNamespace(vocab_size=size)

    def features(self, ids, state=None, lengths=None, starts=None):
        return self.rows[ids], state

    def logits(self, features):
        return self.head(features)


def test_l2_wrap_is_that_of_rwkv_lm_ties_included(goldens):
    data = np.load(goldens / "rwkv/l2wrap.npz", allow_pickle=False)
    targets = torch.from_numpy(data["targets"])
    for pull, name in ((0.0, "grad_ce"), (1e-4, "grad_ce_l2wrap")):
        logits = torch.from_numpy(data["logits"]).requires_grad_()
        loss = masked_cross_entropy(logits, targets) + l2_wrap(logits, pull)
        loss.backward()
        assert loss.item() == pytest.approx(float(data["loss"]), abs=1e-12)
        np.testing.assert_allclose(logits.grad, data[name], atol=1e-12)


def test_the_mask_decides_and_nothing_masked_in_costs_nothing():
    logits = torch.randn(2, 3, 5)
    targets = torch.randint(0, 5, (2, 3))
    mask = torch.tensor([[1, 0, 0], [0, 1, 0]])
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    assert masked_cross_entropy(logits, targets, mask) == pytest.approx(float((each[0] + each[4]) / 2), abs=1e-6)
    assert masked_cross_entropy(logits, targets, mask * 0) == 0
    outside = torch.where(mask == 1, targets, -1)
    assert masked_cross_entropy(logits, outside) == masked_cross_entropy(logits, targets, mask)
    assert masked_cross_entropy(logits, outside, mask) == masked_cross_entropy(logits, targets, mask)


def weighed() -> tuple[torch.nn.Module, Batch]:
    """A small model in fp64, and rows of documents whose targets weigh differently; the last weigh nothing."""
    model = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=20)).double()
    model.initialise(0)
    stream = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 20, (4, 10), generator=stream)
    mask = torch.tensor([0.5, 0, 1, 8.25, 1e-3])[torch.randint(5, (4, 9), generator=stream)]
    mask[3] = 0
    return model, Batch(
        ids[:, :-1], ids[:, 1:].masked_fill(torch.arange(9) > torch.tensor([[9], [5], [7], [9]]), -1), mask
    )


def learned(model: torch.nn.Module, losses) -> list[torch.Tensor]:
    """The loss, then all gradients, of what `losses` yields."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for part in losses:
        part.backward()
        total = total + part.detach()
    return [total.double(), *(value.grad for value in model.parameters() if value.requires_grad)]


@pytest.mark.parametrize("way", ["whole", "rows", "processes", "chunks", "adapter", "halved"])
def test_weights_multiply_losses_and_their_sum_divides_them_however_the_step_is_cut(way):
    model, batch = weighed()
    if way == "adapter":
        inject(model, LoraConfig(rank=2, targets=("head", "att.key")), 0)
        model.double()
    config = TrainConfig(steps=1, l2_wrap=1e-2, **({"chunk": 4, "bptt": "full"} if way == "chunks" else {}))
    losses = chunked_lm_losses if way == "chunks" else lm_losses
    logits, real = model(batch.ids)[0], batch.targets >= 0
    each = -logits.log_softmax(-1).gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
    weights = batch.mask.double() * real
    square = (logits.max(-1).values * real).square().sum() * 1e-2 / (2 * real.sum())
    wanted = learned(model, [(each * weights).sum() / weights.sum() + square - square.detach()])
    if way == "halved":
        batch = replace(batch, mask=batch.mask / 2)
    ranks = [dist.Rank(n, 2, torch.device("cpu")) for n in (0, 1)] if way == "processes" else [dist.ALONE]
    found = learned(
        model, chain.from_iterable(losses(9 if way == "whole" else 2, config, r)(model, batch) for r in ranks)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7 if way == "adapter" else 1e-9, rtol=1e-6)


def test_the_held_out_loss_weighs_as_the_loss_does_in_chunks_too():
    model, batch = weighed()
    wanted = float(learned(model, lm_losses(9, TrainConfig(steps=1, l2_wrap=0))(model, batch))[0])
    for size, chunk in ((9, None), (1, None), (3, 4)):
        assert mean_loss(model, iter([batch]), size, "fp32", chunk) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("chunk", [None, 150])
def test_the_held_out_loss_holds_the_logits_of_some_positions_at_a_time(monkeypatch, chunk):
    model = Table()
    ids = torch.randint(0, 7, (3, 211), generator=torch.Generator().manual_seed(1))
    mask = torch.rand(3, 210, generator=torch.Generator().manual_seed(2))
    batch, held, real = Batch(ids[:, :-1], ids[:, 1:], mask), [], model.logits
    whole = mean_loss(model, iter([batch]), 3, "fp32", chunk)
    model.logits = lambda features: held.append(features[..., 0].numel()) or real(features)
    monkeypatch.setattr("rwkvpipe.kernel.loss.NUMBERS", 0)
    assert mean_loss(model, iter([batch]), 3, "fp32", chunk) == pytest.approx(whole, abs=1e-6)
    assert sum(held) == 630 and max(held) <= 64


def test_padding_on_the_right_changes_nothing():
    model, config = Table(), TrainConfig(steps=1)
    ids = torch.randint(0, 7, (3, 6))
    batch = Batch(ids[:, :-1], ids[:, 1:], None)
    padded = Batch(
        torch.nn.functional.pad(batch.ids, (0, 4)), torch.nn.functional.pad(batch.targets, (0, 4), value=-1), None
    )
    found = []
    for rows in (batch, padded):
        model.zero_grad()
        loss = sum(lm_losses(2, config)(model, rows))
        loss.backward()
        found.append((loss.item(), model.rows.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_the_held_out_loss_weighs_tokens_not_batches():
    model = Table().train()
    ids = torch.randint(0, 7, (1, 9))
    whole = mean_loss(model, iter([Batch(ids[:, :-1], ids[:, 1:], None)]), 2, "fp32")
    parts = [Batch(ids[:, :2], ids[:, 1:3], None), Batch(ids[:, 2:8], ids[:, 3:], None)]
    assert mean_loss(model, iter(parts), 2, "fp32") == pytest.approx(whole, abs=1e-6)
    assert model.training


def test_the_device_is_the_one_asked_for(monkeypatch, caplog):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    with caplog.at_level("INFO", logger="rwkvpipe"):
        assert dist.start() == dist.Rank(0, 1, torch.device("cpu"))
    assert "device cpu" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RWKVPIPE_DEVICE")
    assert dist.start().device.type == "cpu"
    for wanted in ("cuda", "tpu"):
        monkeypatch.setenv("RWKVPIPE_DEVICE", wanted)
        with pytest.raises(ConfigError, match=wanted):
            dist.start()
