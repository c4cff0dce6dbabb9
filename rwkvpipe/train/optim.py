"""How weights move: the learning rate of a step, the parameter groups, AdamW."""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import nn
from torch.optim.adamw import adamw as functional

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.train.eightbit import EightBit


@dataclass(frozen=True)
class RwkvLmSchedule:
    """RWKV-LM's own schedule, in its own terms (tokens and epochs)."""

    lr_init: float
    lr_final: float
    warmup: int = 10
    tokens: int = 8192
    """Tokens an optimizer step: ctx_len times rows."""
    exit_tokens: float = 0
    """Training ends there; negative: the mean of the cosine and the exponential rate; 0: epochs decide."""
    epoch_begin: int = 0
    epoch_steps: int = 2520
    epoch_count: int = 100
    decay_begin: int = 0
    """Epochs before the rate starts to fall (only without exit tokens)."""
    weight_decay: float = 0.0
    weight_decay_final: float = 0.0
    """Above 0, weight decay moves there exponentially."""


def _between(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _by_epochs(schedule: RwkvLmSchedule, done: int) -> tuple[float, float]:
    """Progress in epochs, and the exponential (linear, where a rate is 0) rate there."""
    begin = schedule.decay_begin * schedule.epoch_steps
    span = (schedule.epoch_count - schedule.decay_begin) * schedule.epoch_steps - schedule.warmup
    progress = _between((done - begin - schedule.warmup + 1) / span) if span > 0 else 1.0
    first, last = schedule.lr_init, schedule.lr_final
    if first == 0 or last == 0:
        return progress, first + (last - first) * progress
    return progress, math.exp(math.log(first) + (math.log(last) - math.log(first)) * progress)


def rwkv_lm_lr(schedule: RwkvLmSchedule, step: int) -> tuple[float, float] | None:
    """Learning rate and weight decay of RWKV-LM's trainer at a step of this process, counted from 0.

    None means that training ends before this step. Warmup counts from the start of the process, progress
    from the start of training, as there.
    """
    done = step + schedule.epoch_begin * schedule.epoch_steps
    if schedule.exit_tokens != 0:
        warm = schedule.warmup * schedule.tokens
        span = abs(schedule.exit_tokens) - warm
        progress = _between((done * schedule.tokens - warm) / span) if span > 0 else 1.0
        if progress >= 1:
            return None
        share = schedule.lr_final / schedule.lr_init
        rate = schedule.lr_init * ((0.5 + share / 2) + (0.5 - share / 2) * math.cos(math.pi * progress))
        if schedule.exit_tokens < 0:
            rate = (rate + _by_epochs(schedule, done)[1]) / 2
    elif schedule.lr_init == schedule.lr_final or schedule.epoch_count == 0:
        progress, rate = 0.0, schedule.lr_init
    else:
        progress, rate = _by_epochs(schedule, done)
    if step < schedule.warmup:
        rate *= 0.01 + 0.99 * step / schedule.warmup
    decay = schedule.weight_decay
    if schedule.weight_decay_final > 0:
        decay *= (schedule.weight_decay_final / decay) ** progress
    return rate, decay


def whole_length(config: TrainConfig, rows: int, repeats: int = 1) -> TrainConfig:
    """The same in steps, where a pass has `rows` rows and each batch is learned from `repeats` times.

    Those that were made before (`begun`) are none of them. Raises ConfigError when nothing is left.
    """
    if config.epochs is not None:
        steps = math.ceil(Fraction(str(config.epochs)) * rows / config.batch) * repeats
    elif config.tokens is not None:
        steps = -(-config.tokens // (config.batch * config.ctx_len))
    else:
        steps = config.steps
    if steps <= config.begun:
        raise ConfigError(f"train.begun: {config.begun} of {steps} steps are made, and none is left")
    return config.model_copy(update={"steps": steps - config.begun})


def _last(config: TrainConfig) -> float:
    return config.lr / 10 if config.lr_final is None else config.lr_final


def _falling(config: TrainConfig) -> int:
    """The last steps, in which the rate of wsd falls."""
    return round((0.2 if config.decay is None else config.decay) * config.steps)


def _rwkv_lm(config: TrainConfig) -> RwkvLmSchedule:
    """RWKV-LM's schedule of a stage: a cosine of its tokens (or, if not given, steps), exponential, or their mean."""
    whole = config.steps + config.begun
    # a run shorter than its warmup would end untrained there; here it only warms up
    steps = whole if whole > config.warmup else 2 * config.warmup + whole
    tokens, exit_tokens = 1, steps
    if config.tokens is not None and steps == whole:
        tokens, exit_tokens = config.batch * config.ctx_len, config.tokens
    exit_tokens *= {"rwkv": 1, "rwkv_exp": 0, "rwkv_mean": -1}[config.schedule]
    far = config.exp_steps or steps
    decays = config.weight_decay, config.weight_decay_final or 0.0
    return RwkvLmSchedule(
        config.lr, _last(config), config.warmup, tokens, exit_tokens, config.begun, 1, far, 0, *decays
    )


def decay_at(config: TrainConfig, step: int) -> float:
    """Weight decay of the step after `step` finished ones."""
    if config.weight_decay_final is None:
        return config.weight_decay
    found = rwkv_lm_lr(_rwkv_lm(config), step)
    return config.weight_decay_final if found is None else found[1]


def lr_at(config: TrainConfig, step: int) -> float:
    """Learning rate of the step after `step` finished ones; the first is above 0.

    With n = step + 1: lr n / warmup while n <= warmup, then from lr to lr_final over the steps that are left.
    Schedules that begin with `rwkv` are RWKV-LM's instead: counted from 0, warming up from a hundredth.
    """
    last = _last(config)
    if config.schedule.startswith("rwkv") and config.steps + config.begun > 1:
        found = rwkv_lm_lr(_rwkv_lm(config), step)
        return last if found is None else found[0]
    number = step + 1
    if number <= config.warmup:
        return config.lr * number / config.warmup
    if config.schedule == "constant" or config.steps == 1:
        return config.lr
    begin = config.warmup
    if config.schedule == "wsd":
        begin = max(begin, config.steps - _falling(config))
    fallen = _between((number - begin) / (config.steps - begin)) if config.steps > begin else 0.0
    if not fallen:  # to the last digit that of `constant`, which wsd may go on from
        return config.lr
    if config.schedule == "cosine":
        return last + (config.lr - last) * (0.5 + 0.5 * math.cos(math.pi * fallen))
    return last + (config.lr - last) * (1 - fallen)


def same_until(config: TrainConfig) -> int:
    """The step up to which rates do not depend on how long training goes on: 0 for schedules that fall all along."""
    if config.schedule == "constant":
        return config.steps
    return max(config.warmup, config.steps - _falling(config)) if config.schedule == "wsd" else 0


def _rule(name: str, tensor: torch.Tensor, weight_decay: float) -> tuple[float, float]:
    """RWKV-LM's rule for all families: (scale of the learning rate, weight decay); the first that fits."""
    last = name.rpartition(".")[2]
    if name.endswith("att.w0") or last == "time_decay":
        return 2.0, 0.0
    if last == "time_state" or (last == "weight" and tensor.squeeze().dim() >= 2):
        return 1.0, weight_decay
    return 1.0, 0.0


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Trainable parameters by their rule: groups with `params`, `names`, `lr_scale` and `weight_decay`.

    att.w0 and time_decay move at twice the rate; only `.weight` matrices and initial states decay; all else is plain.
    Frozen tensors are left out.
    """
    groups: dict[tuple[float, float], dict] = {}
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        scale, decay = _rule(name, tensor, config.weight_decay)
        fresh = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay, "lr": config.lr * scale}
        group = groups.setdefault((scale, decay), fresh)
        group["params"].append(tensor)
        group["names"].append(name)
    return list(groups.values())


class AdamW:
    """Adam with decoupled weight decay, as torch.optim.AdamW computes it.

    The moments are there from the start: made in the first step they would lie among what that step holds for its
    backward, and tear the memory to pieces. And torch's class imports its compiler, 80 MB in seconds.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float):
        self.param_groups, self.betas, self.eps = groups, betas, eps
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        for group in groups:
            for value in group["params"]:
                zeros = {name: torch.zeros_like(value) for name in ("exp_avg", "exp_avg_sq")}
                self.state[value] = {"step": torch.zeros((), device=value.device)} | zeros

    @torch.no_grad()
    def step(self) -> None:
        """Move every tensor that has a gradient."""
        for group in self.param_groups:
            moved = [value for value in group["params"] if value.grad is not None]
            kept = [self.state[value] for value in moved]
            first, second, steps = ([each[name] for each in kept] for name in ("exp_avg", "exp_avg_sq", "step"))
            functional(
                moved, [value.grad for value in moved], first, second, [], steps, fused=True, amsgrad=False,
                beta1=self.betas[0], beta2=self.betas[1], lr=group["lr"], weight_decay=group["weight_decay"],
                eps=self.eps, maximize=False,
            )  # fmt: skip


def adamw(model: nn.Module, config: TrainConfig) -> AdamW | EightBit:
    """Adam with decoupled weight decay over the groups of the model, its moments in 32 or 8 bits."""
    kind = EightBit if config.optimizer == "adamw8bit" else AdamW
    return kind(parameter_groups(model, config), tuple(config.betas), config.eps)


def set_rate(optimizer: AdamW | EightBit, rate: float, decay: float | None = None) -> None:
    """Give every group its share of the step's learning rate, and those that decay the step's decay, if given."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
        if decay is not None and group["weight_decay"]:
            group["weight_decay"] = decay
