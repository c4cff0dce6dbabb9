"""Matrices in few bits are what their formats say, train adapters as opened ones would, and are merged into nothing."""

import hashlib

import pytest
import torch

from rwkvpipe.base.config import LoraConfig, RwkvConfig
from rwkvpipe.kernel.product import linear
from rwkvpipe.model.family import build
from rwkvpipe.train.precision import arithmetic
from rwkvpipe.train.stage import write_adapter
from rwkvpipe.weights.lora import adapter, disabled, folded, inject, load_adapter, merged
from rwkvpipe.weights.rounded import BLOCK, LEVELS, in_few_bits, numbers, product, rounded
from rwkvpipe.weights.speaker import load_speaker
from rwkvpipe.weights.store import mark, write_tensors

KINDS = ("lora", "pissa", "dora", "disha")


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(seed=0, width=32, **lora):
    found = build(RwkvConfig(n_layer=2, n_embd=width, head_size=16, vocab_size=20))
    found.initialise(seed)
    with torch.no_grad():
        for number, value in enumerate(found.parameters()):
            value += 0.05 * drawn(*value.shape, seed=number)
    base = {name: value.detach().clone() for name, value in found.state_dict().items()}
    if lora:
        inject(found, LoraConfig(**{"rank": 2} | lora))
    return found, base


def moved(found):
    with torch.no_grad():
        for number, value in enumerate(value for value in found.parameters() if value.requires_grad):
            value += 0.1 * drawn(*value.shape, seed=100 + number)
    return found


@pytest.mark.parametrize("shape", [(5, 64), (7, 30), (1, 1), (64, 3)])
def test_nf4_is_the_nearest_of_its_levels_in_blocks_of_64(shape):
    matrix = drawn(*shape) * torch.logspace(-3, 3, shape[0])[:, None]
    found, numbers = rounded(matrix, "nf4").open(), matrix.flatten()
    for first in range(0, len(numbers), BLOCK):
        block = numbers[first : first + BLOCK]
        most = block.abs().max()
        nearest = torch.tensor([min(LEVELS, key=lambda level, x=x: abs(level - float(x))) for x in block / most])
        torch.testing.assert_close(found.flatten()[first : first + BLOCK], nearest * most)


def wave():
    n = torch.arange(600, dtype=torch.float64)
    return ((n * 0.7368).sin() * (n % 64 + 1)).float().view(3, 200)


def test_nf4_has_the_bytes_of_bitsandbytes():
    data = rounded(wave(), "nf4").data[:300].numpy().tobytes()  # as quantize_4bit of version 0.50.2 gives them
    assert hashlib.sha256(data).hexdigest()[:16] == "8114d13a1b7fd75c"


def test_nf4_is_opened_as_bitsandbytes_opens_it():
    theirs = pytest.importorskip("bitsandbytes.functional", reason="the library is not installed")
    for matrix in (wave(), drawn(64, 128), drawn(30, 34) * torch.logspace(-3, 2, 30)[:, None]):
        data, state = theirs.quantize_4bit(matrix, blocksize=BLOCK, quant_type="nf4")
        own = rounded(matrix, "nf4")
        assert torch.equal(data.flatten(), own.data[: data.numel()]) and torch.equal(state.absmax, own.scale)
        assert torch.equal(theirs.dequantize_4bit(data, state), own.open())


def test_bf16_keeps_every_bit_of_weights_that_were_released_so():
    matrix = drawn(6, 40).bfloat16().float()
    assert torch.equal(rounded(matrix, "bf16").open(), matrix)


def test_int8_keeps_each_row_to_half_a_step_of_its_largest_number():
    matrix = drawn(6, 40) * torch.logspace(-3, 3, 6)[:, None]
    matrix[3] = 0
    error = (rounded(matrix, "int8").open() - matrix).abs()
    assert (error <= 0.5001 * matrix.abs().amax(1, keepdim=True) / 127).all() and error.max() > 0


@pytest.mark.parametrize(("kind", "bytes_each"), [("bf16", 2), ("int8", 1.02), ("nf4", 0.57)])
def test_few_bits_are_few_bytes(kind, bytes_each):
    assert rounded(drawn(256, 256), kind).nbytes <= bytes_each * 256 * 256


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["bf16", "int8", "nf4"])
def test_products_and_gradients_are_those_of_the_opened_matrix(kind, precision):
    matrix, found = rounded(drawn(12, 20), kind), []
    for open_matrix in (True, False):
        x = drawn(3, 4, 20, seed=1).requires_grad_()
        with arithmetic(precision, torch.device("cpu")):
            y = linear(x, matrix.open().mT) if open_matrix else product(x, matrix)
        y.backward(drawn(3, 4, 12, seed=2).to(y.dtype))
        found.append((y.detach(), x.grad))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=1e-6 if precision == "fp32" else 1e-2, rtol=1e-5)


@pytest.mark.parametrize("quantise", ["int8", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_sees_the_rounded_matrices_and_is_merged_into_those_that_were_given(tmp_path, kind, quantise):
    found, base = model(kind=kind, quantise=quantise, full=["ln_x"])
    plain, _ = model(kind=kind, full=["ln_x"])
    assert numbers(found) == numbers(plain) == sum(value.numel() for value in plain.parameters())
    for name, value in adapter(plain).items():  # it begins as without
        assert torch.equal(adapter(found)[name], value)
    moved(found)
    opened, _ = model(kind=kind, full=["ln_x"])
    load_adapter(opened, adapter(found))
    with torch.no_grad():
        for layer, rough in zip(opened.modules(), found.modules(), strict=True):
            if getattr(rough, "rounded", None) is not None:
                layer.weight.copy_(rough.rounded.open())
    ids = torch.arange(9)[None]
    for context in (disabled, folded):
        with torch.no_grad(), context(found), context(opened):
            torch.testing.assert_close(found(ids)[0], opened(ids)[0], atol=1e-5, rtol=1e-5)
    found(ids)[0].sum().backward()
    opened(ids)[0].sum().backward()
    for name, value in opened.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(found.get_parameter(name).grad, value.grad, atol=1e-4, rtol=1e-3, msg=name)
    whole, _ = model()
    whole.load_state_dict(merged(base, adapter(found), LoraConfig(kind=kind, rank=2, full=["ln_x"])))
    write_tensors(tmp_path / "base.safetensors", base)
    asked = LoraConfig(kind=kind, rank=2, full=["ln_x"], quantise=quantise)
    write_adapter(tmp_path / "adapter.safetensors", found, asked, base=mark(tmp_path / "base.safetensors"))
    beside = load_speaker(tmp_path / "base.safetensors", tmp_path / "adapter.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(beside(ids)[0], whole(ids)[0], atol=1e-4, rtol=1e-4)


def test_no_opened_matrix_is_kept_for_the_backward():
    found, _ = model(width=48, kind="lora", quantise="nf4")
    shapes = {tuple(matrix.shape) for matrix in in_few_bits(found)}
    kept = []

    def keep(value):
        kept.append(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        found.features(torch.arange(9)[None])
    assert kept and not shapes & set(kept)


def test_few_bits_move_with_the_model():
    found, _ = model(kind="lora", quantise="int8")
    layer = next(layer for layer in found.modules() if getattr(layer, "rounded", None))
    found.to("meta")
    assert layer.rounded.data.device.type == "meta" and layer.rounded.scale.device.type == "meta"
