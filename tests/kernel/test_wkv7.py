"""The RWKV-7 operator against reference numbers, and its two forms against each other."""

import numpy as np
import pytest
import torch

from rwkvpipe.kernel.wkv7 import wkv7, wkv7_reference

NAMES = ("r", "w", "k", "v", "a", "b", "s0")
CASES = ("typical", "t1", "t16", "t17n64", "extreme_decay", "repeat_key", "unclamped")


def made(B, T, H, N, dtype=torch.float64, seed=0, w=None):
    """Inputs as a model makes them, and a state."""
    stream = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=stream, dtype=torch.float64)

    kk = torch.nn.functional.normalize(draw(B, T, H, N), dim=-1)
    decay = -torch.nn.functional.softplus(draw(B, T, H, N)) - 0.5 if w is None else torch.full((B, T, H, N), w).double()
    rate = torch.rand(B, T, H, N, generator=stream, dtype=torch.float64)
    found = (draw(B, T, H, N), decay, draw(B, T, H, N), draw(B, T, H, N), -kk, kk * rate, draw(B, H, N, N))
    return [x.to(dtype).requires_grad_() for x in found]


def results(operator, inputs, seed=1):
    """y, the last state and all gradients of a random mixture of both."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y, S = operator(*inputs)
    stream = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=stream, dtype=torch.float64).to(x.dtype) for x in (y, S)]
    (y * weights[0]).sum().add((S * weights[1]).sum()).backward()
    return [y, S, *(x.grad for x in inputs)]


def error(found, wanted, least=1e-9):
    """Largest difference, as a share of the largest wanted value (of `least`, where that is smaller)."""
    found, wanted = found.detach().double(), torch.as_tensor(wanted).detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=least))


@pytest.mark.parametrize("operator", [wkv7_reference, wkv7])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_reference_numbers(goldens, case, dtype, tolerance, operator):
    golden = np.load(goldens / "rwkv" / "op_wkv7.npz")
    inputs = [torch.tensor(golden[f"{case}/in/{name}"]).to(dtype).requires_grad_() for name in NAMES]
    y, S = operator(*inputs)
    pulls = [torch.tensor(golden[f"{case}/in/{name}"]) for name in ("gy", "gsT")]
    (y * pulls[0]).sum().add((S * pulls[1]).sum()).backward()
    assert error(y, golden[f"{case}/out/y"]) < tolerance
    assert error(S, golden[f"{case}/out/sT"]) < tolerance
    for name, x in zip(NAMES, inputs, strict=True):
        assert error(x.grad, golden[f"{case}/grad/{name}"]) < tolerance, name


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33, 131])
def test_chunks_of_any_length_equal_the_loop(T):
    inputs = made(2, T, 3, 8, seed=T)
    for found, wanted in zip(results(wkv7, inputs), results(wkv7_reference, inputs), strict=True):
        assert error(found, wanted) < 1e-12


@pytest.mark.parametrize("w", [-30.0, 1.5, 3.0, 3.6, 20.0])
def test_decays_from_none_to_complete_are_exact_and_finite(w):
    inputs = made(1, 21, 2, 8, torch.float32, w=w)
    exact = [x.detach().double() for x in inputs]
    for found, wanted in zip(results(wkv7, inputs), results(wkv7_reference, exact), strict=True):
        # where all is forgotten the gradient of w is 0, found as a difference of numbers of the size of the others
        assert error(found, wanted.nan_to_num(), least=5.0) < 2e-5


def test_decays_of_one_chunk_may_differ_as_far_as_they_like():
    inputs = made(1, 40, 1, 8, torch.float32)
    with torch.no_grad():
        inputs[1][:, ::3] = 3.3
        inputs[1][:, 1::5] = -20.0
    for found, wanted in zip(results(wkv7, inputs), results(wkv7_reference, inputs), strict=True):
        assert error(found, wanted) < 2e-5


def test_a_row_in_pieces_with_its_state_is_the_row_in_one():
    inputs = made(2, 37, 2, 8)
    whole, last = wkv7(*inputs)
    S, parts = inputs[-1], []
    for first, end in ((0, 1), (1, 18), (18, 18), (18, 37)):
        y, S = wkv7(*(x[:, first:end] for x in inputs[:-1]), S)
        parts.append(y)
    assert error(torch.cat(parts, 1), whole) < 1e-12
    assert error(S, last) < 1e-12


def test_a_single_token_without_gradients_is_the_same():
    inputs = [x.detach() for x in made(2, 1, 2, 8)]
    for found, wanted in zip(wkv7(*inputs), wkv7_reference(*inputs), strict=True):
        assert error(found, wanted) < 1e-13


def test_padding_leaves_the_state_as_it_was():
    r, w, k, v, a, b, S = (x.detach() for x in made(1, 20, 2, 8))
    w[:, 7:] = -torch.inf
    k[:, 7:] = b[:, 7:] = 0
    _, padded = wkv7(r, w, k, v, a, b, S)
    _, wanted = wkv7(*(x[:, :7] for x in (r, w, k, v, a, b)), S)
    assert error(padded, wanted) < 1e-13


def test_half_precision_goes_in_and_out_while_the_state_stays_wide():
    inputs = [x.detach().bfloat16() for x in made(1, 9, 2, 8)[:-1]]
    y, S = wkv7(*inputs)
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert error(S, wkv7_reference(*(x.double() for x in inputs))[1]) < 1e-5


def test_a_state_of_other_sizes_is_refused():
    inputs = made(2, 3, 2, 8)
    with pytest.raises(ValueError, match="state is"):
        wkv7(*inputs[:-1], inputs[-1][:1])
