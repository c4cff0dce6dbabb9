"""How weights are moved: the settings of `train`, which every kind of stage has."""

from typing import Literal

from pydantic import model_validator

from rwkvpipe.base.strict import Count, Fading, NotNegative, Positive, Share, Strict, Whole
from rwkvpipe.base.tuning import WatchConfig


class TrainConfig(Strict):
    """How weights are moved."""

    steps: Count | None = None
    """Optimizer steps. Give one of steps, epochs and tokens."""
    epochs: Positive | None = None
    """Passes over the corpus, or a part of one; rounded up to whole steps."""
    tokens: Count | None = None
    """pretrain, rows of the stream: tokens read in all; rounded up to whole steps."""
    ctx_len: Count = 512
    """Tokens a row; for grpo and dpo, the longest prompt plus completion."""
    batch: Count = 16
    """Rows a step over all devices; for grpo prompts, for dpo pairs of answers."""
    lr: Positive = 6e-4
    """Highest learning rate."""
    lr_final: NotNegative | None = None
    """Rate at the end; left out, a tenth of lr. Not for constant."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "rwkv", "rwkv_exp", "rwkv_mean"] = "cosine"
    """How the rate falls: wsd stays at lr, then falls linearly over the last `decay` of the steps; rwkv is
    RWKV-LM's cosine, counted from 0 in steps, or in tokens where `tokens` says how long, and warming up from a
    hundredth of lr; rwkv_exp what it does without a number of tokens: each step by the same factor; rwkv_mean what it
    does with a negative one: the mean of both."""
    exp_steps: Count | None = None
    """rwkv_exp, rwkv_mean: steps after which the rate that falls by the same factor is lr_final (RWKV-LM's epoch_count
    times epoch_steps); left out, all."""
    begun: Whole = 0
    """rwkv, rwkv_exp, rwkv_mean, in pretrain and sft: how many of the steps were made before this stage, as before a
    restart of RWKV-LM: rates and rows go on behind them, and the rate warms up again."""
    warmup: Whole = 10
    """Steps over which the rate rises to lr."""
    decay: Share | None = None
    """wsd: share of the steps in which it falls; left out, 0.2."""
    weight_decay: NotNegative = 0.001
    """Decoupled decay of the `.weight` matrices."""
    weight_decay_final: Positive | None = None
    """rwkv, rwkv_exp, rwkv_mean: the decay at the end, to which it moves by the same factor each step, as in RWKV-LM;
    left out, it stays."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps Adam's moments in 8 bits a number, by the library bitsandbytes, whose own eps is 1e-8."""
    betas: tuple[Fading, Fading] = (0.9, 0.99)
    """Adam's moments."""
    eps: Positive = 1e-18
    """Adam's epsilon."""
    clip: Positive = 1.0
    """Largest global norm of the gradient."""
    l2_wrap: NotNegative = 1e-4
    """Pull on the largest logit (RWKV's L2Wrap) in pretrain and sft; 0 is none."""
    chunk: Count | None = None
    """Infinite context: rows are read so many tokens at a time, the state carried on, so that memory does not grow
    with ctx_len; left out, whole."""
    bptt: Literal["truncated", "full"] | None = None
    """chunk: whether the gradient ends where a chunk begins (truncated, if left out) or is that of the whole row,
    for one forward more (full)."""
    order: Literal["magic", "shuffled", "sequential"] = "shuffled"
    """How rows are drawn: RWKV-LM's magic prime, shuffled epochs, or as they stand."""
    rows: Literal["stream", "documents", "packed"] | None = None
    """What a row is. stream: ctx_len tokens, borders of documents ignored (pretrain, if left out); documents: a
    document, padded (sft, if left out); packed: documents put together up to ctx_len (best fit), each begun anew, so
    that one counts as it would alone. A longer one than ctx_len becomes several in pretrain, and is cut in sft."""
    seed: Whole | None = None
    """Order, dropout and sampling; left out, the run's seed."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the matrix products; weights, their moments, state and loss stay fp32. fp16 is for GPUs alone."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    valid_every: Whole = 0
    """Steps between measurements of the held-out loss; 0: only at the end."""
    watch: WatchConfig = WatchConfig()
    """Best weights, an early end, steps that went wrong."""

    @model_validator(mode="after")
    def _fits(self):
        if sum(length is not None for length in (self.steps, self.epochs, self.tokens)) != 1:
            raise ValueError("give one of steps, epochs and tokens: it says how long")
        if self.tokens is not None and self.rows in ("documents", "packed"):
            raise ValueError("tokens counts those of a stream: rows of documents differ in length; give epochs")
        if (self.watch.best or self.watch.patience) and not self.valid_every:
            raise ValueError("watch.best and watch.patience look at the held-out loss: give valid_every, too")
        self._as_rwkv_lm()
        if self.decay is not None and self.schedule != "wsd":
            raise ValueError(f"decay belongs to schedule wsd, this is {self.schedule}")
        if self.lr_final not in (None, self.lr) and self.schedule == "constant":
            raise ValueError("lr_final: schedule constant never falls; choose wsd, or leave it out")
        if self.chunk is not None and self.chunk >= self.ctx_len:
            raise ValueError(f"chunk: {self.chunk} tokens are whole rows of ctx_len {self.ctx_len}; lower it")
        if self.bptt is not None and self.chunk is None:
            raise ValueError("bptt says how gradients cross chunks: give chunk, too")
        if self.rows in ("documents", "packed") and self.order == "magic":
            raise ValueError("order magic reads one stream of tokens; rows of documents come shuffled or sequential")
        return self

    def _as_rwkv_lm(self) -> None:
        """Raise ValueError for settings of RWKV-LM's schedules that would say nothing."""
        theirs = self.schedule.startswith("rwkv")
        if self.weight_decay_final is not None and not (theirs and self.weight_decay):
            raise ValueError(
                "weight_decay_final belongs to schedules rwkv, rwkv_exp and rwkv_mean, with a weight_decay"
            )
        if self.begun and not theirs:
            raise ValueError("begun belongs to schedules rwkv, rwkv_exp and rwkv_mean: only they know a restart")
        if self.steps is not None and self.begun >= self.steps:
            raise ValueError(f"begun: {self.begun} of {self.steps} steps are made, and none is left; raise steps")
        if self.exp_steps is not None and (self.schedule not in ("rwkv_exp", "rwkv_mean")):
            raise ValueError("exp_steps belongs to schedules rwkv_exp and rwkv_mean")
        if self.exp_steps is not None and self.exp_steps <= self.warmup:
            raise ValueError(f"exp_steps: {self.exp_steps} are over before the {self.warmup} of warmup; raise them")
