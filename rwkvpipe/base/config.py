"""Every knob there is, as frozen pydantic models that forbid unknown keys.

Defaults stand here and in what it imports (corpus, sizes, training, tuning, vocabulary), nowhere else.
`check(model, value, where)` makes a model of plain values, or one line of error.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from rwkvpipe.base.corpus import CorpusConfig, check_columns
from rwkvpipe.base.files import read_json
from rwkvpipe.base.sizes import RwkvConfig
from rwkvpipe.base.strict import Count, Name, Place, Positive, Strict, Whole, check
from rwkvpipe.base.training import TrainConfig
from rwkvpipe.base.tuning import DpoConfig, LoraConfig, RolloutConfig, SamplingConfig
from rwkvpipe.base.vocabulary import TokenizerConfig


def _off(value: Any) -> Any:
    # YAML 1.1 reads a bare off as false
    return "off" if value is False else value


# names a corpus, or several with weights: the tag keeps errors to the form that was meant
Data = Annotated[
    Annotated[Name, Tag("name")] | Annotated[dict[Name, Positive], Tag("mix")],
    Discriminator(lambda value: "mix" if isinstance(value, dict | list) else "name"),
]
LEAST = 1e-3  # share of a corpus in a mix
Kind = Literal["pretrain", "sft", "dpo", "grpo"]


class BenchmarkConfig(Strict):
    """Questions and how their answers are graded."""

    task: Literal["answer", "choice", "bits"]
    """answer: generated and compared; choice: the likeliest option; bits: bits per byte of a text."""
    path: Place | None = None
    """A JSONL file (for bits: a text file), or a URL."""
    synthetic: str | None = None
    """Or the name of a made corpus."""
    columns: dict[str, str] = {}
    """Our name to the file's: question, answer, options; a path such as data[*].answers.text[0] may stand there."""
    templates: dict[str, str] = {}
    """Our name to a text that puts columns together, such as question: "{context} {ask}"."""
    limit: Count | None = None
    """Only so many questions."""
    prompt: str = "User: {question}\n\nAssistant:"
    """What the model reads."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    """For answer: how it answers."""
    ctx_len: Count = 1024
    """For bits: a document is read in windows of so many tokens, the state carried along."""

    @model_validator(mode="after")
    def _source(self):
        if (self.path is None) == (self.synthetic is None):
            raise ValueError("give one of path and synthetic")
        if self.task != "bits" and "{question}" not in self.prompt:
            raise ValueError("prompt must hold {question}")
        check_columns(self.columns, self.templates)
        return self


Format = Literal["safetensors", "pth", "hub", "hf", "gguf", "peft", "peft_hf"]
ADAPTERS = ("peft", "peft_hf")  # formats of the adapter alone


class ExportConfig(Strict):
    """A result written for other programs."""

    format: Format
    """safetensors; pth: RWKV-LM and the package rwkv; hub: a folder for a hub, with a page for people; hf: the same
    as flash-linear-attention and rwkv7-hf (transformers) read it, RWKV-7 alone; gguf: llama.cpp, RWKV-6 and 7;
    peft: the adapter of a stage with lora as the library PEFT keeps one, peft_hf: for what hf writes."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Numbers of this kind; left out, as they are."""
    name: str | None = None
    """What the model is called; left out, as its file, folder or stage."""
    about: str = ""
    """A paragraph for the page."""
    ctx_len: Count | None = None
    """hub, hf: the longest text it was trained at; left out, the stage's, or 4096."""
    shard_bytes: Count | None = None
    """hub, hf: weights larger than that are written in files of no more, with an index; left out, in one."""

    @model_validator(mode="after")
    def _suits(self):
        if self.format in ADAPTERS and self.shard_bytes is not None:
            raise ValueError(f"shard_bytes belongs to formats hub and hf, this is {self.format}")
        return self


Export = Annotated[
    Annotated[Format, Tag("(format)")] | Annotated[ExportConfig, Tag("(spec)")],
    Discriminator(lambda value: "(format)" if isinstance(value, str) else "(spec)"),
]


class WeightsConfig(Strict):
    """Weights that somebody has trained."""

    path: Place
    """A checkpoint, a URL, or what a hub has: `hf://owner/name/file`, `modelscope://owner/name/file`, with `@revision`
    behind the name if need be; without a file, the repository."""
    adapter: Place | None = None
    """What is merged into it: a folder of PEFT's (adapter_config.json, adapter_model.safetensors) or a file of ours."""
    files: tuple[str, ...] = ()
    """Of a whole repository: patterns of the files fetched; left out, one form of weights and what belongs to it."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """What its digest must be."""
    tokenizer: Name
    """Its vocabulary."""
    bench: tuple[Name, ...] = ()
    """Benchmarks to measure it by."""
    samples: "SamplesConfig | None" = None
    """Text to sample from it."""
    export: tuple[Export, ...] = ()
    """Formats to write it in for other programs."""


class SamplesConfig(Strict):
    """Texts that the model goes on with, for the report."""

    prompts: tuple[str, ...] = ()
    """What it reads, as it stands."""
    path: Place | None = None
    """Or a file of them: JSONL with `prompt`, or `messages` of a talk, in each row; a text with one in each line."""
    sampling: SamplingConfig = SamplingConfig()
    """How it goes on."""

    @model_validator(mode="after")
    def _source(self):
        if (self.path is None) == (not self.prompts):
            raise ValueError("give one of prompts and path")
        return self


class StageConfig(Strict):
    """One step from weights to better weights."""

    name: Name
    """Names its folder in results/<run>/."""
    kind: Kind
    """What is done."""
    data: Data
    """The corpus it learns from; or several with their weights, {stories: 3, code: 1}: of each so large a part of the
    rows comes (pretrain and sft)."""
    start: Name | None = None
    """The stage or the entry of `weights` it starts from; `base.best` means the best weights that stage base keeps
    (train.watch.best), not its last."""
    model: RwkvConfig | None = None
    """Or the sizes of a new model."""
    lora: LoraConfig | None = None
    """Train an adapter instead of the weights."""
    state: bool = False
    """Or the states alone that every text starts from (rwkv6, rwkv7): a small file, which is merged like an adapter."""
    dpo: DpoConfig | None = None
    """dpo only: how strongly answers are preferred."""
    rollout: RolloutConfig | None = None
    """grpo only."""
    prompt: str | None = None
    """grpo only: what the model reads; holds {question}."""
    train: TrainConfig
    """How."""
    bench: tuple[Name, ...] = ()
    """Benchmarks to measure the result by."""
    samples: SamplesConfig | None = None
    """Text to sample from the result."""
    export: tuple[Export, ...] = ()
    """Formats to write the result in for other programs."""
    measure: tuple[Literal["last", "best"], ...] = ("last",)
    """Which of its weights bench, samples and export are about: the last ones, or those of the lowest held-out loss
    (train.watch.best), whose results lie in results/<run>/<stage>.best/; or both."""

    @property
    def shares(self) -> dict[str, float]:
        """The corpora it learns from, with their weights; the order in which they are written decides nothing."""
        return dict(sorted(self.data.items())) if isinstance(self.data, dict) else {self.data: 1.0}

    def _measured(self) -> None:
        """Raise ValueError for weights to measure that there are not, or that nothing is done with."""
        if not self.measure or len(set(self.measure)) != len(self.measure):
            raise ValueError("measure: names last, best, or each of them once")
        if "best" in self.measure and not self.train.watch.best:
            raise ValueError("measure: best weights are kept with train.watch.best and train.valid_every; give these")
        if self.measure != ("last",) and not (self.bench or self.samples or self.export):
            raise ValueError("measure says what bench, samples and export are about: give one of these, too")

    def _mixes(self) -> None:
        """Raise ValueError for corpora and rows that this kind of stage cannot learn from."""
        weights = self.shares.values()
        if not weights:
            raise ValueError("data: names no corpus")
        if min(weights) < LEAST * sum(weights):
            raise ValueError("data: a weight is less than a thousandth of all; leave that corpus out, or give it more")
        if self.train.tokens is not None and self.kind != "pretrain":
            raise ValueError(f"train.tokens belongs to pretrain: rows of {self.kind} differ in length; give epochs")
        if self.train.epochs is not None and len(weights) > 1:
            raise ValueError("train.epochs: several corpora are passed at different times; give steps or tokens")
        if self.kind in ("grpo", "dpo") and len(weights) > 1:
            raise ValueError(f"data: {self.kind} learns from one corpus; put them into one")
        if self.kind in ("grpo", "dpo") and self.train.begun:
            raise ValueError(f"train.begun belongs to pretrain and sft: {self.kind} has no rows to go on behind")
        if self.kind in ("grpo", "dpo") and self.train.rows is not None:
            raise ValueError(f"train.rows belongs to pretrain and sft: a row of {self.kind} is what it judges")
        if self.kind == "sft" and self.train.rows == "stream":
            raise ValueError("train.rows: stream knows no answers; a row of sft is a document, or packed with several")
        if self.train.rows == "packed" and (self.state or (self.model and self.model.time_state)):
            raise ValueError(
                "train.rows: packed begins documents without a memory; states of their own need rows: documents"
            )
        if self.kind != "pretrain" and self.train.order == "magic":
            raise ValueError("train.order: magic reads a stream of tokens, in pretrain; choose shuffled or sequential")

    @property
    def apart(self) -> bool:
        """Whether its result lies beside the weights, an adapter or states, and is merged into them on demand."""
        return self.lora is not None or self.state

    def _judged(self) -> None:
        """Raise ValueError for what does nothing where whole answers are judged."""
        train, kind = self.train, self.kind
        if train.chunk is not None:
            raise ValueError(f"train.chunk belongs to pretrain and sft: {kind} scores answers whole")
        if train.l2_wrap not in (0, TrainConfig.model_fields["l2_wrap"].default):
            raise ValueError(f"train.l2_wrap belongs to pretrain and sft; {kind} has no such pull")
        if train.valid_every:
            raise ValueError(f"train.valid_every belongs to pretrain and sft; {kind} holds nothing out")
        if self.lora is not None and self.lora.dropout:
            raise ValueError(f"lora.dropout: {kind} compares a model with itself, which needs dropout 0")
        if self.model is not None:
            raise ValueError(f"{kind} improves a model that can already answer: give start, not model")

    @model_validator(mode="after")
    def _fits(self):
        self._mixes()
        self._measured()
        if (self.start is None) == (self.model is None):
            raise ValueError("give one of start (go on from weights) and model (start from nothing)")
        if self.kind != "grpo" and (self.rollout or self.prompt):
            raise ValueError(f"rollout and prompt belong to kind grpo, this is {self.kind}")
        if self.kind != "dpo" and self.dpo:
            raise ValueError(f"dpo belongs to kind dpo, this is {self.kind}")
        if self.kind in ("grpo", "dpo"):
            self._judged()
        if self.lora and self.state:
            raise ValueError("state trains the initial states alone, lora an adapter: give one")
        if self.apart and self.model is not None:
            what = "lora" if self.lora else "state"
            raise ValueError(f"{what} needs trained weights beneath it: give start, not model")
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ValueError("prompt must hold {question}")
        return self


Tracker = Literal["tensorboard", "wandb", "swanlab"]


class CheckpointConfig(Strict):
    """Resume points of running stages. They never decide a result."""

    every: Count = 100
    """Steps between them."""
    keep: Count = 2
    """How many are kept, the newest; a damaged one is passed over for the one before. The weights of the lowest
    held-out loss that they name are kept beside them."""


class MemoryConfig(Strict):
    """What spares the memory of training, at the cost of time. It never decides a result."""

    recompute: bool = False
    """Keep the input of each block alone, and compute the rest again in the backward."""
    shard: Literal["gradients", "weights"] | None = None
    """Training in several processes: each keeps a part of the model. Weights are gathered for a step (gradients:
    ZeRO-2) or for a block at a time (weights: ZeRO-3), and while grpo samples; left out, each has all of them."""


class HubConfig(Strict):
    """Where hubs are asked. It never decides a result."""

    mirrors: tuple[Annotated[str, Field(pattern=r"^https?://.")], ...] = ()
    """Endpoints that are asked before the hub itself (or HF_ENDPOINT); they are told no token."""
    offline: bool = False
    """Fetch nothing: what has been fetched before will do."""


class PipelineConfig(Strict):
    """One run: what `config.yaml` holds."""

    run: Name
    """Names its folder in results/."""
    seed: Whole = 42
    """Of everything that is drawn by lot."""
    code_tracking: Annotated[Literal["ast", "off"], BeforeValidator(_off)] = "ast"
    """Whether an edit of a step's code makes its results stale."""
    hub: HubConfig = HubConfig()
    """Mirrors, or no network at all."""
    weights: dict[Name, WeightsConfig] = {}
    """Trained weights to start from or to measure."""
    tokenizers: dict[Name, TokenizerConfig] = {}
    """Vocabularies."""
    corpora: dict[Name, CorpusConfig] = {}
    """Training data."""
    benchmarks: dict[Name, BenchmarkConfig] = {}
    """Questions."""
    stages: tuple[StageConfig, ...] = ()
    """What is done, in order."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """Resume points."""
    memory: MemoryConfig = MemoryConfig()
    """What spares memory."""
    track: tuple[Tracker, ...] = ()
    """Programs that are told each line of metrics as it comes; they decide no result."""


class Settings(Strict):
    """What one training stage is asked to do: settings.json. Nothing about later steps or hardware."""

    kind: Kind
    seed: Whole
    model: RwkvConfig | None = None
    lora: LoraConfig | None = None
    state: bool = False
    dpo: DpoConfig | None = None
    rollout: RolloutConfig | None = None
    prompt: str | None = None
    mix: tuple[Positive, ...] = ()
    train: TrainConfig

    @property
    def apart(self) -> bool:
        """Whether its result lies beside the weights, as an adapter or states."""
        return self.lora is not None or self.state

    @model_validator(mode="after")
    def _fits(self):
        if self.lora and self.state:
            raise ValueError("state trains the initial states alone, lora an adapter: give one")
        return self


def read_settings(path: str | Path) -> Settings:
    """Read a stage's settings.json. Raises ConfigError naming the key."""
    return check(Settings, read_json(path), path)
