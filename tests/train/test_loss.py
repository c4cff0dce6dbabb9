"""Cross-entropy and L2Wrap at their edges."""

import numpy as np
import pytest
import torch

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.data.batches import Batch
from rwkvpipe.train import dist
from rwkvpipe.train.loss import l2_wrap, lm_losses, masked_cross_entropy, mean_loss


class Table(torch.nn.Module):
    """Logits that depend on the present token alone."""

    def __init__(self, size=7):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))
        self.ln_out, self.head = torch.nn.Identity(), torch.nn.Linear(size, size, bias=False)
        self.head.weight = torch.nn.Parameter(torch.eye(size), requires_grad=False)

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
