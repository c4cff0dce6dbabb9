"""Matrices in fewer bits: one rounding for all that is computed, and less memory."""

import weakref

import pytest
import torch

from rwkvpipe.base.config import LoraConfig, RwkvConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.infer import packed
from rwkvpipe.infer.decode import decoder
from rwkvpipe.infer.engine import Engine
from rwkvpipe.infer.packed import keep
from rwkvpipe.kernel import build as native
from rwkvpipe.kernel.panels import WIDE, pack, rows, unpack
from rwkvpipe.model.family import build
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.weights.lora import inject

FAMILIES = ["rwkv5", "rwkv6", "rwkv7"]
KINDS = {"fp32": 4, "bf16": 2, "int8": 1}  # bytes of a number
if native.extension() is None:  # then fp32 stays where it is
    del KINDS["fp32"]
WITHIN = {"fp32": 2e-5, "bf16": 2e-5, "int8": 5e-4}  # with int8 native code rounds what matrices read, too


def made(family="rwkv7", **sizes):
    sizes = {"n_layer": 2, "n_embd": 64, "head_size": 32, "vocab_size": 257} | sizes
    model = build(RwkvConfig(family=family, **sizes))
    stream = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.initialise(1)
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=stream) * 0.1)
    return model.eval()


def size_of(tensors) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_and_what_is_written_see_the_same_numbers(family, kind):
    model, ids = made(family), torch.randint(257, (3, 9), generator=torch.Generator().manual_seed(5))
    keep(model, kind)
    with torch.inference_mode():
        wanted, after = model(ids)
        state, found = model.start(3), []
        step = decoder(model)
        assert (step is None) == (native.extension() is None)
        for t in range(9):
            if step:
                found.append(step.step(ids[:, t], state))
            else:
                logits, state = model(ids[:, t : t + 1], state)
                found.append(logits[:, 0])
    assert torch.allclose(torch.stack(found, 1), wanted, atol=WITHIN[kind] * float(wanted.abs().max()), rtol=0)
    assert torch.allclose(state.wkv[1], after.wkv[1], atol=WITHIN[kind] * float(after.wkv[1].abs().max()), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_computes_with_the_rounded_matrices(family, kind):
    model, other = made(family), made(family)
    ids = torch.randint(257, (2, 7), generator=torch.Generator().manual_seed(5))
    keep(model, kind)
    with torch.no_grad():
        for name, value in other.named_parameters():
            layer = name.removesuffix(".weight")
            if layer in model.packed:
                rounded = unpack(model.packed[layer])
                value.copy_(rounded.mT if packed.LOW.fullmatch(layer) else rounded)
        wanted, whole = other(ids)[0], made(family)(ids)[0]
        assert torch.allclose(model(ids)[0], wanted, atol=WITHIN[kind] * float(wanted.abs().max()), rtol=0)
        assert kind == "fp32" or not torch.allclose(model(ids)[0], whole, atol=1e-3 * float(whole.abs().max()), rtol=0)


@pytest.mark.parametrize(("kind", "size"), KINDS.items())
def test_no_copy_in_fp32_stays(kind, size):
    model = made(n_embd=128, dim_ffn=512)
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    large, whole = sum(x.numel() for x in matrices), size_of(model.parameters())
    matrices = [weakref.ref(x) for x in matrices]
    engine = Engine(model, ByteTokenizer(1), 2, kind=kind)
    assert not any(one() is not None for one in matrices)
    slots = engine.slots(2)
    low = size_of(x for name, kept in model.packed.items() if packed.LOW.fullmatch(name) for x in kept[:2])
    large_ones = [kept for name, kept in model.packed.items() if not packed.LOW.fullmatch(name)]
    filled = sum((kept.out + -kept.out % WIDE) * kept.width for kept in large_ones)  # up to whole panels
    beside = sum(4 * kept.out for kept in large_ones if kind == "int8")
    held = size_of(model.parameters()) + size_of(x for kept in model.packed.values() for x in kept[:2])
    if large_ones[0].kind == "twelve":
        assert held <= whole - 4 * large + low + 1.55 * filled
    else:
        assert held == whole - 4 * large + low + size * filled + beside
    if slots.decoder:  # reads the same memory
        known = {x.data_ptr() for x in model.parameters()} | {x[0].data_ptr() for x in model.packed.values()}
        known |= {x.scale.data_ptr() for x in model.packed.values() if x.scale is not None}
        assert size_of(x for x in slots.decoder.kept if x.data_ptr() not in known) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_rounded_with_their_matrices(kind):
    model = made()
    inject(model, LoraConfig(rank=4))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.requires_grad:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    whole = packed.matrix(model.blocks[0].att.key)
    keep(model.eval(), kind)
    assert torch.equal(model.packed["blocks.0.att.key"].data, pack(whole, kind).data)
    assert len(model.packed) == 2 * 6 + 1 + 14


def test_matrices_in_other_bits_are_not_rounded_again():
    model = made()
    keep(model, "int8"), keep(model, "int8")
    Engine(model, ByteTokenizer(1), 1)
    with pytest.raises(ConfigError, match="kept in int8 already"):
        Engine(model, ByteTokenizer(1), 1, kind="bf16")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_card_s_products_open_matrices_in_int8(monkeypatch, family):
    network, plain = made(family), made(family)
    keep(plain, "int8")
    monkeypatch.setattr(packed, "on_card", lambda weight: True)
    monkeypatch.setattr(packed, "PART", 5 * 64)
    keep(network, "int8")
    assert isinstance(network.head, packed.Bytes) and set(network.packed) == set(filter(packed.LOW.match, plain.packed))
    assert torch.equal(network.head.data, rows(plain.packed["head"]))
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(3))
    opened = unpack(plain.packed["blocks.1.ffn.key"])
    torch.testing.assert_close(network.blocks[1].ffn.key(x), x @ opened.mT, atol=1e-5, rtol=1e-5)


def test_a_card_multiplies_matrices_in_bf16_as_they_are(monkeypatch):
    network, plain = made(), made()
    monkeypatch.setattr(packed, "on_card", lambda weight: True)
    keep(network, "bf16")
    assert isinstance(network.head, packed.Narrow) and network.head.data.dtype == torch.bfloat16
    ids = torch.arange(12).view(2, 6)
    with torch.inference_mode():
        found, wanted = network(ids)[0], plain(ids)[0]
    assert found.dtype == torch.float32
    assert 1e-5 < float((found - wanted).norm() / wanted.norm()) < 3e-2


@pytest.mark.skipif(native.extension() is None, reason="no native kernels here")
def test_a_line_says_what_matrices_lie_in(caplog, monkeypatch):
    monkeypatch.setattr(native, "_said", set())
    model = made(n_embd=128)
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.bfloat16())
    keep(model, "fp32")
    with caplog.at_level("INFO", "rwkvpipe"):
        decoder(model)
    closer = {"twelve": "bf16 in twelve bits a number"}.get(kind := model.packed["head"].kind, kind)
    count = sum(kept.kind == "fp32" for kept in model.packed.values())
    assert f"writing token by token, matrices in fp32 ({count}) and {closer} (1), native on cpu" in caplog.text
