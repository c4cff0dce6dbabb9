"""One training stage from its files to its files: what all kinds of training have in common."""

import argparse
import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkvpipe.base.config import LoraConfig, RolloutConfig, Settings, read_settings
from rwkvpipe.base.errors import ConfigError, Parser, PipeError, new_file
from rwkvpipe.base.files import canonical, digest, write_jsonl
from rwkvpipe.train import checkpoint, dist
from rwkvpipe.train.eightbit import check_optimizer
from rwkvpipe.train.loop import Run, best_file
from rwkvpipe.train.precision import check_precision
from rwkvpipe.train.record import Log
from rwkvpipe.train.sharding import gathered, hollow, parted, shard, whole
from rwkvpipe.train.stop import held
from rwkvpipe.train.tracker import Trackers, add_trackers
from rwkvpipe.weights import lora, store
from rwkvpipe.weights.beside import Base, load_base
from rwkvpipe.weights.rounded import numbers
from rwkvpipe.weights.states import tune_states

log = logging.getLogger("rwkvpipe")


@dataclass(frozen=True)
class Stage:
    """A stage about to train: its settings, its model (adapters put in), its device, what it started from."""

    settings: Settings
    model: nn.Module
    rank: dist.Rank
    out: Path
    base: Base
    """The weights it starts from."""
    track: tuple[str, ...] = ()
    """Programs that are told the metrics."""
    save_every: int = 100
    """Steps between resume points."""
    keep: int = 2
    """How many of them stay."""
    start: nn.Module | None = None
    """A copy of the model, where it is compared with what it began as and no adapter can be taken off."""
    writer: nn.Module | None = None
    """For a model that is cut: one to be filled with its weights (see `gathered`)."""

    @property
    def seed(self) -> int:
        """What everything drawn by lot in this stage comes from."""
        train = self.settings.train
        return self.settings.seed if train.seed is None else train.seed

    @property
    def folder(self) -> Path:
        """Where its resume points are."""
        return self.out.parent / "checkpoints"

    @contextmanager
    def begun(self) -> Iterator[nn.Module]:
        """The model as it was before training, inside the block alone: the copy, or the model less its adapter."""
        model = self.model if self.start is None else self.start
        parted(model)  # adapters are taken off the parts
        with lora.disabled(model) if self.start is None else nullcontext():
            try:
                yield model
            finally:
                parted(model)

    @contextmanager
    def writing(self) -> Iterator[nn.Module]:
        """The model to sample with, adapters folded in: in each process all of its weights, inside the block alone."""
        whole = nullcontext(self.model) if self.writer is None else gathered(self.model, self.writer)
        with whole as model, lora.folded(model) if self.settings.lora else nullcontext():
            yield model


def stage_parser(kind: str, about: str) -> Parser:
    """The command line that all kinds of training share; `about` is the verb's docstring."""
    parser = Parser(prog=f"rwkvpipe.{kind}", description=about.splitlines()[0])
    parser.add_argument("settings", help="settings.json of the stage")
    parser.add_argument("--model", required=True, help="the weights it starts from")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows at a time; decides memory, no result")
    parser.add_argument("--save-every", type=int, default=100, help="steps between resume points")
    parser.add_argument("--keep", type=int, default=2, help="how many resume points stay, the newest")
    parser.add_argument("--recompute", action="store_true", help="compute blocks again in the backward; spares memory")
    cut = "cut the model among the processes: ZeRO-2, ZeRO-3"
    parser.add_argument("--shard", choices=["gradients", "weights"], help=cut)
    parser.add_argument("--out", required=True, type=new_file, help="model.safetensors; with lora adapter.safetensors")
    add_trackers(parser)
    return parser


def open_stage(given: argparse.Namespace, *, kind: str) -> Stage:
    """Read settings and weights as `stage_parser` was told, and make the model ready to train.

    Raises ConfigError when the settings are of another kind of stage, or no row fits at a time.
    """
    settings, model = given.settings, given.model
    if given.micro_batch < 1:
        raise ConfigError(f"--micro-batch: {given.micro_batch} rows at a time; 1 is the least")
    if given.save_every < 1:
        raise ConfigError(f"--save-every: {given.save_every} steps between resume points; 1 is the least")
    if given.keep < 1:
        raise ConfigError(f"--keep: {given.keep} resume points stay; 1 is the least")
    asked = read_settings(settings)
    if asked.kind != kind:
        raise ConfigError(f"{settings}: kind is {asked.kind}; run `python -m rwkvpipe.{asked.kind}` with it")
    if kind == "grpo" and asked.rollout is None:
        asked = asked.model_copy(update={"rollout": RolloutConfig()})
    rank = dist.start()
    check_precision(asked.train.precision, rank.device)
    check_optimizer(asked.train, rank.device, given.shard)
    rounds = asked.lora is not None and asked.lora.quantise is not None
    home = "cpu" if rounds else rank.device  # so that the device never holds what is not
    network, base = load_base(model, home, apart=asked.apart)
    network.recompute = given.recompute
    told = {"track": tuple(given.track), "save_every": given.save_every, "keep": given.keep}
    stage = Stage(asked, network, rank, Path(given.out), base, **told)
    if asked.lora is not None:
        lora.inject(network, asked.lora, stage.seed)
        network.to(rank.device)
    if asked.state:
        tune_states(network)
    stage = replace(stage, start=_copied(asked, network))
    if given.shard is not None and rank.count > 1:
        writer = hollow(network) if kind == "grpo" else None
        for model in filter(None, (stage.start, network)):
            rank = shard(model, rank, given.shard)
        stage = replace(stage, rank=rank, writer=writer)
    trained = sum(value.numel() for value in network.parameters() if value.requires_grad)
    train = asked.train
    length = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs" if train.epochs else ""
    length = length or f"{train.tokens:,} tokens"
    log.info("%s: %s of %s numbers are trained, for %s", kind, f"{trained:,}", f"{numbers(network):,}", length)
    return stage


def _copied(asked: Settings, network: nn.Module) -> nn.Module | None:
    """A copy of the model as it begins, if training needs one beside it."""
    compared = asked.kind == "dpo" or (asked.kind == "grpo" and asked.rollout.beta > 0)
    return copy.deepcopy(network).eval().requires_grad_(False) if compared and not asked.apart else None


def run_of(stage: Stage, inputs: list[Path]) -> Run:
    """Where and how the stage keeps resume points; they are bound to settings, weights and the bytes of `inputs`."""
    asked, made_of = stage.settings.model_dump(mode="json"), [stage.base.file, *(digest(p) for p in inputs)]
    mark, stem = checkpoint.fingerprint(asked, made_of), checkpoint.fingerprint(_endless(asked), made_of)
    names = () if stage.rank.index else stage.track
    trackers = Trackers(names, folder=stage.out.parent, mark=mark, config=asked)
    return Run(stage.folder, mark, stage.save_every, stage.seed, stage.rank, stem, trackers, stage.keep)


def _endless(asked: dict) -> dict:
    """Settings without what says how long training goes on, and how the rate falls at its end."""
    train = {name: value for name, value in asked["train"].items() if name not in ("steps", "epochs", "tokens")}
    if train["schedule"] in ("constant", "wsd"):  # the same until the rate falls
        train = {name: value for name, value in train.items() if name not in ("schedule", "decay", "lr_final")}
    return asked | {"train": train}


def finish(stage: Stage, metrics: Log) -> None:
    """Write metrics.jsonl, then the model or the adapter; resume points have served and go.

    They stay where the one who asked is gone: the next one may begin by deleting results that it saw nobody finish, as
    Snakemake does, and then makes them from the last point. Raises PipeError where the last step, behind which no loss
    was measured, made weights that are no numbers.
    """
    parted(stage.model)
    apart = stage.settings.apart
    tensors = whole(lora.trained(stage.model) if apart else stage.model.state_dict(), stage.rank)
    if stage.rank.index:  # the first one writes
        return
    if odd := next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None):
        raise PipeError(f"the last step left NaN or infinity in {odd}, so nothing is made; lower train.lr")
    write_jsonl(stage.out.parent / "metrics.jsonl", metrics.rows())
    write_product(stage, stage.out, tensors)
    log.info("wrote %s", stage.out)
    if stage.settings.train.watch.best:
        write_best(stage, metrics.best_step, tensors)
    if dist.deserted():
        log.info("whoever started this is gone: %s stays, for whom starts it next", stage.folder)
    else:
        with held(stopping=True):  # stopped here, a finished run would look like one that is to be made again
            if metrics.stem is None or not checkpoint.leave(stage.folder, metrics.stem):
                checkpoint.clear(stage.folder, metrics.stem)


def write_product(stage: Stage, path: Path, tensors: dict[str, Tensor]) -> None:
    """Write what was trained: the model, with lora the adapter, with state the states."""
    if stage.settings.lora is not None:
        store.write_tensors(path, tensors, _described(stage.model, stage.settings.lora, stage.base))
    elif stage.settings.state:
        store.write_tensors(path, tensors, stage.base.metadata())
    else:
        store.write(path, stage.model.config, tensors)


def write_best(stage: Stage, step: int, tensors: dict[str, Tensor]) -> None:
    """Write the weights of the lowest held-out loss beside the last ones, of which they take what was not trained.

    Raises DataError where they are gone.
    """
    kept, _ = store.read_tensors(best_file(stage.folder, step))
    best = stage.out.with_name("best_adapter.safetensors" if stage.settings.apart else "best.safetensors")
    write_product(stage, best, {**tensors, **kept})
    log.info("wrote %s, of step %d, which had the lowest held-out loss", best, step)


def write_adapter(path: Path, model: nn.Module, config: LoraConfig, *, base: str) -> None:
    """Write an adapter with its settings and the digest of the file of weights it belongs to."""
    store.write_tensors(path, lora.adapter(model), _described(model, config, Base(base)))


def _described(model: nn.Module, config: LoraConfig, base: Base) -> dict[str, str]:
    """What an adapter's file tells beside its tensors."""
    return {"lora": canonical(config.model_dump(mode="json")), "family": model.config.family} | base.metadata()
