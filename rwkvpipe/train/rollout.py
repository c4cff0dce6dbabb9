"""What GRPO learns from: completions sampled with the current policy, graded, with their log-probabilities."""

import math
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor, nn

from rwkvpipe.base.config import RolloutConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.base.tuning import UNCLIPPED
from rwkvpipe.infer.engine import Completion, Engine
from rwkvpipe.tasks.registry import reward
from rwkvpipe.tokenizer.load import Tokenizer
from rwkvpipe.train.advantage import Bounds, advantages, normalised
from rwkvpipe.train.hooks import Shaping
from rwkvpipe.train.loop import step_seed
from rwkvpipe.train.own import draw_from
from rwkvpipe.train.policy import CLIPPED, Rollout, completion_logprobs, most_uncertain
from rwkvpipe.train.question import Question, Room, drawn
from rwkvpipe.train.record import Log
from rwkvpipe.train.reference import Reference
from rwkvpipe.train.reward import Rewards, spreads
from rwkvpipe.train.stage import Stage


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
        clipped = () if self.config.loss in UNCLIPPED else CLIPPED
        names = ["tokens", "train_loss", *clipped, *(["kl_div"] if self.config.beta > 0 else [])]
        sums = self.stage.rank.total(*(sum(part[name] for part in self.parts) for name in names))
        self.parts.clear()
        found = dict(zip(names, sums, strict=True))
        tokens, loss = max(found.pop("tokens"), 1), found.pop("train_loss")
        shares = {name: value / tokens for name, value in found.items()}
        if clipped:
            shares["clip_ratio"] = shares["clip_ratio/region_mean"] = sum(shares[name] for name in clipped)
        return {"train_loss": loss} | self.facts | shares

    def sample(self, step: int) -> Rollout:
        """Ask, answer, grade: the rollout that starts at `step`."""
        settings, samples = self.stage.settings, self.config.samples
        number = step // self.span
        asked = [self.questions[i] for i in drawn(len(self.questions), settings.train, number, self.stage.seed)]
        seed = step_seed(step_seed(self.stage.seed, self.config.sampling.seed), number)
        sampling = self.config.sampling.model_copy(update={"seed": seed})
        model, rank = self.stage.model, self.stage.rank
        model.eval()
        with self.stage.writing() as whole:
            engine = Engine(whole, self.tokenizer, 4 * self.micro_batch)
            own = range(rank.index, len(asked), rank.count)
            given = list(engine.generate([asked[n].ids for n in own], sampling, samples, numbers=own))
        found = [Completion(**fields) for part in rank.gather(list(map(asdict, given))) for fields in part]
        found.sort(key=lambda completion: (completion.prompt, completion.sample))
        texts = ([asked[c.prompt].row for c in found], [asked[c.prompt].prompt for c in found])
        draw_from(seed)
        shaped = rank.gather(self.shaping(*texts, found) if not rank.index else None)[0]
        found, counts, foreign = self.shaping.read(found, shaped)
        # one process grades for all: a function of the user's may draw lots
        given = rank.gather(self.rewards(*texts, found) if not rank.index else None)[0]
        grades = torch.tensor(given, dtype=torch.float64)
        rewards = self.rewards.total(grades)
        rollout = self.with_logprobs(self.arrange(asked, found, self.gains(rewards, grades), counts))
        self.facts |= self.describe(found, rewards, rollout, foreign) | self.rewards.facts(grades)
        self.tell(step, asked, found, (rollout, rewards, grades, seed))
        model.train()
        return rollout

    def gains(self, rewards: Tensor, grades: Tensor) -> Tensor:
        """Advantages (N,) from the rewards (N,), which are sums of grades (N, F)."""
        config, apart = self.config, None
        if config.aggregate == "normalize_then_sum":
            apart = normalised(grades, self.rewards.weights.values(), config.samples)
        return advantages(rewards, config.samples, config.scale, bounds=bounds(config), apart=apart)

    def tell(self, step: int, asked: list[Question], found: list[Completion], what: tuple) -> None:
        """Write the first completions of a rollout down."""
        (rollout, rewards, grades, seed), names = what, list(self.rewards.weights)

        def known(value: float) -> float | None:
            return None if math.isnan(value) else value

        for row, completion in enumerate(found[: self.config.kept]):
            told = {"step": step + 1, "question": completion.prompt, "sample": completion.sample}
            question = asked[completion.prompt]
            told |= {
                "line": question.line,
                "prompt": self.tokenizer.decode(question.ids) if question.cut else question.prompt,
            }
            told |= {"text": completion.text, "ids": completion.ids}
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
        """The same with old and, where divergence counts, reference log-probabilities by the trainer's own forward,
        and with what part of the loss each token and row has."""
        config, fields = self.config, dict(vars(rollout))
        fields["old"], entropy = self.logprobs(self.stage.model, rollout, uncertain=True)
        tokens = int((rollout.mask != 0).sum())
        self.facts = {"entropy": float(entropy.double().sum()) / max(tokens, 1)}
        if config.top_entropy < 1:
            fields["taught"] = most_uncertain(entropy, rollout.mask, config.top_entropy)
        if config.beta > 0:
            with self.stage.begun() as first:
                fields["reference"], _ = self.logprobs(first, rollout)
            if not config.kl_equal:
                groups = rollout.advantages.view(-1, config.samples) != 0
                fields["held"] = groups.any(1).float().repeat_interleave(config.samples)
        return Rollout(**fields)

    def logprobs(self, model: nn.Module, rollout: Rollout, uncertain: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities (R, C) on the CPU, `micro_batch` rows at a time; and, if asked, entropies (R, C)."""
        found, entropy = torch.zeros_like(rollout.mask), torch.zeros_like(rollout.mask)
        settings, rank = self.stage.settings, self.stage.rank
        for part in rank.mine(len(found), self.micro_batch):
            rows, told = rollout.part(part), [] if uncertain else None
            if rows.mask.any() or rank.lockstep:
                given = rows.to(rank.device), self.config.sampling.temperature, settings.train.precision
                values = completion_logprobs(model, *given, told)
                found[part, : values.shape[1]] = values.cpu()
                if uncertain:
                    entropy[part, : values.shape[1]] = told[0].cpu()
        return rank.sum(found), rank.sum(entropy) if uncertain else entropy

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


def check_fits(stage: Stage) -> Room:
    """What room there is for prompts beside completions. Raises ConfigError for settings that exclude each other."""
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
    return Room(longest, rollout.long)
