"""What tuning adds to training: adapters beside frozen weights, and how text is sampled and judged."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from rwkvpipe.base.strict import Count, Factor, NotNegative, Part, Penalty, Positive, Real, Share, Strict, Whole

# a task, or a function in a Python file
Judge = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]*|[^:]+\.py:[A-Za-z_][A-Za-z0-9_]*)$")]
# a function in a Python file
Function = Annotated[str, Field(pattern=r"^[^:]+\.py:[A-Za-z_][A-Za-z0-9_]*$")]
# the tag keeps errors to the form that was meant
Reward = Annotated[
    Annotated[Judge, Tag("(one)")] | Annotated[dict[Judge, Real], Tag("(several)")],
    Discriminator(lambda value: "(several)" if isinstance(value, dict) else "(one)"),
]


class LoraConfig(Strict):
    """Adapters beside frozen matrices."""

    kind: Literal["lora", "pissa", "dora", "disha"] = "lora"
    """lora: W + B A; pissa: the same, begun from the largest singular values of W; dora: the same with a trained length
    of each row; disha (Bone, MiSS): rows added to W that repeat along its inputs."""
    rank: Count = 64
    """Inner size; for disha, after how many inputs the rows repeat."""
    alpha: Positive | None = None
    """The adapter is scaled by alpha / rank; left out, twice the rank, and for pissa the rank. Not for disha."""
    svd: Count | None = None
    """pissa: rounds of a randomized SVD, fast for large matrices (16 come close to exact); left out, the exact one."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs set to zero while training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    targets: tuple[str, ...] | None = None
    """Matrices that get an adapter, by the last parts of their path (`att.key`, `ffn.value`); left out, every matrix
    of the blocks: receptance, key, value and output of the time mix, key and value of the channel mix, and in rwkv5
    and rwkv6 the gate of the one and the receptance of the other."""
    quantise: Literal["bf16", "int8", "nf4"] | None = None
    """The frozen matrices that have an adapter in 16, 8 or 4 bits; left out, in fp32. Only training sees them so: the
    adapter is merged into the weights as they were given."""
    full: tuple[str, ...] = ()
    """Tensors trained whole beside them, by the last parts of their path (`ln1`, `att.ln_x`, `att.w0`)."""

    @model_validator(mode="after")
    def _suits(self):
        if self.svd is not None and self.kind != "pissa":
            raise ValueError(f"svd belongs to kind pissa, this is {self.kind}")
        if self.kind == "disha" and (self.alpha is not None or self.rslora):
            raise ValueError("alpha and rslora do nothing in kind disha, which is not scaled")
        if self.targets == () and not self.full:
            raise ValueError("targets and full are empty, so nothing would be trained; leave targets out, or name some")
        return self


class WatchConfig(Strict):
    """What a training looks out for as it goes."""

    best: bool = False
    """Keep the weights of the lowest held-out loss, too: best.safetensors. Needs train.valid_every."""
    patience: Count | None = None
    """End after so many held-out losses in a row that are no lower than the lowest; left out, never."""
    bad: Literal["stop", "skip"] = "stop"
    """What is done where a loss or gradient is no number, or a spike: end, or go on without the step. It is named, and
    the documents it read."""
    spike: Annotated[Real, Field(gt=1)] | None = None
    """So many times the gradient's usual norm (its running mean, of about 20 steps) is a spike; left out, none is."""


class DpoConfig(Strict):
    """DPO: how answers that people prefer are told from others."""

    beta: Positive = 0.1
    """How much a preference counts beside the divergence from the starting model."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """DPO's own; ipo draws the difference, a token, towards 1 / (2 beta) instead of ever further."""
    smoothing: Annotated[Real, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that may stand the wrong way round."""

    @model_validator(mode="after")
    def _suits(self):
        if self.loss == "ipo" and self.smoothing:
            raise ValueError("smoothing belongs to loss sigmoid")
        return self


class SamplingConfig(Strict):
    """How the next token is chosen."""

    temperature: NotNegative = 1.0
    """0 is the likeliest token."""
    top_k: Whole = 0
    """Only the k likeliest; 0 is all."""
    top_p: Share = 1.0
    """Only the likeliest that together reach this probability."""
    repetition_penalty: Factor = 1.0
    """Divides (multiplies, if negative) the logits of tokens already seen."""
    presence: Penalty = 0.0
    """Taken from the logits of tokens already generated."""
    frequency: Penalty = 0.0
    """Taken from them once for each time."""
    decay: Share = 1.0
    """What is left of those times after every further token (RWKV's demo: 0.996); 1 is all."""
    spare: tuple[int, ...] = ()
    """Ids that no penalty touches."""
    order: Literal["hf", "rwkv"] = "hf"
    """Whether temperature comes before the cuts (hf) or after them (rwkv)."""
    bias: dict[int, Penalty] = {}
    """Added to the logits of these ids."""
    ban: tuple[int, ...] = ()
    """Ids that never come."""
    max_tokens: Annotated[int, Field(ge=1, le=2**20, strict=True)] = 64
    """Longest completion."""
    stop: tuple[str, ...] = ("\n\n",)
    """Texts that end a completion; they do not belong to it."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end it, too; what they stand for does not belong to it."""
    choices: tuple[str, ...] = ()
    """Texts of which the completion is one, whole; left out, it is free."""
    regex: str | None = None
    """A regular expression that the completion, whole, fits; needs the library llguidance."""
    json_schema: dict[str, Any] | None = None
    """A JSON schema that the completion, whole, fits; likewise."""
    seed: Whole = 0
    """Each sample draws from a stream of its own, made of this, the prompt's number and the sample's."""

    @model_validator(mode="after")
    def _one_form(self):
        if sum((bool(self.choices), self.regex is not None, self.json_schema is not None)) > 1:
            raise ValueError("choices, regex and json_schema each say all that a text may be; give one of them")
        return self


UNCLIPPED = ("sapo", "vespo")  # losses of GRPO that bound ratios otherwise


class RolloutConfig(Strict):
    """GRPO: what is sampled and how it is judged."""

    samples: Annotated[int, Field(ge=2, strict=True)] = 8
    """Completions a prompt (a group)."""
    reward: Reward = "answer"
    """The task that grades completions; or `file.py:function`, a function of yours; or several of them with their
    weights, {answer: 1, "rewards.py:short": 0.2}."""
    aggregate: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Several rewards: their weighted sum is compared in its group; or each of them is, divided by its own deviation
    there, then the weighted sum divided by its deviation in the batch (GDPO)."""
    sampling: SamplingConfig = SamplingConfig()
    """How they are sampled."""
    long: Literal["end", "start", "drop", "refuse"] = "end"
    """What is kept of a prompt that leaves no room for sampling.max_tokens within train.ctx_len: its end, or its
    start; or the question is dropped, or refused."""
    loss: Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """Normaliser of the policy loss; cispo: that of dapo, where the clipped ratio weighs the gradient of each token
    and silences none; sapo: that of grpo, ratios bounded softly; luspo: sums of completions, for level sequence; vespo:
    that of dapo, where a smooth weight of the whole completion's ratio stands for it."""
    soft: tuple[Positive, Positive] | None = None
    """sapo: how steeply ratios are bounded where the advantage is positive, and where not; left out, 1 and 1.05."""
    gamma: tuple[Positive, Positive, Positive, Positive] | None = None
    """vespo: k and lambda of its weights where the advantage is not negative, then where it is; left out, 2 3 3 2."""
    part: Count | None = None
    """bnpo: completions in a row whose tokens are averaged, before the parts are; left out, a group."""
    level: Literal["token", "sequence"] = "token"
    """Importance ratios by token or by completion."""
    epsilon: Positive | None = None
    """Lower clip of the ratio; left out, 0.2."""
    epsilon_high: Positive | None = None
    """Upper clip; left out, epsilon."""
    delta: Positive | None = None
    """Upper bound of the ratio where the advantage is negative."""
    off_policy: Positive | None = None
    """A completion of negative advantage counts no more once its tokens are, in the mean, so many nats less likely
    than when they were drawn; left out, it always does."""
    entropy: NotNegative = 0.0
    """Weight of the mean entropy of what the tokens were drawn from, which is made larger."""
    beta: NotNegative = 0.0
    """Weight of the divergence from the starting model."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Its estimator."""
    kl_ratio: bool = False
    """Multiply it by the importance ratio, which corrects the bias of its gradient."""
    kl_equal: bool = True
    """Whether groups in which no advantage is left, all rewards being equal, are held to the start as well."""
    top_entropy: Part = 1.0
    """Share of the tokens, those of the highest entropy when they were drawn, that the reward teaches; the divergence
    is measured at all."""
    scale: Literal["group", "batch", "none"] = "group"
    """What rewards are divided by."""
    advantage_clip: Positive | None = None
    """Largest size of an advantage; left out, there is none."""
    low_reward: Real | None = None
    """Of a group whose best reward is below it, advantages are multiplied by `low_reward_scale`."""
    low_reward_scale: Share | None = None
    """That factor; left out, 0.01."""
    sync: Count | None = None
    """Steps after which the model that divergence is measured from moves towards the trained one, again and again;
    left out, it stays the start. Not for adapters, whose start is the model without them."""
    mixup: Share | None = None
    """sync: how far it moves, 1 being all the way; left out, 0.6."""
    iterations: Count = 1
    """How often the same completions are learned from."""
    slices: Count = 1
    """Optimizer steps that take a part each of the completions, mixed, every time."""
    mask_truncated: bool = False
    """Leave completions that did not end out of the loss."""
    postprocess: Function | None = None
    """`file.py:function`, which changes completions before they are graded."""
    loss_mask: Function | None = None
    """`file.py:function`, which says how much each token of a completion counts."""
    kept: Whole = 4
    """Completions of each rollout that rollouts.jsonl tells."""

    @model_validator(mode="after")
    def _bounds(self):
        if self.loss == "cispo" and self.delta is not None:
            raise ValueError("delta does nothing in loss cispo, whose ratios epsilon and epsilon_high bound")
        for name in ("epsilon", "epsilon_high", "delta"):
            if self.loss in UNCLIPPED and getattr(self, name) is not None:
                raise ValueError(f"{name} does nothing in loss {self.loss}, which clips no ratio")
        for name, loss in (("soft", "sapo"), ("gamma", "vespo")):
            if self.loss != loss and getattr(self, name) is not None:
                raise ValueError(f"{name} belongs to loss {loss}, this is {self.loss}")
        wanted = {"luspo": "sequence", "vespo": "token"}.get(self.loss, self.level)
        if self.level != wanted:
            raise ValueError(f"loss {self.loss} is made for level {wanted}")
        if self.loss != "bnpo" and self.part is not None:
            raise ValueError(f"part belongs to loss bnpo, this is {self.loss}")
        if self.part is not None and self.slices > 1:
            raise ValueError("part counts completions in a row, which slices mix; give one of them")
        if self.kl != "k3" and not self.beta:
            raise ValueError(f"kl {self.kl} estimates a divergence that beta 0 leaves out; give beta")
        if not self.beta and (self.kl_ratio or not self.kl_equal):
            raise ValueError("kl_ratio and kl_equal are about a divergence that beta 0 leaves out; give beta")
        if self.aggregate == "normalize_then_sum" and self.scale != "group":
            raise ValueError(f"scale {self.scale} does nothing where each reward is divided by its own deviation")
        if self.sync is not None and not self.beta:
            raise ValueError("sync moves what a divergence is measured from, which beta 0 leaves out; give beta")
        if self.mixup is not None and self.sync is None:
            raise ValueError("mixup says how far sync moves the reference: give sync, too")
        if self.low_reward_scale is not None and self.low_reward is None:
            raise ValueError("low_reward_scale says what groups below low_reward count: give low_reward, too")
        if not self.rewards or not any(self.rewards.values()):
            raise ValueError("reward: names none, or only such of weight 0")
        return self

    @property
    def rewards(self) -> dict[str, float]:
        """The rewards with their weights; the order in which they are written decides nothing."""
        return dict(sorted(self.reward.items())) if isinstance(self.reward, dict) else {self.reward: 1.0}

    @property
    def files(self) -> dict[str, str]:
        """The Python files of the user's, and the key that names each."""
        named = {name: "reward" for name in self.rewards if ":" in name}
        named |= {name: key for key in ("postprocess", "loss_mask") if (name := getattr(self, key))}
        return {name.rpartition(":")[0]: key for name, key in reversed(named.items())}
