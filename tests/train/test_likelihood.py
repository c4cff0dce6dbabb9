"""What GRPO and DPO look up is that of all logits at once, in values and gradients, and holds few of them at a time."""

import pytest
import torch

from rwkvpipe.base.config import DpoConfig, LoraConfig, RolloutConfig, RwkvConfig, SamplingConfig
from rwkvpipe.kernel import loss as kernel_loss
from rwkvpipe.model.family import build
from rwkvpipe.train.likelihood import likelihood
from rwkvpipe.train.policy import Rollout, Share, completion_logprobs, grpo_losses, policy_loss
from rwkvpipe.train.preference import Pairs, answer_logprobs, preference_loss
from rwkvpipe.weights.lora import inject

ROWS, LONGEST, AT_ONCE = 4, 30, 7
T = 0.8


@pytest.fixture
def few(monkeypatch):
    """Few logits at once."""
    monkeypatch.setattr(kernel_loss, "FEWEST", AT_ONCE)
    monkeypatch.setattr(kernel_loss, "NUMBERS", 1)


def network(adapted):
    model = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=50)).double()
    model.initialise(0)
    if adapted:
        inject(model, LoraConfig(rank=2, targets=("att.key", "head"), full=("ln_out",)))
        model.double()
    stream = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=stream, dtype=torch.float64))
    return model


def texts():
    stream = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (ROWS, LONGEST), generator=stream)
    first, lengths = torch.tensor([3, 9, 5, 1]), torch.tensor([20, 12, 0, 29])
    places = torch.arange(int(lengths.max()))
    mask = (places < lengths[:, None]).float()
    mask[0, 4] = 0.0  # a loss mask may leave holes
    return ids, first, mask


def met(model, plain, found):
    """Value and gradients of two scalars."""
    both = []
    for make in (plain, found):
        model.zero_grad()
        value = make()
        value.backward()
        grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
        both.append((value.item(), grads))
    (wanted, slopes), (value, grads) = both
    assert value == pytest.approx(wanted, abs=1e-12) and grads.keys() == slopes.keys()
    assert max(float(grad.abs().max()) for grad in grads.values()) > 1e-3
    for name, grad in grads.items():
        torch.testing.assert_close(grad, slopes[name], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("bonus", [0.0, 0.3])
def test_a_policy_step_is_that_of_all_logits_at_once(few, bonus, adapted):
    model, (ids, first, mask) = network(adapted), texts()
    stream = torch.Generator().manual_seed(3)
    gains = torch.randn(ROWS, generator=stream, dtype=torch.float64)
    old = -3 + 0.3 * torch.randn(mask.shape, generator=stream, dtype=torch.float64)
    rollout = Rollout(ids, first, mask, gains, old)
    config = RolloutConfig(entropy=bonus, epsilon=5.0, sampling=SamplingConfig(temperature=T))

    def plain():
        logits = model(ids[:, :-1])[0] / T  # (R, T - 1, V)
        new, sure = torch.zeros_like(old), torch.zeros_like(old)
        for row in range(ROWS):
            for place in range(mask.shape[1]):
                if mask[row, place]:
                    at = int(first[row]) + place
                    chances = logits[row, at - 1].log_softmax(-1)
                    new[row, place] = chances[ids[row, at]]
                    sure[row, place] = -(chances.exp() * chances).sum()
        share = Share(ROWS, float(mask.sum()), 64, float(mask.sum()))
        return policy_loss(new, rollout, config, share=share, entropy=sure if bonus else None)[0]

    for micro_batch in (1, 3):
        met(model, plain, lambda micro_batch=micro_batch: sum(grpo_losses(config, micro_batch)(model, rollout)))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_preference_step_is_that_of_all_logits_at_once(few, adapted):
    model, ids = network(adapted), texts()[0]
    whole = torch.zeros(ROWS, LONGEST)
    whole[:, 1:] = (torch.rand(ROWS, LONGEST - 1, generator=torch.Generator().manual_seed(4)) < 0.7).float()
    pairs, old = Pairs(ids, whole), torch.linspace(-90, -60, ROWS).double()

    def loss(new):
        return preference_loss(new.sum(1), old, whole.sum(1), DpoConfig(beta=0.02))[0].sum()

    def plain():
        chances = model(ids[:, :-1])[0].log_softmax(-1)
        return loss(chances.gather(-1, ids[:, 1:, None]).squeeze(-1) * whole[:, 1:])

    met(model, plain, lambda: loss(answer_logprobs(model, pairs, "fp32")))


@pytest.mark.parametrize("adapted", [False, True])
def test_few_logits_are_made_at_a_time_and_none_are_kept_for_the_backward(few, monkeypatch, adapted):
    model, (ids, first, mask) = network(adapted), texts()
    made, kept, count = [], [], int(mask.sum())
    plain = torch.Tensor.logsumexp
    monkeypatch.setattr(
        torch.Tensor, "logsumexp", lambda *given, **more: (made.append(len(given[0])), plain(*given, **more))[1]
    )
    rollout = Rollout(ids, first, mask, torch.zeros(ROWS), torch.zeros_like(mask))
    with torch.autograd.graph.saved_tensors_hooks(lambda value: (kept.append(value), value)[1], lambda value: value):
        found = completion_logprobs(model, rollout, T, told=[])
    assert max(made) == AT_ONCE and sum(made) == count
    weights = {value.data_ptr() for value in model.parameters()}
    assert kept and not any(value.shape[-1:] == (50,) and value.data_ptr() not in weights for value in kept)
    found.sum().backward()
    assert max(made) == AT_ONCE and sum(made) == 2 * count
    made.clear()
    with torch.no_grad():
        completion_logprobs(model, rollout, T)
    assert max(made) == AT_ONCE and sum(made) == count


@pytest.mark.parametrize("uncertain", [False, True])
def test_rounded_inputs_move_what_is_found_by_what_they_round(few, uncertain):
    """Whatever tokens weigh: a gradient as small as that of one token in millions is rounded no worse."""
    model, (ids, first, mask) = network(False).float(), texts()
    rollout, found = Rollout(ids, first, mask, torch.zeros(ROWS), torch.zeros_like(mask)), {}
    for precision in ("fp32", "bf16"):
        for weight in (1.0, 1e-9):
            model.zero_grad()
            told = []
            values = completion_logprobs(model, rollout, T, precision, told if uncertain else None)
            (weight * (values.sum() + (told[0].sum() if uncertain else 0))).backward()
            found[precision, weight] = values.detach(), model.head.weight.grad / weight
    for weight in (1.0, 1e-9):
        for wanted, value in zip(found["fp32", weight], found["bf16", weight], strict=True):
            apart = float((value - wanted).norm() / wanted.norm())
            assert 1e-5 < apart < 0.03
    torch.testing.assert_close(found["bf16", 1e-9][1], found["bf16", 1.0][1], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_entropies_alone_have_a_gradient_where_equal_rewards_leave_the_tokens_none(few, precision):
    model, ids, found = network(False).float(), texts()[0], {}
    features = model.features(ids[:, :-1])[0].detach().flatten(0, 1).requires_grad_()
    for kind in ("fp32", precision):
        model.zero_grad()
        values, entropy = likelihood(
            model, features, ids[:, 1:].flatten(), temperature=T, precision=kind, uncertain=True
        )
        (0 * values.sum() + entropy.sum()).backward()
        found[kind] = model.head.weight.grad.clone()
    assert torch.isfinite(found[precision]).all()
    assert float((found[precision] - found["fp32"]).norm() / found["fp32"].norm()) < 0.03


def test_rows_in_which_nothing_counts_make_a_pass_of_no_gradient(few):
    model, (ids, first, mask) = network(False), texts()
    idle = Rollout(ids, first, mask, torch.ones(ROWS), torch.zeros_like(mask)).part(slice(2, 2))
    found = completion_logprobs(model, idle, T)
    found.sum().backward()
    assert not found.any() and model.head.weight.grad is not None and not model.head.weight.grad.any()
