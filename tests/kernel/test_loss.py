"""The head and its loss in one against logits, cross-entropy and L2Wrap one after the other."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpipe.kernel import build, loss
from rwkvpipe.kernel.loss import head_loss


def plainly(x, weight, wanted):
    """All logits at once, in fp64."""
    logits = x @ weight.mT
    losses = torch.nn.functional.cross_entropy(logits, wanted.chosen.clamp(min=-1), ignore_index=-1, reduction="none")
    losses = (losses if wanted.weights is None else losses * wanted.weights).sum()
    square = (logits.max(-1).values * wanted.real).square().sum() * wanted.pull / 2
    return losses * wanted.scale + square - square.detach()


def results(form, x, weight, wanted):
    x, weight = (y.detach().clone().requires_grad_() for y in (x, weight))
    found = form(x, weight, wanted)
    found.backward()
    return found.detach(), x.grad, weight.grad


def in_pytorch(*inputs):
    with mock.patch.object(build, "native", lambda *inputs: None):
        return results(head_loss, *inputs)


@pytest.mark.parametrize("form", [lambda *inputs: results(head_loss, *inputs), in_pytorch])
@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 150), D=st.integers(1, 40), V=st.integers(2, 90), seed=st.integers(0, 99), weighed=st.booleans()
)
def test_value_and_gradients_are_those_of_all_logits_at_once(drawn, form, n, D, V, seed, weighed):
    x, weight, wanted = drawn(n, D, V, seed)
    if weighed:
        wanted = replace(wanted, weights=2 * torch.rand(n, generator=torch.Generator().manual_seed(seed)))
    with mock.patch.multiple(loss, NUMBERS=1, FEWEST=64):
        found = form(x, weight, wanted)
    for one, other in zip(found, results(plainly, x.double(), weight.double(), wanted), strict=True):
        assert float((one.double() - other).abs().max()) <= 3e-6 * max(1.0, float(other.abs().max()))


def test_any_number_of_threads_gives_the_same_bits(drawn, at_any_thread_count):
    x, weight, wanted = drawn(150, 24, 70, 1)
    logits = x @ weight.mT
    at_any_thread_count(lambda: [loss._gradients(logits.clone(), wanted, slice(0, 150))])


def test_the_gradient_of_a_part_of_a_sum_is_scaled_with_it(drawn):
    x, weight, wanted = drawn(9, 5, 7, 3)
    one = results(head_loss, x, weight, wanted)
    other = results(lambda *inputs: 3 * head_loss(*inputs), x, weight, wanted)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_what_is_no_number_is_a_loss_that_is_none(drawn):
    x, weight, wanted = drawn(9, 5, 40, 3)
    x[4, 2] = torch.nan
    wanted.chosen[4] = 1
    assert head_loss(x, weight, wanted).isnan()
