"""Rounded arithmetic stays near fp32 and keeps all that trains in it; blocks computed again give the same bits."""

import pytest
import torch

from rwkvpipe import sft
from rwkvpipe.base.config import LoraConfig, RwkvConfig, Settings, TrainConfig
from rwkvpipe.base.errors import ConfigError, PipeError
from rwkvpipe.base.files import write_json
from rwkvpipe.data.batches import Batch
from rwkvpipe.kernel.loss import Wanted, head_loss
from rwkvpipe.model.family import build
from rwkvpipe.train import checkpoint, precision
from rwkvpipe.train.infctx import chunked_lm_losses
from rwkvpipe.train.likelihood import _Asked, _Likelihood
from rwkvpipe.train.loop import Run, fit
from rwkvpipe.train.loss import lm_losses
from rwkvpipe.train.precision import Scaler, arithmetic, check_precision
from rwkvpipe.weights import store
from rwkvpipe.weights.lora import inject

CPU = torch.device("cpu")


def small(family="rwkv7", seed=1) -> torch.nn.Module:
    model = build(RwkvConfig(family=family, n_layer=2, n_embd=32, head_size=16, vocab_size=20))
    model.initialise(seed)
    with torch.no_grad():
        for number, value in enumerate(model.parameters()):  # initial zeros hide whole paths
            value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
    return model


def batch(step: int) -> Batch:
    ids = (torch.arange(4)[:, None] * 3 + torch.arange(14) * (step % 3 + 1)) % 20
    mask = (torch.rand(4, 13, generator=torch.Generator().manual_seed(step)) < 0.7).float()
    return Batch(ids[:, :-1], ids[:, 1:], mask)


def train(folder, model, *, save_every=100, stop=None, **changes):
    """A short training; with `stop` it breaks off before that step, as a crash would."""
    config = TrainConfig(**{"steps": 16, "warmup": 2, "lr": 0.01, "log_every": 1} | changes)

    def batches(first, carried):
        for step in range(first, config.steps):
            if step == stop:
                raise OSError("crash")
            yield batch(step)

    return fit(model, batches, lm_losses(2, config), config=config, run=Run(folder, "mark", save_every, 7)).rows()


@pytest.fixture
def overflowing(monkeypatch):
    """fp16 begins with a factor that no gradient survives."""
    monkeypatch.setattr(Scaler, "of", classmethod(lambda cls, precision: cls(2.0**24 if precision == "fp16" else 1.0)))


@pytest.mark.slow
@pytest.mark.parametrize("narrow", ["bf16", "fp16"])
def test_training_comes_down_as_in_fp32_with_weights_and_moments_in_fp32(tmp_path, narrow):
    ends = {}
    for name in ("fp32", narrow):
        model = small()
        ends[name] = [row["loss"] for row in train(tmp_path / name, model, precision=name)]
        assert {value.dtype for value in model.parameters()} == {torch.float32}
    found = checkpoint.latest(tmp_path / narrow, "mark")
    assert {value.dtype for name, value in found.tensors.items()} == {torch.float32}
    assert ends[narrow] != ends["fp32"] and ends["fp32"][-1] < 0.7 * ends["fp32"][0]
    assert ends[narrow][:8] == pytest.approx(ends["fp32"][:8], rel=0.01)
    assert ends[narrow] == pytest.approx(ends["fp32"], abs=0.1)


def test_a_step_that_overflows_is_made_again_with_half_the_factor_and_none_is_lost(tmp_path, overflowing):
    losses = [row["loss"] for row in train(tmp_path / "a", small(), precision="fp16", steps=8)]
    notes = checkpoint.latest(tmp_path / "a", "mark").notes
    assert 1 < notes["scaler"]["size"] < 2.0**24 and notes["scaler"]["calm"] > 0 and len(losses) == 8
    plain = [row["loss"] for row in train(tmp_path / "b", small(), steps=8)]
    assert losses == pytest.approx(plain, rel=0.05)


def test_fp16_goes_on_with_the_same_bits_and_the_same_factor(tmp_path, overflowing, monkeypatch):
    monkeypatch.setattr(precision, "CALM", 3)
    whole = small()
    rows = train(tmp_path / "whole", whole, precision="fp16", steps=8)
    with pytest.raises(OSError, match="crash"):
        train(tmp_path / "cut", small(), precision="fp16", steps=8, save_every=2, stop=5)
    again = small(seed=2)
    assert [row["loss"] for row in train(tmp_path / "cut", again, precision="fp16", steps=8)] == [
        row["loss"] for row in rows
    ]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    ends = [checkpoint.latest(tmp_path / name, "mark").notes["scaler"] for name in ("whole", "cut")]
    assert ends[0] == ends[1]


def test_a_number_that_no_factor_makes_finite_stops_before_the_weights(tmp_path):
    model = small()
    before = [value.detach().clone() for value in model.parameters()]
    with torch.no_grad():
        model.head.weight[0, 0] = before[-1][0, 0] = torch.inf
    with pytest.raises(PipeError, match="step 1: the loss is"):
        train(tmp_path, model, precision="fp16")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("pull", [0.0, 1e-2])
@pytest.mark.parametrize("narrow", ["bf16", "fp16"])
def test_the_loss_of_rounded_logits_is_that_of_all_logits_at_once(narrow, pull):
    stream = torch.Generator().manual_seed(0)
    x, weight = torch.randn(70, 16, generator=stream), 0.3 * torch.randn(33, 16, generator=stream)
    chosen = torch.randint(-1, 33, (70,), generator=stream)
    wanted = Wanted(chosen, chosen >= 0, 1e-7, pull * 1e-7)  # a step of ten million targets
    found = []
    for dtype in (None, precision.NARROW[narrow]):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with arithmetic("fp32" if dtype is None else narrow, CPU):
            loss = head_loss(a, b, Wanted(*vars(wanted).values()) if dtype is None else precise(wanted, dtype))
        loss.backward()
        found.append((loss.detach(), a.grad, b.grad))
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() <= 0.02 * exact.norm()


def test_a_sum_over_positions_that_fp16_does_not_hold_is_a_gradient_all_the_same():
    stream = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2048, 16, generator=stream), 0.05 * torch.randn(64, 16, generator=stream)
    x[:, 3] += 120  # as channels are that stand out
    chosen = torch.randint(64, (2048,), generator=stream)
    chosen[::2] = 32  # a space
    found = []
    for dtype in (None, torch.float16):
        weight.requires_grad_().grad = None
        head_loss(x, weight, Wanted(chosen, chosen >= 0, 1 / 2048, 0.0, dtype)).backward()
        found.append(weight.grad)
        weight.grad = None
        _Likelihood.apply(x, weight, chosen, _Asked(1.0, dtype, False))[0].sum().backward()
        found.append(weight.grad)
    for exact, rounded in zip(found[:2], found[2:], strict=True):
        assert (rounded - exact).norm() <= 0.005 * exact.norm()


def precise(wanted: Wanted, dtype: torch.dtype) -> Wanted:
    return Wanted(wanted.chosen, wanted.real, wanted.scale, wanted.pull, dtype)


@pytest.mark.parametrize(("asked", "line"), [("fp16", "fp16 takes a CPU many times as long")])
def test_what_the_device_cannot_do_is_refused_before_anything_is_read(tmp_path, monkeypatch, asked, line):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    settings = Settings.model_validate({"kind": "sft", "seed": 1, "train": {"steps": 1, "precision": asked}})
    write_json(tmp_path / "settings.json", settings.model_dump(mode="json"))
    words = [tmp_path / "settings.json", "--model", "absent", "--data", "absent", "--out", tmp_path / "m.safetensors"]
    with pytest.raises(ConfigError, match=line):
        sft.main([str(word) for word in words])


def test_bf16_is_refused_on_a_gpu_that_only_imitates_it(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ConfigError, match="^train.precision: Tesla T4 has no bf16; choose fp16 or fp32$"):
        check_precision("bf16", torch.device("cuda"))
    assert asked == [False]
    check_precision("fp16", torch.device("cuda"))
    check_precision("bf16", CPU)


@pytest.mark.parametrize("family", ["rwkv6", "rwkv7"])
@pytest.mark.parametrize("chunk", [None, "truncated", "full"])
@pytest.mark.parametrize("lora", [None, {"rank": 2, "dropout": 0.4, "full": ["ln1"]}])
def test_blocks_computed_again_give_the_same_bits(family, chunk, lora):
    config = TrainConfig(steps=1, **({} if chunk is None else {"chunk": 5, "bptt": chunk}))
    losses = (lm_losses if chunk is None else chunked_lm_losses)(3, config)
    found = []
    for recompute in (False, True):
        model = small(family).train()
        if lora:
            inject(model, LoraConfig(**lora))
            with torch.no_grad():
                for name, value in model.named_parameters():
                    value += 0.1 * name.endswith("lora_B")
        model.recompute = recompute
        torch.manual_seed(3)
        total = []
        for part in losses(model, batch(1)):
            part.backward()
            total.append(part.detach())
        found.append([*total, *(value.grad for value in model.parameters() if value.grad is not None)])
    assert len(found[0]) > 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_blocks_computed_again_keep_a_fraction():
    held = {}
    for recompute in (False, True):
        model, kept = small(), [0]
        model.recompute = recompute

        def keep(value, kept=kept):
            kept[0] += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            model.features(batch(1).ids)
        held[recompute] = kept[0]
    assert held[True] < 0.2 * held[False]


def test_recomputing_is_a_word_of_the_command_line_and_decides_no_weight(tmp_path, monkeypatch):
    import numpy as np

    from rwkvpipe.data.binidx import BinidxWriter

    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    (tmp_path / "corpus").mkdir()
    with BinidxWriter(tmp_path / "corpus/train", np.uint16) as writer:
        for n in range(6):
            writer.add([n + 1, 5, 6, 7, 0], [0, 1, 1, 1, 1])
    write_json(tmp_path / "corpus/corpus.json", {"vocab_size": 20})
    store.write_tensors(tmp_path / "start.safetensors", small().state_dict())
    asked = {"kind": "sft", "seed": 1, "train": {"steps": 2, "batch": 3, "ctx_len": 8, "warmup": 1}}
    write_json(tmp_path / "settings.json", Settings.model_validate(asked).model_dump(mode="json"))
    seen, real = [], sft.open_stage
    monkeypatch.setattr(sft, "open_stage", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    for name, more in (("plain", []), ("spared", ["--recompute"])):
        words = [tmp_path / "settings.json", "--model", tmp_path / "start.safetensors", "--data", tmp_path / "corpus"]
        sft.main([str(word) for word in [*words, *more, "--out", tmp_path / name / "model.safetensors"]])
    assert [stage.model.recompute for stage in seen] == [False, True]
    plain, spared = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "spared"))
    assert plain == spared
