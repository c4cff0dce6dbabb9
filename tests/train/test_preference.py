"""DPO is its formula, whatever the micro batch, the padding and the way the start is kept."""

import pytest
import torch

from rwkvpipe.base.config import DpoConfig, RwkvConfig
from rwkvpipe.model.family import build
from rwkvpipe.train.preference import Pairs, answer_logprobs, preference_loss, tokens

SUMS = torch.tensor([-3.0, -5.0, -2.0, -1.5]).double()
START = torch.tensor([-3.5, -4.0, -2.5, -2.0]).double()
LENGTHS = torch.tensor([2, 4, 1, 3])


@pytest.mark.parametrize("beta, smoothing", [(0.1, 0.0), (0.7, 0.2)])
def test_the_loss_and_its_gradient_are_those_of_the_paper(beta, smoothing):
    new = SUMS.clone().requires_grad_()
    loss, told = preference_loss(new, START, LENGTHS, DpoConfig(beta=beta, smoothing=smoothing))
    right = [0.5 - -1.0, 0.5 - 0.5]
    for found, h in zip(loss.tolist(), right, strict=True):
        s = 1 / (1 + torch.tensor(-beta * h).exp().item())
        assert found == pytest.approx(
            -(1 - smoothing) * torch.tensor(s).log().item() - smoothing * torch.tensor(1 - s).log().item(), rel=1e-6
        )
    loss.sum().backward()
    for pair, h in enumerate(right):
        s = 1 / (1 + torch.tensor(-beta * h).exp().item())
        slope = beta * (smoothing * s - (1 - smoothing) * (1 - s))
        assert new.grad[2 * pair].item() == pytest.approx(slope, rel=1e-6)
        assert new.grad[2 * pair + 1].item() == pytest.approx(-slope, rel=1e-6)
    assert told["margin"].tolist() == pytest.approx([beta * 1.5, 0.0])
    assert told["chosen"].tolist() == pytest.approx([beta * 0.5, beta * 0.5])
    assert told["accuracy"].tolist() == [1.0, 0.0]


def test_ipo_draws_the_mean_difference_towards_a_distance():
    loss, _ = preference_loss(SUMS, START, LENGTHS, DpoConfig(beta=0.5, loss="ipo"))
    apart = [0.5 / 2 - -1.0 / 4, 0.5 / 1 - 0.5 / 3]
    assert loss.tolist() == pytest.approx([(h - 1) ** 2 for h in apart])


@pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
def test_answers_are_weighed_as_each_would_be_alone(family):
    model = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=40, family=family))
    model.initialise(0)
    ids = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 9)
    mask[0, 4:9], mask[1, 2:5] = 1, 1
    ids[1, 5:] = 0
    found = answer_logprobs(model, Pairs(ids, mask), "fp32")
    for row, (first, end) in enumerate([(4, 9), (2, 5)]):
        logits = model(ids[row : row + 1, :end])[0].log_softmax(-1)[0]
        wanted = logits[torch.arange(first - 1, end - 1), ids[row, first:end]]
        torch.testing.assert_close(found[row][mask[row, 1:] != 0], wanted, atol=1e-5, rtol=1e-5)
        assert not found[row][mask[row, 1:] == 0].any()
    assert tokens(Pairs(ids, mask)) == 14
