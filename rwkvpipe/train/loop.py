"""The training loop: the one place where gradients are computed and weights moved."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import DataError, PipeError, Stopped
from rwkvpipe.kernel import choice
from rwkvpipe.train import checkpoint
from rwkvpipe.train.dist import ALONE, Rank
from rwkvpipe.train.optim import AdamW, adamw, decay_at, lr_at, same_until, set_rate
from rwkvpipe.train.precision import Scaler
from rwkvpipe.train.record import Log, Progress
from rwkvpipe.train.sharding import part_of, parted, pieces, watched, whole
from rwkvpipe.train.stop import Stops, held
from rwkvpipe.train.tracker import Trackers
from rwkvpipe.weights.store import write_tensors

log = logging.getLogger("rwkvpipe")

SECONDS_BETWEEN_WORDS = 5.0


@dataclass(frozen=True)
class Run:
    """Where a training keeps its resume points, what they are marked with, how often they are made, its seed."""

    folder: Path
    mark: str
    save_every: int
    seed: int
    rank: Rank = ALONE
    stem: str = ""
    """The same mark for runs that differ in their length and in how they end."""
    trackers: Trackers = field(default_factory=Trackers)
    keep: int = 2
    """How many resume points stay."""


def _count(batch: Any) -> int:
    return int((batch.targets >= 0).sum())


def _learned(batch: Any) -> int:
    real = batch.targets >= 0
    mask = getattr(batch, "mask", None)
    return int(real.sum() if mask is None else (real & (mask != 0)).sum())


@dataclass(frozen=True)
class Hooks:
    """What a kind of training adds to the loop: all optional."""

    validate: Callable[[nn.Module], float] | None = None
    """Held-out loss of the model as it is."""
    measures: Callable[[], dict[str, float]] = dict
    """Further numbers of the step just made."""
    carry: Callable[[], dict[str, Tensor]] = dict
    """Tensors that the batches need to go on from a resume point."""
    tokens: Callable[[Any], int] = _count
    """Tokens read in a batch."""
    targets: Callable[[Any], int] = _learned
    """Those of them that are learned."""
    read: Callable[[int], str] = lambda step: ""
    """What the batch of a step was made of, in words."""


def step_seed(seed: int, step: int) -> int:
    """The seed of what is drawn by lot in one step: a function of the run's seed and the step, nothing else."""
    return (seed * 1_000_003 + step) % 2**63


def best_file(folder: Path, step: int) -> Path:
    """Where the trained weights of a step are kept while it has the lowest held-out loss."""
    return folder / f"best-{step:09d}.safetensors"


def _pack(model: nn.Module, optimizer: AdamW, carried: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything a resume point holds, under flat names: trained weights, Adam's moments, what the batches carry.

    What adapters began with is in it, too: another machine would find other last digits.
    """
    tensors = {f"carry/{name}": value for name, value in carried.items()}
    tensors |= {f"kept/{name}": value for name, value in model.named_buffers()}
    for name, value in model.named_parameters():
        if value.requires_grad:
            tensors[f"weight/{name}"] = value
            for kind, moment in optimizer.state.get(value, {}).items():
                tensors[f"adam/{name}/{kind}"] = moment
    return tensors


def _unpack(model: nn.Module, optimizer: AdamW, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put weights and moments back, one tensor after the other; returns what the batches carried."""
    with torch.no_grad():
        for name, value in model.named_buffers():
            value.copy_(tensors[f"kept/{name}"])
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.copy_(part_of(tensors[f"weight/{name}"], value))
                kinds = [kind for kind in optimizer.state[value] if f"adam/{name}/{kind}" in tensors]
                optimizer.state[value] |= {kind: part_of(tensors[f"adam/{name}/{kind}"], value) for kind in kinds}
    return {name.removeprefix("carry/"): tensors[name] for name in tensors if name.startswith("carry/")}


def _gradient(
    model: nn.Module, losses: Iterator[Tensor], clip: float, rank: Rank, stops: Stops, scale: float
) -> tuple[float, float]:
    """Gradients of one step, clipped: (loss, norm before the clip)."""
    parted(model)
    model.zero_grad(set_to_none=True)
    total: Tensor | float = 0.0
    for part in losses:
        if part.requires_grad:
            (part if scale == 1 else part * scale).backward()
        total = total + part.detach()
    parted(model)
    trained = [value for value in model.parameters() if value.requires_grad]
    stops.agreed = rank.sum_gradients(trained, stops.came)
    if scale != 1:
        for value in trained:
            if value.grad is not None:
                value.grad /= scale
    found = torch.nn.utils.clip_grad_norm_(trained, clip)
    norm = float(found.full_tensor() if hasattr(found, "full_tensor") else found)
    (loss,) = rank.total(float(total))
    return loss, norm


def _say(progress: Progress, row: dict, config: TrainConfig, spent: float, first: int) -> None:
    """One line for people: where training stands and how long it will take."""
    left = spent / max(progress.step - first, 1) * (config.steps - progress.step)
    extra = "".join(f"  {name} {row[name]:.4f}" for name in ("valid_loss", "mean_reward") if name in row)
    loss = f"loss {row['loss']:.4f}" if "loss" in row else "skipped"
    log.info(
        "step %d/%d  %s%s  lr %.2e  %s tokens/s  %d:%02d left",
        progress.step, config.steps, loss, extra, row["lr"],
        f"{row['tokens_per_second']:,.0f}", left // 60, left % 60,
    )  # fmt: skip


class _Training:
    """One run of the loop: model, optimizer, progress and their resume points."""

    def __init__(self, model: nn.Module, config: TrainConfig, run: Run, hooks: Hooks):
        self.model, self.config, self.run, self.hooks = model, config, run, hooks
        self.optimizer = adamw(model, config)
        self.progress = Progress()
        self.scaler = Scaler.of(config.precision)
        self.log = Log(run.folder / "log.jsonl", run.rank)
        self.stops = Stops()
        self.saved = 0
        self.products = "torch"
        self.stem = checkpoint.Stem(run.stem, same_until(config) if run.stem else 0, config.steps, config.schedule)

    @property
    def over(self) -> bool:
        """Whether training has come to its end, or gone on for long enough without getting better."""
        patience = self.config.watch.patience
        return self.progress.step >= self.config.steps or (patience is not None and self.progress.worse >= patience)

    def resume(self) -> dict[str, Tensor]:
        """Go back to the newest resume point, if there is one; returns what the batches carried."""
        rank = self.run.rank
        if rank.index:  # the first one removes what is no use
            rank.wait()
        found = checkpoint.latest(self.run.folder, self.run.mark, self.stem)
        if not rank.index:
            rank.wait()
        if found is None and not rank.index:
            checkpoint.tell_ended(self.run.folder, self.stem)
        step = 0 if found is None else found.step
        if rank.total(step) != [step * rank.count]:
            raise PipeError(f"{self.run.folder}: the processes do not see the same resume points; share the folder")
        rounded = self.config.precision == "bf16"
        self.products = choice.settle(self.model, found and found.notes.pop("products", "torch"), rounded=rounded)
        first = rank.gather(self.products)[0]
        if first != self.products:  # on a machine of another kind
            self.products = choice.settle(self.model, first, rounded=rounded)
        carried: dict[str, Tensor] = {}
        if found is not None:
            carried = _unpack(self.model, self.optimizer, found.tensors)
            self.scaler = Scaler(**found.notes.pop("scaler", vars(self.scaler)))
            self.progress = Progress(**found.notes)
            self.saved = found.step
            log.info("going on after step %d of %d", found.step, self.config.steps)
            if not any(row["step"] == 1 for row in self.log.rows()):  # every log begins with step 1
                log.warning("%s: earlier lines are gone; metrics begin after step %d", self.log.path, found.step)
        self.log.cut(self.progress.lined)
        return carried

    def save(self) -> None:
        """Write a resume point at the present step."""
        if self.saved == self.progress.step:
            return
        parted(self.model)
        if not self.run.rank.index:
            self.log.settle()
        parts = self.parts()
        if self.run.rank.index:
            self.saved = self.progress.step
            return
        notes = vars(self.progress) | {"scaler": vars(self.scaler), "products": self.products}
        checkpoint.save(self.run.folder, self.progress.step, parts, self.run.mark, notes=notes, stem=self.stem)
        try:
            self.log.settle()
        except DataError:  # the folder vanished, and was made anew for a point that would outlive its lines
            checkpoint.clear(self.run.folder)
            raise
        checkpoint.prune(self.run.folder, self.run.keep, self.stem)
        self.saved = self.progress.step

    def parts(self) -> list[dict[str, str]]:
        """Write what a resume point holds: the first process all, of a cut model each its part; returns the files."""
        rank, where = self.run.rank, (self.run.folder, self.progress.step)
        if rank.index and not rank.lockstep:
            return []
        tensors = _pack(self.model, self.optimizer, self.hooks.carry())
        if not rank.lockstep:
            return [checkpoint.write_part(*where, tensors)]
        own, cut = pieces(tensors, rank)
        end = f".part-{rank.index + 1}-of-{rank.count}"
        return rank.gather(checkpoint.write_part(*where, own, cut=cut, end=end))

    def advance(self, stream: Iterator, losses: Callable) -> None:
        """Make one step; the time that its batch takes (for grpo, to sample it) is part of it."""
        begin, step, watch = time.monotonic(), self.progress.step, self.config.watch
        batch = next(stream)
        set_rate(self.optimizer, lr_at(self.config, step), decay_at(self.config, step))
        try:
            loss, norm = self.gradient(batch, losses)
        except PipeError as error:
            raise type(error)(f"step {step + 1}: {error}") from None
        wrong = self.progress.wrong(loss, norm, watch)
        read = f" (it read {self.hooks.read(step)})" if wrong else ""
        if wrong and watch.bad == "stop":
            said = "no weight was moved. Lower train.lr, look at the step's data, or set train.watch.bad to skip"
            raise PipeError(f"step {step + 1}: {wrong}; {said}{read}")
        with held():
            values = {"loss": loss, "grad_norm": norm} | self.hooks.measures()
            if wrong:
                log.warning("step %d is skipped: %s%s", step + 1, wrong, read)
                values = {}
            else:
                self.optimizer.step()
            counted = {"tokens": self.hooks.tokens(batch), "targets": self.hooks.targets(batch)}
            self.progress.add(values, counted, time.monotonic() - begin)

    def gradient(self, batch: Any, losses: Callable) -> tuple[float, float]:
        """Gradients of a step, in fp16 by the first factor that overflows nothing, if there is one."""
        began = vars(self.scaler).copy()
        while True:
            torch.manual_seed(step_seed(self.run.seed, self.progress.step))
            found = losses(self.model, batch), self.config.clip, self.run.rank, self.stops, self.scaler.size
            loss, norm = _gradient(self.model, *found)
            if math.isfinite(loss) and math.isfinite(norm):
                self.scaler.settle(self.config.precision)
                return loss, norm
            if not self.scaler.lower():
                self.scaler = Scaler(**began)  # it is not the factor's fault
                return loss, norm
            self.hooks.measures()  # those of a step that does not count

    def keep(self) -> None:
        """Write the weights of the lowest held-out loss; of those before them stay what resume points name."""
        parted(self.model)
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        tensors = whole(trained, self.run.rank)
        if self.run.rank.index:
            return
        folder = self.run.folder
        write_tensors(best_file(folder, self.progress.best_step), tensors)
        named = {best_file(folder, step) for step in checkpoint.noted(folder, "best_step")}
        for old in set(folder.glob("best-*.safetensors")) - named - {best_file(folder, self.progress.best_step)}:
            old.unlink(missing_ok=True)

    def line(self) -> dict | None:
        """Write a line of metrics if one is due at the present step and not yet written; returns it."""
        number, config = self.progress.step, self.config
        last = number == config.steps
        valid = self.hooks.validate and (last or (config.valid_every and number % config.valid_every == 0))
        due = valid or last or number == 1 or number % config.log_every == 0
        if not due or self.progress.lined == number:
            return None
        held_out = {"valid_loss": self.hooks.validate(self.model)} if valid else {}
        if held_out and not math.isfinite(held_out["valid_loss"]):
            read = f" (step {number} read {self.hooks.read(number - 1)})"
            raise PipeError(
                f"step {number}: the held-out loss is {held_out['valid_loss']}, so these weights are no use;"
                f" lower train.lr, or look at the held-out part{read}"
            )
        with held():
            if valid and self.progress.judge(held_out["valid_loss"]) and config.watch.best:
                self.keep()
            row = self.progress.row(lr_at(config, number - 1)) | held_out
            self.log.add(row)
        self.run.trackers.add(row)
        return row


def fit(
    model: nn.Module, batches: Callable, losses: Callable, *, config: TrainConfig, run: Run, hooks: Hooks | None = None
) -> Log:
    """Train for `config.steps` optimizer steps, from the newest resume point on, and return the log of metrics.

    `batches(first_step, carried)` iterates from step `first_step` on, each drawn after the step before was made;
    `losses(model, batch)` yields scalars for one backward each. Raises Stopped, the work kept, when the process is
    told to stop, and PipeError, naming the step, before a loss or gradient that is not finite reaches the weights.
    """
    training = _Training(model, config, run, hooks or Hooks())
    carried = training.resume()
    model.train()
    first, begin, said = training.progress.step, time.monotonic(), -math.inf
    try:
        with training.stops.noted(run.rank), watched(run.rank):
            training.line()  # told to stop after a step and before its line, a run still owes it
            stream = batches(first, carried)
            while not training.over:
                training.advance(stream, losses)
                if training.progress.step == config.steps:
                    training.save()  # before its line: in a longer run there might be none
                row = training.line()
                now, done = time.monotonic(), training.progress.step
                if row and (now - said > SECONDS_BETWEEN_WORDS or done == config.steps):
                    _say(training.progress, row, config, now - begin, first)
                    said = now
                if done % run.save_every == 0 or done == training.stem.until or training.over:
                    training.save()
                if training.stops.agreed and not training.over:
                    raise KeyboardInterrupt
            if training.progress.step < config.steps:
                made = training.progress
                words = "%d held-out losses are no lower than %.4f, of step %d: ended after step %d of %d"
                log.info(words, made.worse, made.best, made.best_step, made.step, config.steps)
    except KeyboardInterrupt:
        with held(stopping=True):  # whoever presses Ctrl-C twice loses nothing
            training.save()
        done = training.progress.step
        raise Stopped(f"stopped after step {done} of {config.steps}; the same command goes on from there") from None
    finally:
        run.trackers.close()
    if config.watch.bad == "skip" and not run.rank.index and not any("loss" in row for row in training.log.rows()):
        raise PipeError(
            f"all {config.steps} steps were skipped: no weight was moved, so nothing is made; lower train.lr"
        )
    model.eval()
    training.log.best_step, training.log.stem = training.progress.best_step, training.stem
    return training.log
