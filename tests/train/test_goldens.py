"""Whole training steps give the numbers of independent programs."""

import json

import numpy as np
import pytest
import torch

from rwkvpipe.base.config import LoraConfig, RolloutConfig, RwkvConfig, SamplingConfig, TrainConfig
from rwkvpipe.base.errors import Stopped
from rwkvpipe.data.batches import Batch
from rwkvpipe.model.family import build, detect
from rwkvpipe.train.advantage import advantages
from rwkvpipe.train.loop import Run, fit
from rwkvpipe.train.loss import lm_losses
from rwkvpipe.train.policy import Rollout, completion_logprobs, grpo_losses, most_uncertain
from rwkvpipe.train.record import Log
from rwkvpipe.weights.lora import disabled, inject, load_adapter


def load(path):
    return np.load(path, allow_pickle=False)


def model_of(weights: dict[str, np.ndarray]) -> torch.nn.Module:
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    model = build(detect(tensors))
    names = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in tensors.items() if name in names})
    return model


@pytest.fixture
def tiny(goldens):
    data = load(goldens / "tune/tiny_rwkv7.npz")
    return model_of({name: data[name] for name in data.files if not name.startswith("__")})


@pytest.fixture
def sft(goldens):
    return load(goldens / "tune/model_sft.npz")


def shifted(ids: np.ndarray, labels: np.ndarray) -> Batch:
    """Rows of ids (padding below 0) and unshifted labels as a batch."""
    ids, labels = torch.from_numpy(np.atleast_2d(ids)), torch.from_numpy(np.atleast_2d(labels))
    return Batch(ids[:, :-1].clamp(min=0), ids[:, 1:].clone(), (labels[:, 1:] >= 0).float())


def gradients(model, losses, batch) -> float:
    model.zero_grad()
    parts = list(losses(model, batch))
    for part in parts:
        part.backward()
    return sum(part.item() for part in parts)


PLAIN = TrainConfig(steps=6, l2_wrap=0.0, eps=1e-8, warmup=0, log_every=1)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
def test_the_masked_loss_and_every_gradient_are_met_whatever_the_micro_batch(tiny, sft, micro_batch):
    loss = gradients(tiny, lm_losses(micro_batch, PLAIN), shifted(sft["input_ids"], sft["labels"]))
    assert loss == pytest.approx(float(sft["loss"]), abs=1e-5)
    norms = json.loads(str(sft["grad_norms"]))
    for name, value in tiny.named_parameters():
        if name in norms:
            assert value.grad.norm().item() == pytest.approx(norms[name], rel=1e-4, abs=1e-7), name
    for key in (k for k in sft.files if k.startswith("grad/")):
        wanted = sft[key]
        found = tiny.get_parameter(key[5:]).grad.flatten()
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_l2_wrap_pulls_with_the_loss_and_is_not_in_it(tiny, goldens):
    data = load(goldens / "tune/model_l2wrap.npz")
    batch = shifted(data["input_ids"], data["labels"])
    for scale in (1.0, 0.25):

        def scaled(model, batch, scale=scale):
            for part in lm_losses(1, TrainConfig(steps=1))(model, batch):
                yield part * scale

        loss = gradients(tiny, scaled, batch)
        assert loss / scale == pytest.approx(float(data["loss_reported"]), abs=1e-5)
        wanted = data[f"grad_ln_out_scale{scale}"]
        np.testing.assert_allclose(tiny.ln_out.weight.grad, wanted, atol=1e-4 * np.abs(wanted).max())
        norm = tiny.head.weight.grad.norm().item()
        assert norm == pytest.approx(float(data[f"grad_head_norm_scale{scale}"]), rel=1e-4)


@pytest.mark.parametrize("case", ["plain", "rwkv_groups"])
def test_six_steps_of_adamw_are_met(tiny, sft, goldens, tmp_path, case):
    data = load(goldens / "tune/model_trajectory.npz")
    asked = json.loads(str(data[f"{case}/config"]))
    changes = {"schedule": "constant", "lr": asked["lr"], "betas": tuple(asked["betas"]), "eps": asked["eps"]}
    changes |= {"weight_decay": asked["weight_decay"], "clip": asked["grad_clip"] or 1e9}
    config = PLAIN.model_copy(update=changes)
    rows = asked["samples"]
    batch = shifted(sft["input_ids"][rows], sft["labels"][rows])
    if not asked["att_w0_lr_x2"]:  # our groups always have it: without, w0 alone would differ
        return check_plain(tiny, batch, config, data)
    log = fit(tiny, lambda first, carried: iter([batch] * 6), lm_losses(2, config), config=config,
              run=Run(tmp_path, "m", 100, 0))  # fmt: skip
    np.testing.assert_allclose([row["loss"] for row in log.rows()], data[f"{case}/losses"], atol=1e-4)
    norms = [row["grad_norm"] for row in log.rows()]
    np.testing.assert_allclose(norms, data[f"{case}/grad_norms_before_clip"], rtol=1e-3)
    np.testing.assert_allclose(tiny.ln_out.weight.detach(), data[f"{case}/final_ln_out"], atol=1e-5)
    w0 = tiny.blocks[0].att.w0.detach().flatten()
    np.testing.assert_allclose(w0, data[f"{case}/final_w0_l0"], atol=1e-5)


def check_plain(model, batch, config, data):
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    losses = []
    for _ in range(6):
        losses.append(gradients(model, lm_losses(4, config), batch))
        optimizer.step()
    np.testing.assert_allclose(losses, data["plain/losses"], atol=1e-4)
    np.testing.assert_allclose(model.ln_out.weight.detach(), data["plain/final_ln_out"], atol=1e-5)
    np.testing.assert_allclose(model.blocks[0].att.w0.detach().flatten(), data["plain/final_w0_l0"], atol=1e-5)


@pytest.mark.parametrize("name", ["x052", "x060", "x070"])
def test_eight_steps_of_pretraining_are_met(goldens, tmp_path, name):
    start, data = load(goldens / f"rwkv/model_{name}_b.npz"), load(goldens / f"rwkv/train_{name}.npz")
    meta = json.loads(str(data["meta"]))
    model = model_of({k[2:]: start[k] for k in start.files if k.startswith("w/")})
    steps = meta["exit_tokens"] // (meta["ctx_len"] * meta["bsz"])
    config = TrainConfig(
        steps=steps, schedule="rwkv", lr=meta["lr_init"], lr_final=meta["lr_final"], warmup=meta["warmup"],
        weight_decay=meta["wd"], betas=tuple(meta["betas"]), eps=meta["eps"], clip=meta["clip"], log_every=1,
    )  # fmt: skip
    rows = [Batch(torch.from_numpy(x), torch.from_numpy(y), None) for x, y in zip(data["x"], data["y"], strict=True)]

    def batches(first, carried):
        yield from rows
        raise KeyboardInterrupt

    with pytest.raises(Stopped):
        fit(model, batches, lm_losses(2, config), config=config, run=Run(tmp_path, "m", 100, 0))
    log = Log(tmp_path / "log.jsonl").rows()
    np.testing.assert_allclose([row["lr"] for row in log], data["lr"], rtol=1e-12)
    np.testing.assert_allclose([row["loss"] for row in log], data["loss"], atol=1e-4)
    np.testing.assert_allclose([row["grad_norm"] for row in log], data["grad_norm_before_clip"], rtol=1e-3)
    final = model.state_dict()
    for key in data.files:
        kind, _, name = key.partition("/")
        if kind == "w_final" and name in final:
            np.testing.assert_allclose(final[name], data[key], atol=1e-4, err_msg=name)
        elif kind == "w_final_stats" and name in final:
            value = final[name].flatten()
            found = [value.mean(), value.std(), value[0], value[-1]]
            np.testing.assert_allclose(found, data[key], atol=1e-4, err_msg=name)


def ragged(data) -> Rollout:
    prompts, completions = data["prompts"], data["completions"]
    lengths, ends = data["prompt_len"], data["completion_len"]
    ids = torch.zeros(len(prompts), int((lengths + ends).max()), dtype=torch.long)
    for row in range(len(prompts)):
        whole = [*prompts[row, : lengths[row]], *completions[row, : ends[row]]]
        ids[row, : len(whole)] = torch.tensor(whole)
    mask = torch.from_numpy((completions >= 0).astype(np.float32))
    return Rollout(ids, torch.from_numpy(lengths), mask, torch.zeros(len(ids)), torch.zeros_like(mask))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_of_unlike_length_are_scored_as_if_alone(tiny, goldens, temperature):
    data = load(goldens / "tune/model_ragged_logps.npz")
    rollout = ragged(data)
    found = completion_logprobs(tiny, rollout, temperature).detach()
    np.testing.assert_allclose(found, data[f"logp_T{temperature}"], atol=2e-5)
    for row in range(len(found)):
        alone = completion_logprobs(tiny, rollout.rows(slice(row, row + 1)), temperature).detach()
        np.testing.assert_allclose(alone[0], data[f"logp_T{temperature}"][row, : alone.shape[1]], atol=2e-5)


@pytest.fixture
def adapted(tiny, goldens):
    data = load(goldens / "tune/model_lora.npz")
    inject(tiny, LoraConfig(rank=int(data["r"]), alpha=float(data["alpha"])))
    pairs = {f"{k[2:]}.lora_{k[0]}": torch.from_numpy(data[k]) for k in data.files if k[:2] in ("A/", "B/")}
    load_adapter(tiny, pairs)
    return tiny, data


def norms_are_met(model, data, head=""):
    for key in (k for k in data.files if k.startswith(f"{head}gradnorm_")):
        kind, _, path = key.removeprefix(f"{head}gradnorm_").partition("/")
        found = model.get_parameter(f"{path}.lora_{kind}").grad.norm().item()
        assert found == pytest.approx(float(data[key]), rel=1e-4), key


def test_a_model_with_adapters_is_met_on_and_off(adapted, sft):
    model, data = adapted
    ids = torch.from_numpy(data["ids"])
    with torch.no_grad():
        np.testing.assert_allclose(model(ids)[0][:, -1], data["logits_adapter_last"], atol=2e-5)
        with disabled(model):
            np.testing.assert_allclose(model(ids)[0][:, -1], data["logits_disabled_last"], atol=2e-5)
    loss = gradients(model, lm_losses(4, PLAIN), shifted(sft["input_ids"], sft["labels"]))
    assert loss == pytest.approx(float(data["sft_loss"]), abs=1e-5)
    norms_are_met(model, data)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_a_grpo_step_against_the_model_without_adapter_is_met(adapted, goldens, micro_batch):
    model, data = adapted
    rollout = ragged(load(goldens / "tune/model_ragged_logps.npz"))
    gains = advantages(data["grpo/rewards"], int(data["grpo/num_generations"]))
    np.testing.assert_allclose(gains, data["grpo/advantages"], atol=1e-9)
    with torch.no_grad(), disabled(model):
        reference = completion_logprobs(model, rollout, 1.0)
    np.testing.assert_allclose(reference * rollout.mask, data["grpo/ref"] * data["grpo/mask"], atol=2e-5)
    fields = vars(rollout) | {"advantages": gains.float(), "reference": reference}
    rollout = Rollout(**(fields | {"old": torch.from_numpy(data["grpo/old"]).float()}))
    config = RolloutConfig(
        loss="dapo", beta=0.04, epsilon=0.2, epsilon_high=0.28, sampling=SamplingConfig(temperature=1.0)
    )
    loss = gradients(model, grpo_losses(config, micro_batch), rollout)
    assert loss == pytest.approx(float(data["grpo/loss_dapo_beta0.04_eps0.2_0.28"]), abs=1e-5)
    norms_are_met(model, data, "grpo/")


def test_a_batch_without_targets_costs_nothing_and_is_no_nan(tiny):
    ids = torch.randint(0, 60, (2, 9))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.zeros(2, 8))
    assert gradients(tiny, lm_losses(1, TrainConfig(steps=1)), batch) == 0
    assert all(value.grad is None or value.grad.isfinite().all() for value in tiny.parameters())


def test_bf16_arithmetic_keeps_fp32_weights_and_gradients(tiny, sft):
    config = PLAIN.model_copy(update={"precision": "bf16"})
    loss = gradients(tiny, lm_losses(4, config), shifted(sft["input_ids"], sft["labels"]))
    assert loss == pytest.approx(float(sft["loss"]), abs=0.05)
    assert {value.grad.dtype for value in tiny.parameters() if value.grad is not None} == {torch.float32}


def test_a_step_does_not_depend_on_the_micro_batch(tmp_path):
    config = RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=20)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (6, 13), generator=generator)
    mask = (torch.rand(6, 12, generator=generator) < 0.4).float()
    results = []
    for micro_batch in (1, 4, 6):
        model = build(config)
        model.initialise(1)
        gradients(model, lm_losses(micro_batch, TrainConfig(steps=1)), Batch(ids[:, :-1], ids[:, 1:], mask))
        results.append(torch.cat([v.grad.flatten() for v in model.parameters() if v.grad is not None]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_an_entropy_bonus_adds_the_gradient_of_the_mean_entropy_and_no_other(tiny, goldens, share):
    rollout = ragged(load(goldens / "tune/model_ragged_logps.npz"))
    fields = vars(rollout) | {"advantages": torch.linspace(-1, 1, len(rollout.ids)), "old": rollout.old - 2}
    told = []
    with torch.no_grad():
        completion_logprobs(tiny, rollout, 0.9, told=told)
    taught = None if share == 1 else most_uncertain(told[0], rollout.mask, share)
    rollout, found = Rollout(**(fields | {"taught": taught})), []
    for weight in (0.0, 0.3):
        asked = RolloutConfig(entropy=weight, sampling=SamplingConfig(temperature=0.9))
        loss = gradients(tiny, grpo_losses(asked, 3), rollout)
        found.append((loss, tiny.blocks[1].att.key.weight.grad.clone(), tiny.head.weight.grad.clone()))
    tiny.zero_grad()
    told = []
    completion_logprobs(tiny, rollout, 0.9, told=told)
    counts = rollout.mask if taught is None else rollout.mask * taught
    bonus = -0.3 * (told[0] * counts).sum() / counts.sum()
    bonus.backward()
    assert found[1][0] - found[0][0] == pytest.approx(bonus.item(), abs=1e-6)
    for n, value in ((1, tiny.blocks[1].att.key.weight), (2, tiny.head.weight)):
        torch.testing.assert_close(found[1][n] - found[0][n], value.grad, atol=1e-6, rtol=1e-4)
