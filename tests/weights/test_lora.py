"""Adapters sit where they should, change only what they should, and merge to the same model."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rwkvpipe.base.config import LoraConfig
from rwkvpipe.base.errors import ConfigError, WeightsError
from rwkvpipe.weights.kinds import LoraLinear, PissaLinear, scaling
from rwkvpipe.weights.lora import adapter, check_fits, disabled, folded, inject, load_adapter, merged, row_dropout

KINDS = ("lora", "pissa", "dora", "disha")


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.key = nn.Linear(8, 8, bias=False)
        self.value = nn.Linear(8, 8, bias=False)
        self.w0 = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return self.value(torch.tanh(self.key(x) + self.w0))


class Toy(nn.Module):
    """Paths like a model's: blocks.0.att.key, blocks.0.ffn.key and so on."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"att": Part(), "ffn": Part(), "ln1": nn.LayerNorm(8)})])
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x):
        block = self.blocks[0]
        return self.head(block["ffn"](block["ln1"](block["att"](x))))


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy()


def trained(model):
    """Move every trainable tensor away from its start."""
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.3)


def test_merging_is_exact_to_the_last_bit_that_counts(goldens):
    data = np.load(goldens / "tune/lora_merge.npz", allow_pickle=False)
    for case in sorted({k.split("/")[0] for k in data.files}):
        part = {k.split("/")[1]: data[k] for k in data.files if k.startswith(f"{case}/")}
        config = LoraConfig(rank=int(part["r"]), alpha=float(part["alpha"]), rslora=bool(part["use_rslora"]))
        assert scaling(config) == pytest.approx(float(part["scaling"]), rel=1e-12)
        pieces = {"m.lora_A": torch.from_numpy(part["A"]), "m.lora_B": torch.from_numpy(part["B"])}
        base = torch.from_numpy(part["W_bf16_bits"].view(np.int16)).view(torch.bfloat16)
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            found = merged({"m.weight": base.to(dtype)}, pieces, config)["m.weight"]
            bits, wanted = found.view(torch.int16).numpy().astype(int), part[f"merged_{name}_bits"].view(np.int16)
            assert np.abs(bits - wanted).max() <= 1
            assert (bits == wanted).mean() >= 0.999
        found = merged({"m.weight": base.float()}, pieces, config)["m.weight"]
        np.testing.assert_allclose(found, part["merged_fp32"], atol=1e-6)
        layer = nn.Linear(base.shape[1], base.shape[0], bias=False)
        layer.weight.data = base.float()
        wrapped = LoraLinear(layer, config, torch.Generator(), 0)
        wrapped.lora_A.data, wrapped.lora_B.data = pieces["m.lora_A"], pieces["m.lora_B"]
        x = torch.from_numpy(part["x"]).float()
        np.testing.assert_allclose(wrapped(x).detach(), part["y_adapter"], atol=2e-5)
        wrapped.active = False
        np.testing.assert_allclose(wrapped(x).detach(), part["y_disabled"], atol=2e-5)


def test_a_fresh_adapter_changes_nothing_and_its_start_is_bounded(toy):
    x = torch.randn(3, 8)
    before = toy(x)
    inject(toy, LoraConfig(rank=2, targets=("att.key",)), seed=5)
    assert torch.equal(toy(x), before)
    layer = toy.blocks[0]["att"].key
    assert layer.lora_B.abs().max() == 0
    assert 0 < layer.lora_A.abs().max() <= 1 / math.sqrt(8)
    other = Toy()
    inject(other, LoraConfig(rank=2, targets=("att.key",)), seed=5)
    assert torch.equal(other.blocks[0]["att"].key.lora_A, layer.lora_A)


def test_only_adapters_and_full_tensors_are_trained(toy):
    names = set(dict(toy.named_parameters()))
    inject(toy, LoraConfig(rank=2, targets=("key",), full=("ln1", "att.w0")))
    parts = {"blocks.0.att.key", "blocks.0.ffn.key"}
    pairs = {f"{p}.lora_{x}" for p in parts for x in "AB"}
    assert set(adapter(toy)) == pairs | {"blocks.0.ln1.weight", "blocks.0.ln1.bias", "blocks.0.att.w0"}
    assert set(dict(toy.named_parameters())) == names | pairs


def test_without_targets_every_matrix_of_the_blocks_has_an_adapter(toy):
    inject(toy, LoraConfig(rank=2))
    parts = ("att.key", "att.value", "ffn.key", "ffn.value")
    assert set(adapter(toy)) == {f"blocks.0.{part}.lora_{x}" for part in parts for x in "AB"}


@pytest.mark.parametrize("targets", [("ke",), ("att",), ("ffn",), ("w1",), ("key", "nothing")])
def test_a_target_that_fits_nothing_is_refused_naming_the_known(toy, targets):
    with pytest.raises(ConfigError, match="known: att.key, att.value, ffn.key, ffn.value, head"):
        inject(toy, LoraConfig(rank=2, targets=targets))


def test_a_full_tensor_must_exist_and_have_no_adapter(toy):
    with pytest.raises(ConfigError, match="lora.full: ln9 fits no tensor"):
        inject(toy, LoraConfig(rank=2, targets=("key",), full=("ln9",)))
    with pytest.raises(ConfigError, match="has an adapter"):
        inject(toy, LoraConfig(rank=2, targets=("key",), full=("att.key",)))


@pytest.mark.parametrize("changes", [{"kind": kind, "rank": rank} for kind in KINDS for rank in (1, 3, 4)])
def test_the_merged_model_is_the_model_with_its_adapter(changes):
    changes |= {"rslora": True, "alpha": 3.0} if changes["rank"] == 4 and changes["kind"] != "disha" else {}
    config = LoraConfig(**changes, targets=("key", "att.value"), full=("ln1", "w0"))
    model = Toy()
    base = {name: value.detach().clone() for name, value in model.state_dict().items()}
    inject(model, config)
    trained(model)
    x = torch.randn(4, 8)
    whole = merged(base, adapter(model), config)
    assert whole.keys() == base.keys()
    assert torch.equal(whole["head.weight"], base["head.weight"])
    plain = Toy()
    plain.load_state_dict(whole)
    torch.testing.assert_close(plain(x), model(x), atol=2e-6, rtol=0)
    with folded(model):
        torch.testing.assert_close(model(x), plain(x), atol=2e-6, rtol=0)
    again = Toy()
    again.load_state_dict(whole)  # trained, merged, and begun anew
    inject(again, config)
    torch.testing.assert_close(again(x), plain(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_disabled_or_folded_comes_back_whatever_happens(toy, kind):
    x = torch.randn(4, 8)
    start, base = toy(x).detach(), {name: value.clone() for name, value in toy.state_dict().items()}
    inject(toy, LoraConfig(kind=kind, rank=2, targets=("key",), full=("ln1",)))
    trained(toy)
    toy.train()
    after, kept = toy(x).detach(), {name: value.clone() for name, value in toy.state_dict().items()}
    for context in (disabled, folded):
        with pytest.raises(ZeroDivisionError), context(toy):
            if context is disabled:
                assert torch.equal(toy(x), start)
                assert all(torch.equal(value, toy.state_dict()[name]) for name, value in base.items())
            raise ZeroDivisionError
        assert toy.training
        assert torch.equal(toy(x), after)
        assert all(torch.equal(value, kept[name]) for name, value in toy.state_dict().items())


def test_a_stop_while_they_come_back_leaves_nothing_of_the_start_behind(toy, monkeypatch):
    inject(toy, LoraConfig(rank=2, targets=("key",), full=("ln1", "att.w0")))
    trained(toy)
    kept, real, calls = {name: value.clone() for name, value in toy.state_dict().items()}, nn.Module.get_parameter, []
    for at in range(12):
        calls.clear()

        def get(self, name, at=at):
            calls.append(name)
            if len(calls) == at + 1:
                raise KeyboardInterrupt
            return real(self, name)

        monkeypatch.setattr(nn.Module, "get_parameter", get)
        stopped = False
        try:
            with disabled(toy):
                pass
        except KeyboardInterrupt:
            stopped = True
        assert stopped == (at < 9)  # three tensors are read, replaced and put back
        assert all(torch.equal(value, kept[name]) for name, value in toy.state_dict().items()), at
        assert toy.blocks[0]["att"].key.active


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_begins_as_the_model_beneath_it(toy, kind):
    x = torch.randn(3, 8)
    before = toy(x)
    inject(toy, LoraConfig(kind=kind, rank=3), seed=1)
    assert torch.equal(toy(x), before)
    # as they come back from a file: the optimizer takes a weight and its moments by their places in memory
    assert all(value.is_contiguous() for value in toy.state_dict().values())
    toy(x).square().sum().backward()
    moved = {name for name, value in toy.named_parameters() if value.grad is not None and value.grad.any()}
    assert moved and all(name.rpartition(".")[2] in ("lora_A", "lora_B", "lora_m", "disha") for name in moved)
    assert {"lora": "lora_B", "pissa": "lora_A", "dora": "lora_m", "disha": "disha"}[kind] in {
        name.rpartition(".")[2] for name in moved
    }


def test_pissa_begins_with_the_best_part_of_a_rank(toy):
    weight = toy.blocks[0]["att"].key.weight.detach().clone()
    inject(toy, LoraConfig(kind="pissa", rank=3, alpha=12))
    layer = toy.blocks[0]["att"].key
    left, values, right = np.linalg.svd(weight.double().numpy())
    best = left[:, :3] * values[:3] @ right[:3]
    found = (4 * layer.lora_B @ layer.lora_A).detach()
    np.testing.assert_allclose(found, best, atol=1e-6)
    np.testing.assert_allclose((layer.lora_A @ layer.lora_A.T).diag().detach(), values[:3] / 4, rtol=1e-5)
    other = nn.Linear(90, 70, bias=False)
    pieces = [PissaLinear(other, LoraConfig(kind="pissa", rank=5, svd=svd), torch.Generator(), 0) for svd in (None, 16)]
    exact, near = ((piece.lora_B @ piece.lora_A).detach() for piece in pieces)
    assert not torch.equal(exact, near)
    torch.testing.assert_close(near, exact, atol=2e-3, rtol=0)


def test_dora_is_the_formula_of_its_paper_and_its_length_counts_as_constant(toy):
    with torch.no_grad():
        toy.blocks[0]["ffn"].key.weight[3] = 0
    inject(toy, LoraConfig(kind="dora", rank=2, alpha=6, targets=("key",)))
    empty = toy.blocks[0]["ffn"].key
    assert empty.lora_m[3] == 0
    with torch.no_grad():
        empty.lora_B.fill_(0.5)  # a row of zeros is not stuck
        torch.testing.assert_close(empty(empty.lora_A)[:, 3], 3 * 0.5 * (empty.lora_A @ empty.lora_A.T).sum(1))
    trained(toy)
    layer, x = toy.blocks[0]["att"].key, torch.randn(5, 8)
    rows = layer.weight + 3 * layer.lora_B @ layer.lora_A
    wanted = F.linear(x, layer.lora_m[:, None] * rows / rows.norm(dim=1, keepdim=True).detach())
    torch.testing.assert_close(layer(x), wanted)
    parts = [layer.lora_A, layer.lora_B, layer.lora_m]
    for got, plain in zip(
        torch.autograd.grad(layer(x).sin().sum(), parts), torch.autograd.grad(wanted.sin().sum(), parts), strict=True
    ):
        torch.testing.assert_close(got, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rank", [2, 3, 8])
def test_disha_adds_rows_that_repeat_along_the_input(toy, rank):
    inject(toy, LoraConfig(kind="disha", rank=rank, targets=("att.key",)))
    trained(toy)
    layer, x = toy.blocks[0]["att"].key, torch.randn(2, 3, 8)
    wanted = layer.weight.clone()
    for column in range(8):
        wanted[:, column] += layer.disha[column % rank]
    torch.testing.assert_close(layer(x), F.linear(x, wanted))


@pytest.mark.parametrize("kind, rank", [("pissa", 9), ("disha", 9)])
def test_a_rank_that_no_matrix_has_is_refused(toy, kind, rank):
    with pytest.raises(ConfigError, match="lora.rank: 9 is too much for blocks.0.att.key, which has 8"):
        inject(toy, LoraConfig(kind=kind, rank=rank))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_another_model_is_refused(toy, kind):
    config = LoraConfig(kind=kind, rank=2, targets=("key",), full=("ln1",))
    base, plain = dict(toy.state_dict()), Toy()
    inject(toy, config)
    tensors = adapter(toy)
    load_adapter(toy, tensors)
    check_fits(plain, tensors, config)
    name = "blocks.0.att.key"
    part = {"disha": "disha"}.get(kind, "lora_A")
    for broken in (
        {k: v for k, v in tensors.items() if k != f"{name}.{part}"},
        tensors | {f"blocks.7.att.key.{p}": v for p in ("lora_A", "lora_B") for v in [torch.ones(2, 8)]},
        tensors | {f"{name}.{part}": torch.ones(2, 9)},
        tensors | {"blocks.0.att.zzz": torch.ones(3)},
        {k: v for k, v in tensors.items() if not k.startswith("blocks.0.ffn.key")},
        {k: v for k, v in tensors.items() if ".ln1." not in k},
    ):
        with pytest.raises(WeightsError):
            load_adapter(toy, broken)
        with pytest.raises(WeightsError):
            check_fits(plain, broken, config)
        if tensors.keys() <= broken.keys():  # what a whole matrix lacks only the model tells
            with pytest.raises(WeightsError):
                merged(base, broken, config)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_depends_on_the_row_and_the_step_and_not_on_the_micro_batch(toy, kind):
    inject(toy, LoraConfig(kind=kind, rank=2, targets=("key",), dropout=0.5))
    trained(toy)
    toy.train()
    x = torch.randn(4, 3, 8)

    def run(sizes):
        torch.manual_seed(11)
        parts, first = [], 0
        for size in sizes:
            with row_dropout(toy, first):
                parts.append(toy(x[first : first + size]).detach())
            first += size
        return torch.cat(parts)

    whole = run([4])
    torch.testing.assert_close(run([1, 1, 2]), whole)
    torch.manual_seed(12)
    with row_dropout(toy, 0):
        assert not torch.allclose(toy(x), whole)
    toy.eval()
    assert not torch.allclose(toy(x), whole)
