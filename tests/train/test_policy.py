"""Advantages, log-probabilities and the policy loss agree with independent numbers, and hold at their edges."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rwkvpipe.base.config import RolloutConfig, SamplingConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.train.advantage import Bounds, advantages, normalised
from rwkvpipe.train.likelihood import token_entropy, token_logprobs
from rwkvpipe.train.policy import Rollout, Share, by_parts, most_uncertain, policy_loss
from rwkvpipe.train.reward import Rewards


def load(path):
    return np.load(path, allow_pickle=False)


def tensor(array):
    return torch.from_numpy(np.asarray(array))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_trl(goldens, scale):
    data = load(goldens / "tune/advantages.npz")
    for case in {k.split("/")[0] for k in data.files}:
        weights = {f"r{n}": float(weight) for n, weight in enumerate(data[f"{case}/reward_weights"])}
        both = Rewards(RolloutConfig(reward=weights), lambda name: None)
        rewards = both.total(tensor(data[f"{case}/rewards_per_func"]).double())
        np.testing.assert_allclose(rewards, data[f"{case}/rewards"], atol=1e-12)
        found = advantages(rewards, int(data[f"{case}/num_generations"]), scale)
        np.testing.assert_allclose(found, data[f"{case}/trl_{scale}"], atol=1e-9)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_clipped_and_those_of_weak_groups_made_small_in_every_scale(goldens, scale):
    data, case = load(goldens / "tune/advantages.npz"), "clip_suppress"
    clip, low, share = (float(data[f"{case}/cfg_{name}"]) for name in ("clip", "thresh", "scale"))
    size, plain = int(data[f"{case}/num_generations"]), data[f"{case}/trl_{scale}"].reshape(-1)
    best = data[f"{case}/rewards"].reshape(-1, size).max(1).repeat(size)
    wanted = plain.clip(-clip, clip) * np.where(best < low, share, 1.0)
    found = advantages(tensor(data[f"{case}/rewards"]), size, scale, bounds=Bounds(clip, low, share))
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    assert (best < low).any() and not (best < low).all() and (abs(plain) > clip).any()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value,count", [(0.3, 8), (0.1, 7), (0.1, 16), (2.2, 12), (100.1, 7), (0.0, 4)])
def test_equal_rewards_give_exactly_zero(scale, value, count):
    for dtype in (torch.float32, torch.float64):
        rewards = torch.full((count,), value, dtype=dtype)
        mixed = torch.cat([rewards, torch.linspace(0, 1, count, dtype=dtype)])
        assert advantages(rewards, count, scale).abs().max() == 0
        assert advantages(mixed, count, scale)[:count].abs().max() == 0
        assert advantages(mixed, count, scale)[count:].abs().max() > 0


def test_a_group_of_one_learns_nothing():
    assert advantages([1.0, 0.0, 3.0], 1).tolist() == [0, 0, 0]


def test_a_row_without_reward_is_left_out_of_its_group():
    nan = float("nan")
    found = advantages([1.0, 0.0, nan, nan, nan, nan], 3)
    alone = advantages([1.0, 0.0], 2)
    assert found.tolist() == [*alone.tolist(), 0, 0, 0, 0]
    assert advantages([nan, nan], 2, "batch").tolist() == [0, 0]


def apart(grades, weights, group):
    """GDPO by loops: each reward in its group, their weighted sum, then the batch."""
    sums = np.full(len(grades), np.nan)
    for first in range(0, len(grades), group):
        rows = grades[first : first + group]
        for row, some in enumerate(rows):
            parts = []
            for k, grade in enumerate(some):
                known = rows[~np.isnan(rows[:, k]), k]
                if not np.isnan(grade):
                    spread = known.std(ddof=1) if len(known) > 1 else 0.0
                    parts.append(weights[k] * (grade - known.mean()) / (spread + 1e-4))
            if parts:
                sums[first + row] = sum(parts)
    return np.nan_to_num((sums - np.nanmean(sums)) / (np.nanstd(sums, ddof=1) + 1e-4))


def test_rewards_are_normalised_one_by_one_as_gdpo_has_it(goldens):
    data, lots = load(goldens / "tune/advantages.npz"), np.random.default_rng(2)
    names = ("rewards_per_func", "reward_weights", "num_generations")
    cases = [[data[f"{case}/{name}"] for name in names] for case in sorted({k.split("/")[0] for k in data.files})]
    drawn = lots.normal(size=(15, 3)) * [1, 100, 0.01]
    drawn[lots.random(drawn.shape) < 0.4] = np.nan
    drawn[7], drawn[5:10, 2] = np.nan, [np.nan, 1, np.nan, np.nan, np.nan]
    for grades, weights, size in [*cases, (drawn, np.array([1.0, 0.5, 2.0]), 5)]:
        grades, size = grades.astype(float), int(size)
        rewards = torch.zeros(len(grades)).masked_fill(tensor(np.isnan(grades).all(1)), torch.nan)
        found = advantages(rewards, size, apart=normalised(tensor(grades), weights, size))
        wanted = apart(grades, weights, size) if size > 1 else np.zeros(len(grades))
        np.testing.assert_allclose(found, wanted, atol=1e-9)
        assert found.abs().max() > 0 or np.nanmax(abs(grades - grades[0])) == 0 or size == 1


def test_normalising_first_neither_moves_equal_groups_nor_lets_large_numbers_drown_small_ones():
    low, high = torch.tensor([0.3, 0.3, 0.3, 0.3]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    grades = torch.stack([torch.cat([low, high]), torch.cat([low, torch.tensor([1000.0, 0.0, 0.0, 1000.0])])], 1)
    rewards = grades.sum(1)
    found = advantages(rewards, 4, apart=normalised(grades, [1.0, 1.0], 4))
    assert found[:4].abs().max() == 0
    torch.testing.assert_close(found[4], found[5], atol=1e-3, rtol=0)  # the best of one reward, each
    assert advantages(rewards, 4)[5] < 0
    weak = advantages(rewards, 4, bounds=Bounds(0.5, 2000.0, 0.1), apart=normalised(grades, [1.0, 1.0], 4))
    torch.testing.assert_close(weak, 0.1 * found.clamp(-0.5, 0.5))


def test_rewards_that_do_not_fill_groups_are_refused():
    with pytest.raises(ConfigError, match="5 rewards"):
        advantages([1.0] * 5, 2)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_logprobs_stay_fp32_on_bf16_logits(goldens, temperature):
    data = load(goldens / "tune/logprobs_from_logits.npz")
    logits = tensor(data["logits_bf16_bits"].view(np.int16)).view(torch.bfloat16)
    found = token_logprobs(logits, tensor(data["index"]), temperature)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, data[f"logp_T{temperature}"], atol=2e-5)
    np.testing.assert_allclose(token_entropy(logits, temperature), data[f"entropy_T{temperature}"], atol=2e-5)


def rollout_of(data, dtype, part=slice(None)):
    mask = tensor(data["mask"])[part]
    rows, width = mask.shape
    return Rollout(
        torch.zeros(rows, width, dtype=torch.long),
        torch.zeros(rows, dtype=torch.long),
        mask,
        tensor(data["advantages"])[part].to(dtype),
        tensor(data["logp_old"])[part].to(dtype),
        tensor(data["logp_ref"])[part].to(dtype),
    )


def config_of(combo, longest):
    return RolloutConfig(
        loss=combo["loss_type"],
        level=combo.get("importance_sampling_level", "token"),
        epsilon=combo["epsilon"],
        epsilon_high=combo["epsilon_high"],
        delta=combo.get("delta"),
        beta=combo["beta"],
        kl=combo.get("kl", "k3"),
        sampling=SamplingConfig(max_tokens=int(longest)),
    )


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_policy_loss_and_its_gradient_are_those_of_trl(goldens, dtype, bound):
    for path in sorted((goldens / "tune").glob("grpo_loss_*.npz")):
        data = load(path)
        relative = 1e-5 if "extreme" in path.name else 1e-6
        rollout = rollout_of(data, dtype)
        for index, combo in enumerate(json.loads(str(data["combos"]))):
            new = tensor(data["logp_new"]).to(dtype).requires_grad_()
            tokens = float(data["num_items"]) if combo["loss_type"] == "dapo" else float(rollout.mask.sum())
            share = Share(len(new), tokens, int(data["max_completion_length"]))
            loss, _ = policy_loss(new, rollout, config_of(combo, share.longest), share=share)
            loss.backward()
            near = {"atol": bound, "rtol": relative, "err_msg": str(combo)}
            np.testing.assert_allclose(loss.item(), data["losses"][index], **near)
            np.testing.assert_allclose(new.grad, data["grads"][index], **near)


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_parts_of_a_step_add_up_as_in_trl(goldens, kind):
    data = load(goldens / "tune/grpo_accumulation.npz")
    combo = {"loss_type": kind, "epsilon": float(data["epsilon"]), "epsilon_high": float(data["epsilon_high"])}
    config = config_of(combo | {"beta": float(data["beta"])}, data["max_completion_length"])
    blocks = int(data["micro_batches"])
    rows = len(data["mask"])
    total, grads = 0.0, []
    for first in range(0, rows, rows // blocks):
        part = rollout_of(data, torch.float64, slice(first, first + rows // blocks))
        new = tensor(data["logp_new"])[first : first + rows // blocks].requires_grad_()
        # TRL's bnpo averages each block by its own tokens, then the blocks
        apart = by_parts(tensor(data["mask"]).sum(1), rows // blocks)[first : first + rows // blocks]
        tokens = apart if kind == "bnpo" else float(data["num_items"])
        loss, _ = policy_loss(new, part, config, share=Share(rows, tokens, int(data["max_completion_length"])))
        loss.backward()
        total += loss.item()
        grads.append(new.grad)
    np.testing.assert_allclose(total, data[f"loss_{kind}"], atol=1e-12)
    np.testing.assert_allclose(torch.cat(grads), data[f"grad_{kind}"], atol=1e-12)


def test_garbage_outside_the_mask_and_empty_completions_change_nothing():
    old = torch.tensor([[-1.0, -2.0, 1e9], [-1.0, float("nan"), -1e9]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    rollout = Rollout(
        torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long), mask, torch.ones(2), old, old.clone()
    )
    for kind in ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"):
        for level in {"luspo": ["sequence"], "vespo": ["token"]}.get(kind, ["token", "sequence"]):
            new = torch.full((2, 3), -1.5).requires_grad_()
            config = RolloutConfig(loss=kind, level=level, beta=0.1, off_policy=0.1, kl_ratio=True)
            loss, _ = policy_loss(new, rollout, config, share=Share(2, 2, 3))
            loss.backward()
            assert loss.isfinite()
            assert new.grad.isfinite().all()
            assert new.grad[mask == 0].abs().max() == 0


def test_clipping_is_counted_on_the_side_it_binds():
    old = torch.zeros(2, 1)
    rollout = Rollout(
        torch.zeros(2, 2, dtype=torch.long), torch.ones(2, dtype=torch.long), torch.ones(2, 1),
        torch.tensor([1.0, -1.0]), old,
    )  # fmt: skip
    high, low = torch.tensor([[1.0], [1.0]]), torch.tensor([[-1.0], [-1.0]])
    share = Share(2, 2, 1)
    assert policy_loss(high, rollout, RolloutConfig(), share=share)[1]["clip_ratio/high_mean"] == 1
    assert policy_loss(low, rollout, RolloutConfig(), share=share)[1]["clip_ratio/low_mean"] == 1


def test_cispo_weighs_the_gradient_by_the_clipped_ratio_and_silences_no_token():
    ratio = torch.tensor([[0.5, 1.0, 3.0], [0.9, 3.0, 1.0]], dtype=torch.float64)
    old, mask = torch.full_like(ratio, -2.0), torch.tensor([[1, 1, 1], [1, 1, 0]])
    gain = torch.tensor([1.0, -0.5], dtype=torch.float64)
    rollout = Rollout(torch.zeros(2, 4, dtype=torch.long), torch.ones(2, dtype=torch.long), mask, gain, old)
    for changes, low, high in (({}, 0.8, 1.2), ({"epsilon_high": 0.4}, 0.8, 1.4), ({"epsilon": 0.05}, 0.95, 1.05)):
        new = (old + ratio.log()).requires_grad_()
        loss, measures = policy_loss(new, rollout, RolloutConfig(loss="cispo", **changes), share=Share(2, 5, 3))
        loss.backward()
        weight = ratio.clamp(low, high) * mask * gain[:, None]
        torch.testing.assert_close(new.grad, -weight / 5)
        torch.testing.assert_close(loss.detach(), -(weight * new.detach()).sum() / 5)
        assert measures["clip_ratio/low_mean"] + measures["clip_ratio/high_mean"] == (4 if "epsilon" in changes else 3)


def test_a_bound_that_cispo_would_not_read_is_refused():
    with pytest.raises(ValueError, match="delta does nothing"):
        RolloutConfig(loss="cispo", delta=2.0)


def one_cost(config, ratio, gain, product, new):
    """What a token costs without divergence, in scalars; product: the completion's ratio."""
    if config.loss == "sapo":
        steep = (config.soft or (1, 1.05))[0 if gain > 0 else 1]
        return -4 / steep / (1 + (-steep * (ratio - 1)).exp()) * gain
    if config.loss == "vespo":
        k, tilt = (config.gamma or (2, 3, 3, 2))[:2] if gain >= 0 else (config.gamma or (2, 3, 3, 2))[2:]
        w = min(max(product, 1e-8), math.exp(20))
        return -(w**k) * math.exp(tilt * (1 - w)) * gain * new
    clipped = ratio.clamp(1 - 0.2, 1 + 0.2)
    return -torch.min(ratio * gain, clipped * gain)


def slowly(new, rollout, config):
    """The loss token by token, in scalars."""
    sums, means = [], []
    for i, row in enumerate(rollout.mask):
        apart = [new[i, t] - rollout.old[i, t] for t in range(len(row))]
        count, gain = max(float(row.sum()), 1), rollout.advantages[i]
        mean = sum(m * d for m, d in zip(row, apart, strict=True)) / count
        product, total = math.exp(mean.item() * count), new.new_zeros(())
        left_out = config.off_policy is not None and gain < 0 and -mean > config.off_policy
        for t, m in enumerate(row):
            ratio = (apart[t] if config.level == "token" else mean).exp()
            d = rollout.reference[i, t] - new[i, t]
            kl = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[config.kl] * (ratio if config.kl_ratio else 1)
            taught = 0 if left_out else 1 if rollout.taught is None else rollout.taught[i, t]
            held = 1 if rollout.held is None else rollout.held[i]
            total = total + m * (one_cost(config, ratio, gain, product, new[i, t]) * taught + config.beta * kl * held)
        sums.append(total)
        means.append(total / count)
    if config.loss == "sapo":
        return sum(means) / len(means)
    return sum(sums) / (len(sums) if config.loss == "luspo" else rollout.mask.sum())


KINDS = [{"kl": kl, "level": level} for kl in ("k1", "k2", "k3") for level in ("token", "sequence")]
KINDS += [{"loss": "sapo"}, {"loss": "sapo", "soft": (0.7, 2.0), "level": "sequence"}]
KINDS += [{"loss": "vespo"}, {"loss": "vespo", "gamma": (1.5, 1.0, 2.5, 0.5)}]
KINDS += [{"loss": "luspo", "level": "sequence"}, {"off_policy": 0.02}, {"off_policy": 5.0}]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_losses_of_every_kind_and_their_gradients_are_their_formulas(kind):
    stream = torch.Generator().manual_seed(3)
    old, reference, new = (0.5 * torch.randn(3, 4, generator=stream, dtype=torch.float64) - 2 for _ in range(3))
    mask = torch.tensor([[1, 0.5, 2, 0], [0.25, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
    gain = torch.tensor([1.0, -0.7, 0.0], dtype=torch.float64)
    plain = Rollout(torch.zeros(3, 6, dtype=torch.long), torch.ones(3, dtype=torch.long), mask, gain, old, reference)
    taught, held = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 1]]), torch.tensor([1, 1, 0])
    for rollout in (plain, replace(plain, taught=taught, held=held)):
        for corrected in (False, True):
            config = RolloutConfig(beta=0.3, kl_ratio=corrected, **kind)
            ours, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()
            loss, _ = policy_loss(ours, rollout, config, share=Share(3, float(mask.sum()), 4))
            wanted = slowly(theirs, rollout, config)
            loss.backward()
            wanted.backward()
            torch.testing.assert_close(loss, wanted, atol=1e-12, rtol=0)
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=0)


def test_a_completion_that_left_the_policy_counts_no_more_where_its_advantage_is_negative():
    new, old = torch.full((2, 2), -3.0), torch.full((2, 2), -2.0)
    rollout = Rollout(
        torch.zeros(2, 3, dtype=torch.long), torch.ones(2, dtype=torch.long), torch.ones(2, 2),
        torch.tensor([1.0, -1.0]), old,
    )  # fmt: skip
    for bound, counts in ((0.5, 0), (1.5, 1)):
        asked = RolloutConfig(loss="grpo", off_policy=bound)
        costs = [
            policy_loss(new[n : n + 1], rollout.rows(slice(n, n + 1)), asked, share=Share(1, 2, 2))[0] for n in (0, 1)
        ]
        assert costs[0] != 0 and bool(costs[1] != 0) == counts


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_gradient_of_the_entropy_is_that_of_its_formula(temperature):
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs, pull = logits.clone().requires_grad_(), logits.clone().requires_grad_(), torch.arange(10.0).view(2, 5)
    (token_entropy(ours, temperature) * pull).sum().backward()
    chances = (theirs / temperature).softmax(-1)
    (-(chances * chances.log()).sum(-1) * pull).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("asked", "said"), [
    ({"loss": "sapo", "epsilon": 0.1}, "epsilon does nothing in loss sapo"),
    ({"loss": "vespo", "delta": 2.0}, "delta does nothing in loss vespo"),
    ({"soft": (1.0, 2.0)}, "soft belongs to loss sapo"),
    ({"loss": "luspo"}, "loss luspo is made for level sequence"),
    ({"loss": "vespo", "level": "sequence"}, "loss vespo is made for level token"),
    ({"kl_ratio": True}, "beta 0 leaves out"),
])  # fmt: skip
def test_settings_that_a_loss_would_not_read_are_refused(asked, said):
    with pytest.raises(ValueError, match=said):
        RolloutConfig(**asked)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.99])
def test_the_most_uncertain_tokens_are_those_above_the_quantile_of_all_that_count(share):
    stream = torch.Generator().manual_seed(1)
    entropy = torch.rand(7, 9, generator=stream)
    entropy[2] = entropy[3]  # ties
    mask = (torch.rand(7, 9, generator=stream) < 0.6).float() * 0.5
    mask[5] = 0
    found = most_uncertain(entropy, mask, share)
    border = torch.quantile(entropy[mask != 0].double(), 1 - share)
    assert torch.equal(found != 0, (mask != 0) & (entropy >= border))
    assert 0 < found.sum() <= share * (mask != 0).sum() + 2
    assert not most_uncertain(entropy, torch.zeros_like(mask), share).any()


def test_rows_keep_what_belongs_to_them():
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 0]])
    ids, first = torch.arange(15).view(3, 5), torch.tensor([2, 1, 1])
    rollout = Rollout(ids, first, mask, torch.ones(3), 2 * mask, None, 3 * mask, torch.tensor([1.0, 0, 1]))
    part = rollout.rows(slice(1, 3))
    assert part.taught.tolist() == [[3], [0]] and part.held.tolist() == [0, 1] and part.reference is None
    assert part.ids.tolist() == [[5, 6], [10, 11]] and part.old.tolist() == [[2], [0]]
