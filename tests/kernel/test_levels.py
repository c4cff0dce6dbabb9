"""What is compiled for lesser vector units than those of this machine gives the same numbers here."""

import pytest
import torch

from rwkvpipe.base.config import RwkvConfig, SamplingConfig
from rwkvpipe.infer.decode import Decoder
from rwkvpipe.infer.draw import Asked, weights
from rwkvpipe.infer.packed import keep
from rwkvpipe.infer.sampling import chances
from rwkvpipe.kernel import build, product
from rwkvpipe.kernel.loss import Wanted, head_loss
from rwkvpipe.kernel.panels import pack, times
from rwkvpipe.model.family import build as model_of

needs_native = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")
WIDTHS = list(build.levels())
LESSER = WIDTHS[WIDTHS.index(build.level()) :]
WITHIN = {"fp32": 2e-5, "bf16": 2e-5, "int8": 5e-4}  # with int8 native code rounds what matrices read, too


@pytest.fixture(params=LESSER)
def level(request, monkeypatch):
    """The native code of a level, in the place of this machine's own."""
    path, said = build.compiled(request.param)
    library = build.opened(path)
    monkeypatch.setattr(build, "_loaded", lambda: (library, said))
    return request.param


def made(family):
    model = model_of(RwkvConfig(family=family, vocab_size=53, n_layer=2, n_embd=40, head_size=20, dim_ffn=70))
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(0.15 * torch.randn(tensor.shape, generator=stream) + ("ln" in name))
    return model


def step(model, ids):
    """Logits, memories, and gradients of both; and a loss with its own."""
    features, state = model.features(ids)
    count = features.shape[0] * features.shape[1]
    wanted = Wanted(ids.flatten(), torch.ones(count), 1 / count, 0.1)
    loss = head_loss(features.flatten(0, 1), model.head.weight, wanted)
    logits = model.logits(features)
    parts = (loss, logits.square().mean(), *(memory.square().mean() for memory in state.wkv))
    found = torch.autograd.grad(sum(parts), list(model.parameters()), allow_unused=True)
    found = [loss, logits, *state.wkv, *(x for x in found if x is not None)]
    return [x.detach() for x in found]


@needs_native
@pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
def test_a_step_of_training_is_that_of_pytorch_in_fp64(level, family, monkeypatch):
    monkeypatch.setattr(product, "SPREAD", 0)  # all products are native
    monkeypatch.setattr(product, "_chosen", ["own"])
    model, ids = made(family), torch.arange(74).view(2, 37) * 7 % 53
    found = step(model, ids)
    for one, other in zip(found, step(model.double(), ids), strict=True):
        assert float((one - other).abs().max()) <= 3e-5 * max(1e-3, float(other.abs().max()))


@needs_native
@pytest.mark.parametrize("turned", [False, True])
def test_whole_numbers_are_rounded_and_multiplied_alike(level, turned, monkeypatch):
    monkeypatch.setattr(product, "SPREAD", 0)
    draw = torch.Generator().manual_seed(0)
    x, matrix = torch.randn(70, 515, generator=draw), torch.randn(515, 90, generator=draw)
    x[:, :3], matrix[:5] = 0.0, 1e-38
    found = product.Products(whole=True).mm(*((each.mT.contiguous().mT if turned else each) for each in (x, matrix)))
    wanted = product.evened(x.double(), -1) @ product.evened(matrix.double(), 0)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


@needs_native
@pytest.mark.parametrize("turned", [False, True])
def test_numbers_are_rounded_to_bf16_alike(level, turned):
    draw = torch.Generator().manual_seed(0)
    x, matrix = torch.randn(70, 515, generator=draw), torch.randn(515, 90, generator=draw)
    given = [each.mT.contiguous().mT if turned else each for each in (x, matrix)]
    found = product.Products(torch.bfloat16, own=True).mm(*given)
    wanted = x.bfloat16().double() @ matrix.bfloat16().double()
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@needs_native
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
def test_a_token_of_every_row_is_that_of_the_models_forward(level, kind, rows, family):
    model = made(family).eval()
    if kind != "fp32":
        keep(model, kind)
    with torch.inference_mode():
        state, native, decoder = model.start(rows), model.start(rows), Decoder(model, kind)
        for n in range(5):
            ids = (torch.arange(rows) * 5 + n) % 53
            logits, state = model(ids[:, None], state)
            found = decoder.step(ids, native)
            assert float((found - logits[:, -1]).abs().max()) <= WITHIN[kind] * float(logits.abs().max())


@needs_native
@pytest.mark.parametrize("order", ["hf", "rwkv"])
def test_chances_have_the_bits_of_pytorchs(level, order):
    logits = 4 * torch.randn(3, 777, generator=torch.Generator().manual_seed(1))
    counts = (logits > 2).float()
    for cuts in ({}, {"top_p": 0.9}, {"top_k": 40}, {"top_k": 9, "top_p": 0.7}):
        config = SamplingConfig(order=order, temperature=0.8, repetition_penalty=1.3, frequency=0.3, **cuts)
        assert torch.equal(weights(Asked(logits, logits, counts=counts), config), chances(logits, config, counts))


@needs_native
def test_products_of_int8_have_the_same_bits_at_all_levels_with_such_vectors(monkeypatch):
    """Whole numbers are added exactly; without a product with a sum in one, a middle one is rounded otherwise."""
    draw, found = torch.Generator().manual_seed(0), {}
    kept, x = pack(torch.randn(70, 1301, generator=draw), "int8"), torch.randn(33, 1301, generator=draw)
    for which in LESSER:
        library = build.opened(build.compiled(which)[0])
        monkeypatch.setattr(build, "_loaded", lambda library=library: (library, ""))
        found[which] = times(x, kept)
    fused = [value for which, value in found.items() if which != "DEFAULT"] or list(found.values())
    assert all(torch.equal(value, fused[0]) for value in fused)
    for value in found.values():
        torch.testing.assert_close(value, fused[0], rtol=1e-5, atol=2e-3)
