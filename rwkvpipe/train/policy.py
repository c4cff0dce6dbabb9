"""GRPO without input or output: log-probabilities and the clipped policy loss.

Formulas as in TRL's GRPOTrainer (https://github.com/huggingface/trl), whose defaults these are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from rwkvpipe.base.config import RolloutConfig
from rwkvpipe.train.dist import ALONE, Rank
from rwkvpipe.train.loss import device_of
from rwkvpipe.train.precision import arithmetic

CLIPPED = ("clip_ratio/low_mean", "clip_ratio/high_mean")  # tokens whose ratio was clipped, as they are reported


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `ids`: (..., T) fp32 from logits (..., T, V) of any dtype, ids (..., T)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        wide = wide / temperature
    return wide.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)


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


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats: (..., T) from logits (..., T, V)."""
    wide = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    found = wide.log_softmax(-1)
    return -(found.exp() * found).sum(-1)


def completion_logprobs(
    model: nn.Module, rollout: Rollout, temperature: float, precision: str = "fp32", told: list[Tensor] | None = None
) -> Tensor:
    """Log-probabilities (R, C) of the completions' tokens, 0 where the mask is 0; padding enters no state used.

    Row by row the result is that of the row alone: positions after a row's last token are never gathered. `told` is
    given the entropies (R, C) where these tokens were drawn.
    """
    with arithmetic(precision, rollout.ids.device):
        features, _ = model.features(rollout.ids[:, :-1])  # (R, T - 1, D)
        # token first + j is predicted at position first + j - 1
        steps = torch.arange(rollout.mask.shape[1], device=rollout.ids.device)
        places = (rollout.first[:, None] + steps - 1).clamp(max=features.shape[1] - 1)  # (R, C)
        wanted = features.gather(1, places[..., None].expand(-1, -1, features.shape[-1]))  # (R, C, D)
        logits = model.logits(wanted)
    tokens = rollout.ids.gather(1, (places + 1).clamp(max=rollout.ids.shape[1] - 1))
    if told is not None:  # row by row: it is as large as the logits
        rows = torch.stack([token_entropy(row, temperature) for row in logits.detach()])
        told.append(torch.where(rollout.mask != 0, rows, 0.0))
    found = token_logprobs(logits, tokens, temperature)
    return torch.where(rollout.mask != 0, found, 0.0)


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


def _divergence(kind: str, apart: Tensor) -> Tensor:
    """Estimate of the divergence at each token from apart = reference - new (log-probabilities)."""
    if kind == "k1":
        return -apart
    if kind == "k2":
        return apart.square() / 2
    return apart.exp() - apart - 1


def _costs(ratio: Tensor, new: Tensor, rollout: Rollout, config: RolloutConfig) -> tuple[Tensor, Tensor, Tensor]:
    """What each token costs without divergence (R, C), and where its ratio was clipped below and above."""
    low, high = 1 - config.epsilon, 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    gain = rollout.advantages.to(new.dtype).unsqueeze(1)  # (R, 1)
    if config.loss == "cispo":
        cost = -ratio.clamp(low, high).detach() * gain * torch.where(rollout.mask != 0, new, 0.0)
        return cost, ratio < low, ratio > high
    bounded = ratio if config.delta is None else ratio.clamp(max=config.delta)
    cost = -torch.minimum(bounded * gain, ratio.clamp(low, high) * gain)
    return cost, (ratio < low) & (gain < 0), (ratio > high) & (gain > 0)


def policy_loss(new: Tensor, rollout: Rollout, config: RolloutConfig, *, share: Share) -> tuple[Tensor, dict]:
    """The clipped policy loss of some rows (a scalar), and sums over their tokens to report.

    new (R, C) log-probabilities with gradient. With ratio = exp(new - old), a token costs
    -min(c1 A, c2 A) + beta k: c1 = min(ratio, delta), c2 = ratio clamped to [1 - epsilon, 1 + epsilon_high].
    `grpo` averages rows of token means; `dapo` tokens, `bnpo` those of a part; `dr_grpo` divides by rows x longest.
    `cispo` averages tokens that cost -c2 A new, c2 without gradient (MiniMax-M1, arXiv 2506.13585).
    """
    mask = rollout.mask.to(new.dtype)
    lengths = mask.sum(1)  # (R,)
    # outside the mask values are arbitrary: make them 0 before any exponential sees them
    shift = torch.where(mask != 0, new - rollout.old.to(new.dtype), 0.0)
    if config.level == "sequence":
        shift = ((shift * mask).sum(1) / lengths.clamp(min=1)).unsqueeze(1).expand_as(shift)
    ratio = shift.exp()
    cost, below, above = _costs(ratio, new, rollout, config)
    measures = dict(zip(CLIPPED, ((below * mask).sum(), (above * mask).sum()), strict=True))
    measures["tokens"] = mask.sum()
    if rollout.taught is not None:
        cost = cost * rollout.taught.to(new.dtype)
    if rollout.reference is not None:
        apart = torch.where(mask != 0, rollout.reference.to(new.dtype) - new, 0.0)
        divergence = _divergence(config.kl, apart) * (ratio if config.kl_ratio else 1)
        held = 1 if rollout.held is None else rollout.held.to(new.dtype).unsqueeze(1)  # (R, 1)
        cost = cost + config.beta * held * divergence
        measures["kl_div"] = (divergence * mask).sum()
    cost = cost * mask
    if config.loss == "grpo":
        total = (cost.sum(1) / lengths.clamp(min=1)).sum() / max(share.rows, 1)
    elif config.loss == "dr_grpo":
        total = cost.sum() / max(share.rows * share.longest, 1)
    elif isinstance(share.tokens, Tensor):
        total = (cost.sum(1) / share.tokens.to(cost)).sum()
    else:
        total = cost.sum() / max(share.tokens, 1)
    return total, {name: float(value.detach()) for name, value in measures.items()}


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
        device = device_of(model)
        share = Share(len(rollout.ids), float(rollout.mask.sum()), config.sampling.max_tokens)
        apart = by_parts(rollout.mask.sum(1), config.part or config.samples) if config.loss == "bnpo" else None
        for rows in rank.mine(len(rollout.ids), micro_batch):
            part = rollout.part(rows)
            share = share if apart is None else replace(share, tokens=apart[rows] if rows.start < rows.stop else 1)
            if not part.mask.any() and not rank.lockstep:
                continue
            part = part.to(device)
            new = completion_logprobs(model, part, config.sampling.temperature, precision)
            loss, measures = policy_loss(new, part, config, share=share)
            if report is not None:
                report(measures)
            yield loss

    return losses
