"""What GRPO learns from: completions sampled with the current policy, graded, with their log-probabilities."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkvpipe.base.config import RolloutConfig, TrainConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import read_jsonl
from rwkvpipe.infer.engine import Completion, Engine
from rwkvpipe.tasks.registry import reward
from rwkvpipe.tokenizer.load import Tokenizer
from rwkvpipe.train.hooks import Shaping
from rwkvpipe.train.loop import step_seed
from rwkvpipe.train.policy import CLIPPED, Bounds, Rollout, advantages, completion_logprobs
from rwkvpipe.train.record import Log
from rwkvpipe.train.reference import Reference
from rwkvpipe.train.reward import Rewards, spreads
from rwkvpipe.train.stage import Stage
from rwkvpipe.weights import lora

Check = Callable[[dict], None]
"""Raises DataError for a row that cannot be graded."""


@dataclass(frozen=True)
class Question:
    """A row of the question file, the text that the model reads, and its ids."""

    row: dict
    prompt: str
    ids: list[int]


def read_questions(
    path: Path, prompt_of: Callable[[dict], str], tokenizer: Tokenizer, longest: int, checks: Sequence[Check] = ()
) -> list[Question]:
    """Questions as prompts of at most `longest` tokens, each judged by `checks`.

    Raises DataError naming the line of one that does not do.
    """
    found = []
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            if not isinstance(row.get("question"), str):
                raise DataError("no text under `question`")
            for check in checks:
                check(row)
            prompt = prompt_of(row)
            ids = tokenizer.encode(prompt)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        if not 1 <= len(ids) <= longest:
            raise DataError(
                f"{path}:{number}: the prompt has {len(ids)} tokens; 1 to {longest} leave room for the completion"
                " (train.ctx_len less rollout.sampling.max_tokens)"
            )
        found.append(Question(row, prompt, ids))
    if not found:
        raise DataError(f"{path}: no questions in it")
    return found


def drawn(count: int, config: TrainConfig, step: int, seed: int) -> list[int]:
    """Which of `count` questions step `step` asks: passes over all of them, each in an order of its own."""
    chosen = []
    for place in range(step * config.batch, (step + 1) * config.batch):
        epoch, index = divmod(place, count)
        if config.order != "sequential":
            stream = torch.Generator().manual_seed(step_seed(seed, epoch))
            index = int(torch.randperm(count, generator=stream)[index])
        chosen.append(index)
    return chosen


class Sampler:
    """The batches of GRPO: a rollout every `span` steps, a function of seed, step and the weights then."""

    def __init__(self, stage: Stage, questions: list[Question], tokenizer: Tokenizer, micro_batch: int):
        self.stage, self.questions, self.tokenizer, self.micro_batch = stage, questions, tokenizer, micro_batch
        self.config = stage.settings.rollout
        self.rewards, self.shaping = Rewards(self.config, reward), Shaping(self.config, tokenizer)
        self.span = self.config.iterations * self.config.slices
        """Steps that learn from one rollout."""
        self.log = Log(stage.folder / "rollouts.jsonl", stage.rank)
        self.current: Rollout | None = None
        self.facts: dict[str, float] = {}
        self.parts: list[dict] = []
        self.reference = Reference(stage)

    def batches(self, first_step: int, carried: dict[str, Tensor]) -> Iterator[Rollout]:
        """Rollouts from step `first_step` on; `carried` is what `carry` gave at the resume point."""
        self.log.cut(first_step)
        carried = self.reference.restore(carried)
        if carried:
            facts = {name: value for name, value in carried.items() if name.startswith("fact/")}
            self.facts = {name.removeprefix("fact/"): float(value) for name, value in facts.items()}
            carried = {name: value for name, value in carried.items() if name not in facts}
            self.current = Rollout(**{name: value for name, value in carried.items()})
        step = first_step
        while True:
            self.reference.follow(step)
            if step % self.span == 0 or self.current is None:
                self.current = self.sample(step)
            yield self.slice(step)
            step += 1

    def slice(self, step: int) -> Rollout:
        """What one step learns from: all completions, or its part of them, mixed by lot."""
        if self.config.slices == 1:
            return self.current
        stream = torch.Generator().manual_seed(step_seed(step_seed(self.stage.seed, -1), step // self.span))
        mixed = torch.randperm(len(self.current.ids), generator=stream)
        return self.current.rows(mixed.view(self.config.slices, -1)[step % self.config.slices])

    def read(self, step: int) -> str:
        """Which questions a step learns from, by their lines."""
        asked = drawn(len(self.questions), self.stage.settings.train, step // self.span, self.stage.seed)
        return f"questions {', '.join(str(number + 1) for number in sorted(asked))}"

    def carry(self) -> dict[str, Tensor]:
        """What is needed to go on in the middle of the steps on one rollout."""
        kept = self.reference.carry()
        if self.span == 1 or self.current is None:
            return kept
        facts = {f"fact/{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.facts.items()}
        return {name: value for name, value in vars(self.current).items() if value is not None} | facts | kept

    def measures(self) -> dict[str, float]:
        """Numbers of the step just made."""
        names = ["tokens", *CLIPPED, *(["kl_div"] if self.config.beta > 0 else [])]
        sums = self.stage.rank.total(*(sum(part[name] for part in self.parts) for name in names))
        self.parts.clear()
        found = dict(zip(names, sums, strict=True))
        tokens = max(found.pop("tokens"), 1)
        shares = {name: value / tokens for name, value in found.items()}
        shares["clip_ratio"] = shares["clip_ratio/region_mean"] = sum(shares[name] for name in CLIPPED)
        return self.facts | shares

    def sample(self, step: int) -> Rollout:
        """Ask, answer, grade: the rollout that starts at `step`."""
        settings, samples = self.stage.settings, self.config.samples
        number = step // self.span
        asked = [self.questions[i] for i in drawn(len(self.questions), settings.train, number, self.stage.seed)]
        seed = step_seed(step_seed(self.stage.seed, self.config.sampling.seed), number)
        sampling = self.config.sampling.model_copy(update={"seed": seed})
        model, rank = self.stage.model, self.stage.rank
        model.eval()
        with lora.folded(model) if settings.lora else nullcontext():
            engine = Engine(model, self.tokenizer, 4 * self.micro_batch)
            own = range(rank.index, len(asked), rank.count)
            given = list(engine.generate([asked[n].prompt for n in own], sampling, samples, numbers=own))
        found = [Completion(**fields) for part in rank.gather(list(map(asdict, given))) for fields in part]
        found.sort(key=lambda completion: (completion.prompt, completion.sample))
        texts = ([asked[c.prompt].row for c in found], [asked[c.prompt].prompt for c in found])
        shaped = rank.gather(self.shaping(*texts, found) if not rank.index else None)[0]
        found, counts, foreign = self.shaping.read(found, shaped)
        # one process grades for all: a function of the user's may draw lots
        grades = torch.tensor(rank.gather(self.rewards(*texts, found) if not rank.index else None)[0])
        rewards = self.rewards.total(grades.double())
        gains = advantages(rewards, samples, self.config.scale, bounds=bounds(self.config))
        rollout = self.with_logprobs(self.arrange(asked, found, gains, counts))
        self.facts |= self.describe(found, rewards, rollout, foreign) | self.rewards.facts(grades)
        self.tell(step, asked, found, (rollout, rewards, grades, seed))
        model.train()
        return rollout

    def tell(self, step: int, asked: list[Question], found: list[Completion], what: tuple) -> None:
        """Write the first completions of a rollout down."""
        (rollout, rewards, grades, seed), names = what, list(self.rewards.weights)

        def known(value: float) -> float | None:
            return None if math.isnan(value) else value

        for row, completion in enumerate(found[: self.config.kept]):
            told = {"step": step + 1, "question": completion.prompt, "sample": completion.sample}
            told |= {"prompt": asked[completion.prompt].prompt, "text": completion.text, "ids": completion.ids}
            told |= {"length": len(completion.ids), "finish": completion.finish, "seed": seed}
            told |= {"reward": known(float(rewards[row]))}
            told |= {"rewards": dict(zip(names, map(known, grades[row].tolist()), strict=True))}
            told |= {"advantage": float(rollout.advantages[row]), "logprob": float(rollout.old[row].sum())}
            if rollout.reference is not None:
                told["reference_logprob"] = float(rollout.reference[row].sum())
            self.log.add(told)

    def arrange(
        self, asked: list[Question], found: list[Completion], gains: Tensor, counts: list[list[float]] | None = None
    ) -> Rollout:
        """Rows of prompt plus completion, padded on the right; completions that did not end may be masked out.

        `counts` says how much each token counts; left out, all alike.
        """
        width = max(len(asked[c.prompt].ids) + len(c.ids) for c in found)
        longest = max(1, *(len(c.ids) for c in found))
        ids = torch.zeros(len(found), max(width, 2), dtype=torch.long)
        mask = torch.zeros(len(found), longest)
        first = torch.tensor([len(asked[c.prompt].ids) for c in found])
        for row, completion in enumerate(found):
            whole = asked[completion.prompt].ids + completion.ids
            ids[row, : len(whole)] = torch.tensor(whole)
            if not (self.config.mask_truncated and completion.finish == "length"):
                mask[row, : len(completion.ids)] = 1 if counts is None else torch.tensor(counts[row])
        return Rollout(ids, first, mask, gains.float(), torch.zeros_like(mask))

    @torch.no_grad()
    def with_logprobs(self, rollout: Rollout) -> Rollout:
        """The same with old and, where divergence counts, reference log-probabilities by the trainer's own forward."""
        model, fields = self.stage.model, dict(vars(rollout))
        told: list[float] = []
        fields["old"] = self.logprobs(model, rollout, told)
        entropy, tokens = self.stage.rank.total(sum(told))[0], int((rollout.mask != 0).sum())
        self.facts = {"entropy": entropy / max(tokens, 1)}
        if self.config.beta > 0:
            with self.reference.model() as first:
                fields["reference"] = self.logprobs(first, rollout)
        return Rollout(**fields)

    def logprobs(self, model: torch.nn.Module, rollout: Rollout, told: list[float] | None = None) -> Tensor:
        """Log-probabilities (R, C) on the CPU, `micro_batch` rows at a time; `told` is given sums of entropies."""
        found = torch.zeros_like(rollout.mask)
        for part in self.stage.rank.mine(len(found), self.micro_batch):
            rows = rollout.rows(part)
            if rows.mask.any():
                values = completion_logprobs(
                    model,
                    rows.to(self.stage.rank.device),
                    self.config.sampling.temperature,
                    self.stage.settings.train.precision,
                    told,
                )
                found[part, : values.shape[1]] = values.cpu()
        return self.stage.rank.sum(found)

    def describe(
        self, found: list[Completion], rewards: Tensor, rollout: Rollout, foreign: set[int]
    ) -> dict[str, float]:
        """Facts of a rollout for the metrics. The sampler did not draw the tokens of `foreign` completions."""
        groups = rewards.view(-1, self.config.samples)
        known = ~groups.isnan()
        mean = groups.nansum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
        spread = ((groups - mean).nan_to_num().square().sum(1) / (known.sum(1) - 1).clamp(min=1)).sqrt()
        sampled = torch.zeros_like(rollout.old)
        drawn_here = rollout.mask != 0
        for row, completion in enumerate(found):
            if row in foreign:
                drawn_here[row] = False
            else:
                sampled[row, : len(completion.logprobs)] = torch.tensor(completion.logprobs)
        apart = (sampled - rollout.old).abs() * drawn_here
        gap = apart.sum() / drawn_here.sum().clamp(min=1)
        lengths = [len(completion.ids) for completion in found]
        ended = [len(completion.ids) for completion in found if completion.finish != "length"]
        graded = spreads("reward", rewards)
        return {
            **({"mean_reward": graded["reward/mean"], "reward_std": float(spread.mean())} if graded else {}),
            **graded,
            "mean_advantage": float(rollout.advantages.mean()),
            "frac_reward_zero_std": float((spread == 0).double().mean()),
            **spans("completions/{}_length", lengths),
            **spans("completions/{}_terminated_length", ended),
            "completions/clipped_ratio": 1 - len(ended) / len(found),
            "sampler_gap": float(gap),
            "sampler_gap_largest": float(apart.max()),
        }


def bounds(config: RolloutConfig) -> Bounds:
    """What the settings ask to be done to advantages."""
    share = 0.01 if config.low_reward_scale is None else config.low_reward_scale
    return Bounds(config.advantage_clip, config.low_reward, share)


def spans(name: str, numbers: list[int]) -> dict[str, float]:
    """Mean, least and largest of some numbers, each under its name; nothing of none."""
    if not numbers:
        return {}
    found = {"mean": sum(numbers) / len(numbers), "min": min(numbers), "max": max(numbers)}
    return {name.format(kind): value for kind, value in found.items()}


def check_fits(stage: Stage) -> int:
    """Longest prompt that leaves room for a completion. Raises ConfigError for settings that exclude each other."""
    settings, rollout = stage.settings, stage.settings.rollout
    longest = settings.train.ctx_len - rollout.sampling.max_tokens
    if longest < 1:
        raise ConfigError(
            f"train.ctx_len: {settings.train.ctx_len} holds no prompt beside a completion of"
            f" rollout.sampling.max_tokens {rollout.sampling.max_tokens}; raise it"
        )
    if rollout.sampling.temperature == 0:
        raise ConfigError("rollout.sampling.temperature: at 0 all samples of a prompt are the same; raise it")
    completions = settings.train.batch * rollout.samples
    if completions % rollout.slices:
        raise ConfigError(
            f"rollout.slices: {completions} completions (train.batch times rollout.samples) are not cut into"
            f" {rollout.slices} equal parts"
        )
    if settings.train.chunk is not None:
        raise ConfigError("train.chunk: belongs to pretrain and sft; a rollout is scored whole")
    if rollout.sync is not None and settings.apart:
        raise ConfigError("rollout.sync: the start of an adapter is the model without it, which cannot move; leave out")
    if settings.lora is not None and settings.lora.dropout:
        raise ConfigError("lora.dropout: a policy is compared with itself, which needs dropout 0 in grpo")
    return longest
