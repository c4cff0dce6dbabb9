"""GRPO without input or output: log-probabilities and the clipped policy loss.

Formulas as in TRL's GRPOTrainer (https://github.com/huggingface/trl), whose defaults these are.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from rwkvpipe.base.config import RolloutConfig
from rwkvpipe.train.dist import ALONE, Rank
from rwkvpipe.train.likelihood import likelihood, scattered
from rwkvpipe.train.loss import device_of
from rwkvpipe.train.precision import arithmetic

EPSILON, SOFT, GAMMA = 0.2, (1.0, 1.05), (2.0, 3.0, 3.0, 2.0)
CLIPPED = ("clip_ratio/low_mean", "clip_ratio/high_mean")  # tokens whose ratio was clipped, as they are reported


@dataclass(frozen=True)
class Rollout:
    """Completions of one step, ready to learn from; a row is prompt plus completion, padded on the right.

    ids (R, T) long; first (R,) position of each row's first completion token; mask (R, C) 1 where a completion
    token counts; advantages (R,); old, reference (R, C) log-probabilities (reference None without divergence).
    taught (R, C) is 1 at tokens that the reward teaches, held (R,) 1 for rows that are held to the reference; None is
    all of them.
    """

    ids: Tensor
    first: Tensor
    mask: Tensor
    advantages: Tensor
    old: Tensor
    reference: Tensor | None = None
    taught: Tensor | None = None
    held: Tensor | None = None

    def rows(self, part: slice | Tensor) -> "Rollout":
        """Some of the rows, cut to the longest of them."""
        mask = self.mask[part]
        used = max(int(mask.any(0).nonzero().max()) + 1 if mask.any() else 0, 1)
        width = int(self.first[part].max()) + used
        found = {name: value[part] for name, value in vars(self).items() if value is not None}
        cut = {name: found[name][:, :used] for name in ("mask", "old", "reference", "taught") if name in found}
        return Rollout(**(found | cut | {"ids": found["ids"][:, :width]}))

    def part(self, rows: slice) -> "Rollout":
        """The same; of no rows the first, in which nothing counts, for who has to make a pass all the same."""
        if rows.start < rows.stop:
            return self.rows(rows)
        first = self.rows(slice(0, 1))
        return replace(first, mask=torch.zeros_like(first.mask))

    def to(self, device: torch.device) -> "Rollout":
        """The same on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


def completion_logprobs(
    model: nn.Module, rollout: Rollout, temperature: float, precision: str = "fp32", told: list[Tensor] | None = None
) -> Tensor:
    """Log-probabilities (R, C) of the completions' tokens, 0 where the mask is 0; padding enters no state used.

    Row by row the result is that of the row alone: only what the mask counts is looked up, some of it at a time.
    `told` is given the entropies (R, C) where these tokens were drawn.
    """
    counts = rollout.mask != 0
    with arithmetic(precision, rollout.ids.device):
        features, _ = model.features(rollout.ids[:, :-1])  # (R, T - 1, D)
    # token first + j is predicted at position first + j - 1
    steps = torch.arange(rollout.mask.shape[1], device=rollout.ids.device)
    places = (rollout.first[:, None] + steps - 1).clamp(max=features.shape[1] - 1)  # (R, C)
    tokens = rollout.ids.gather(1, places + 1)
    chosen = counts.clone()
    chosen[0, 0] |= ~counts.any()  # who has to make a pass makes one through the head, too
    rows = chosen.nonzero()[:, 0]
    given = features[rows, places[chosen]], tokens[chosen]
    asked = {"temperature": temperature, "precision": precision, "uncertain": told is not None}
    found, entropy = likelihood(model, *given, **asked)
    if told is not None:
        told.append(torch.where(counts, scattered(entropy, chosen), 0.0))
    return torch.where(counts, scattered(found, chosen), 0.0)


def most_uncertain(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """1 at the tokens (R, C) that count and whose entropy is in the highest `share` of theirs, 0 elsewhere.

    The border is the (1 - share) quantile over all of them, as in TRL (Wang et al. 2025, arXiv 2506.01939).
    """
    counted = mask != 0
    if not counted.any():
        return torch.zeros_like(mask)
    border = float(np.quantile(entropy[counted].double().numpy(), 1 - share))
    return (counted & (entropy >= border)).to(mask)


@dataclass(frozen=True)
class Share:
    """What the loss of some rows is divided by: numbers of the whole optimizer step, so that parts add up."""

    rows: int
    tokens: float | Tensor
    longest: int
    taught: float = 0.0
    """Tokens whose entropy is made larger."""


def _divergence(kind: str, apart: Tensor) -> Tensor:
    """Estimate of the divergence at each token from apart = reference - new (log-probabilities)."""
    if kind == "k1":
        return -apart
    if kind == "k2":
        return apart.square() / 2
    return apart.exp() - apart - 1


def _bounds(config: RolloutConfig) -> tuple[float, float]:
    """Between which values ratios are clipped."""
    low = EPSILON if config.epsilon is None else config.epsilon
    return 1 - low, 1 + (low if config.epsilon_high is None else config.epsilon_high)


def _smooth(shift: Tensor, gain: Tensor, mask: Tensor, config: RolloutConfig) -> Tensor:
    """Weights (R, 1) of whole completions: w^k e^(lambda (1 - w)) with w the product of its tokens' ratios."""
    up = gain.new_tensor(GAMMA if config.gamma is None else config.gamma)
    power, tilt = torch.where(gain >= 0, up[0], up[2]), torch.where(gain >= 0, up[1], up[3])
    size = (shift.detach().clamp(-20, 20) * mask).sum(1, keepdim=True).clamp(math.log(1e-8), 20)
    return (tilt + power * size - tilt * size.exp()).exp()


def _costs(shift: Tensor, new: Tensor, rollout: Rollout, config: RolloutConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """What each token costs without divergence (R, C), and where its ratio was clipped; shift = log of the ratio."""
    ratio, (low, high) = shift.exp(), _bounds(config)
    gain = rollout.advantages.to(new.dtype).unsqueeze(1)  # (R, 1)
    if config.loss == "sapo":
        steep = torch.where(gain > 0, *gain.new_tensor(SOFT if config.soft is None else config.soft))
        return -torch.sigmoid(steep * (ratio - 1)) * 4 / steep * gain, {}
    known = torch.where(rollout.mask != 0, new, 0.0)
    if config.loss == "vespo":
        return -_smooth(shift, gain, rollout.mask.to(new.dtype), config) * gain * known, {}
    if config.loss == "cispo":
        clipped = dict(zip(CLIPPED, (ratio < low, ratio > high), strict=True))
        return -ratio.clamp(low, high).detach() * gain * known, clipped
    bounded = ratio if config.delta is None else ratio.clamp(max=config.delta)
    cost = -torch.minimum(bounded * gain, ratio.clamp(low, high) * gain)
    clipped = (ratio < low) & (gain < 0), (ratio > high) & (gain > 0)
    return cost, dict(zip(CLIPPED, clipped, strict=True))


def policy_loss(
    new: Tensor, rollout: Rollout, config: RolloutConfig, *, share: Share, entropy: Tensor | None = None
) -> tuple[Tensor, dict]:
    """The clipped policy loss of some rows (a scalar), and sums over their tokens to report.

    new (R, C) log-probabilities with gradient. With ratio = exp(new - old), a token costs
    -min(c1 A, c2 A) + beta k: c1 = min(ratio, delta), c2 = ratio clamped to [1 - epsilon, 1 + epsilon_high].
    `grpo` averages rows of token means; `dapo` tokens, `bnpo` those of a part; `dr_grpo` divides by rows x longest.
    `cispo` averages tokens that cost -c2 A new, c2 without gradient (MiniMax-M1, arXiv 2506.13585), `vespo` such with a
    weight of the completion in the place of c2; `sapo` is grpo with s(t (ratio - 1)) 4 / t for c1 and c2, s being the
    logistic function; `luspo` averages sums of rows. `entropy` (R, C) with gradient is what the bonus is made of.
    """
    mask = rollout.mask.to(new.dtype)
    lengths = mask.sum(1)  # (R,)
    # outside the mask values are arbitrary: make them 0 before any exponential sees them
    shift = torch.where(mask != 0, new - rollout.old.to(new.dtype), 0.0)
    mean = ((shift * mask).sum(1) / lengths.clamp(min=1)).unsqueeze(1)  # (R, 1)
    shift = mean.expand_as(shift) if config.level == "sequence" else shift
    cost, clipped = _costs(shift, new, rollout, config)
    measures = {name: (where * mask).sum() for name, where in clipped.items()} | {"tokens": mask.sum()}
    if config.off_policy is not None:
        cost = cost * ((rollout.advantages.unsqueeze(1) >= 0) | (-mean.detach() <= config.off_policy))
    if rollout.taught is not None:
        cost = cost * rollout.taught.to(new.dtype)
    if rollout.reference is not None:
        apart = torch.where(mask != 0, rollout.reference.to(new.dtype) - new, 0.0)
        divergence = _divergence(config.kl, apart) * (shift.exp() if config.kl_ratio else 1)
        held = 1 if rollout.held is None else rollout.held.to(new.dtype).unsqueeze(1)  # (R, 1)
        cost = cost + config.beta * held * divergence
        measures["kl_div"] = (divergence * mask).sum()
    cost = cost * mask
    if config.loss in ("grpo", "sapo"):
        total = (cost.sum(1) / lengths.clamp(min=1)).sum() / max(share.rows, 1)
    elif config.loss in ("dr_grpo", "luspo"):
        total = cost.sum() / max(share.rows * (share.longest if config.loss == "dr_grpo" else 1), 1)
    elif isinstance(share.tokens, Tensor):
        total = (cost.sum(1) / share.tokens.to(cost)).sum()
    else:
        total = cost.sum() / max(share.tokens, 1)
    if entropy is not None:
        total = total - config.entropy * (entropy * counted(rollout).to(new.dtype)).sum() / max(share.taught, 1)
    return total, {name: float(value.detach()) for name, value in measures.items()}


def counted(rollout: Rollout) -> Tensor:
    """How much each token (R, C) counts in what the reward teaches."""
    return rollout.mask if rollout.taught is None else rollout.mask * rollout.taught


def by_parts(lengths: Tensor, part: int) -> Tensor:
    """What the costs of each row (R,) are divided by: the tokens of its part, times the number of parts."""
    parts = lengths.split(part)
    sums = [chunk.sum().clamp(min=1).expand(len(chunk)) for chunk in parts]
    return torch.cat(sums) * len(parts)


def grpo_losses(
    config: RolloutConfig,
    micro_batch: int,
    *,
    precision: str = "fp32",
    report: Callable[[dict], None] | None = None,
    rank: Rank = ALONE,
) -> Callable[[nn.Module, Rollout], Iterator[Tensor]]:
    """The policy loss of a `Rollout`, `micro_batch` of this process's rows at a time; the sum depends on neither.

    `bnpo` averages over the tokens of `part` completions, then over the parts, which are the config's and not those
    that memory asks for. `report` is told the token sums of each part.
    """

    def losses(model: nn.Module, rollout: Rollout) -> Iterator[Tensor]:
        if not rollout.mask.any():  # in lockstep, too: gradients of 0 would let the moments go on moving weights
            return
        device = device_of(model)
        taught = float(counted(rollout).sum())
        share = Share(len(rollout.ids), float(rollout.mask.sum()), config.sampling.max_tokens, taught)
        apart = by_parts(rollout.mask.sum(1), config.part or config.samples) if config.loss == "bnpo" else None
        for rows in rank.mine(len(rollout.ids), micro_batch):
            part = rollout.part(rows)
            share = share if apart is None else replace(share, tokens=apart[rows] if rows.start < rows.stop else 1)
            if not part.mask.any() and not rank.lockstep:
                continue
            part = part.to(device)
            told = [] if config.entropy else None
            new = completion_logprobs(model, part, config.sampling.temperature, precision, told)
            loss, measures = policy_loss(new, part, config, share=share, entropy=told[0] if told else None)
            if report is not None:
                report(measures | {"train_loss": float(loss.detach())})
            yield loss

    return losses
