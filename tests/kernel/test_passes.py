"""What surrounds the recurrence on a card, built for the host: values and gradients are PyTorch's."""

from unittest import mock

import pytest
import torch

from rwkvpipe.kernel import build, gpu, passes
from rwkvpipe.kernel.blend import mix, squared_relu


def learnt(function, inputs):
    """Values, and gradients of a random mixture."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    found = function(*inputs)
    stream = torch.Generator().manual_seed(1)
    total = sum((y.double() * torch.randn(y.shape, generator=stream, dtype=torch.float64)).sum() for y in found)
    return [*(y.detach() for y in found), *torch.autograd.grad(total, inputs)]


def in_torch(function, inputs):
    """The same by PyTorch, in fp64."""
    with mock.patch.object(passes, "fit", lambda *x: False), mock.patch.object(build, "native", lambda *x: None):
        return learnt(function, [x.double() for x in inputs])


def mixed(x, last, *shares):
    return mix(x, last, shares)


@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
@pytest.mark.parametrize("B, T, D, count", [(1, 1, 3, 1), (3, 5, 300, 6), (2, 70, 7, 2), (1, 64, 20, 5), (4, 32, 9, 4)])
def test_mixes_and_their_gradients_are_pytorch_s(on_host, B, T, D, count, kind, tolerance):
    stream = torch.Generator().manual_seed(T)
    shapes = [(B, T, D), (B, D), *[(1, 1, D)] * count]
    inputs = [torch.randn(shape, generator=stream).to(kind) for shape in shapes]
    assert passes.fit(*inputs)
    for found, wanted in zip(learnt(mixed, inputs), in_torch(mixed, inputs), strict=True):
        assert found.dtype == kind
        assert float((found.double() - wanted).abs().max()) < tolerance * float(wanted.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("count", [1, 2047, 2049])
def test_squares_and_their_gradients_are_pytorch_s(on_host, count, kind, tolerance):
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(kind)
    for found, wanted in zip(learnt(lambda x: [squared_relu(x)], [x]), in_torch(lambda x: [squared_relu(x)], [x]),
                             strict=True):  # fmt: skip
        assert float((found.double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def test_the_order_in_which_threads_run_changes_nothing(on_host):
    x, last, share = torch.randn(2, 40, 30), torch.randn(2, 30), torch.randn(1, 1, 30)
    found = []
    for way in (0, 1, 2):
        on_host.grid_order(way)
        found.append(learnt(mixed, [x, last, share]))
    assert all(torch.equal(one, two) for other in found[1:] for one, two in zip(found[0], other, strict=True))


def test_what_is_of_several_kinds_or_empty_is_left_to_pytorch(on_host):
    x, last, share = torch.randn(2, 4, 8), torch.randn(2, 8), torch.randn(1, 1, 8)
    assert not passes.fit(x, share.bfloat16()) and not passes.fit(x.double()) and not passes.fit(x[:, :0])
    (found,) = mix(x.bfloat16(), last, [share])
    assert found.shape == x.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
def test_a_card_mixes_and_squares_as_pytorch_does(kind, tolerance):
    shapes = [(3, 70, 300), (3, 300), *[(1, 1, 300)] * 6]
    inputs = [torch.randn(shape).to(kind) for shape in shapes]
    given = [x.cuda() for x in inputs]
    assert passes.fit(*given), gpu.at_hand(given[0].device)[1]
    for function, count in ((mixed, len(inputs)), (lambda x: [squared_relu(x)], 1)):
        for found, wanted in zip(
            learnt_on_card(function, given[:count]), in_torch(function, inputs[:count]), strict=True
        ):
            assert float((found.cpu().double() - wanted).abs().max()) < tolerance * float(
                wanted.abs().max().clamp(min=1.0)
            )


def learnt_on_card(function, inputs):
    """As `learnt`, with the same mixture."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    found = function(*inputs)
    stream = torch.Generator().manual_seed(1)
    pulls = [torch.randn(y.shape, generator=stream, dtype=torch.float64).to(y) for y in found]
    return [*(y.detach() for y in found), *torch.autograd.grad(found, inputs, pulls)]
