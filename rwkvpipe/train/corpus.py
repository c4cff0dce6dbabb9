"""Training on a packed corpus: what pretrain and sft do, but for how a step's rows are chosen."""

from collections.abc import Callable, Iterator
from pathlib import Path

from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import read_json
from rwkvpipe.data.binidx import Binidx
from rwkvpipe.train.heldout import held_out_loss
from rwkvpipe.train.loop import Hooks, fit
from rwkvpipe.train.loss import lm_losses
from rwkvpipe.train.stage import Stage, finish, run_of


def _files(folder: Path, part: str, masked: bool) -> list[Path]:
    """The files of one part of a corpus; none where the part is absent or empty."""
    found = [folder / f"{part}.{kind}" for kind in ("bin", "idx", *(("mask",) if masked else ()))]
    return found if found[0].is_file() and found[0].stat().st_size else []


def _fits(stage: Stage, folder: Path) -> None:
    """Raise DataError if the corpus has ids that the model has no row for."""
    size = read_json(folder / "corpus.json").get("vocab_size")
    if size is not None and size > stage.model.config.vocab_size:
        raise DataError(
            f"{folder}: was packed with a vocabulary of {size}, the model has {stage.model.config.vocab_size} rows;"
            " give the corpus the model's tokenizer"
        )


def train(stage: Stage, folder: Path, batches: Callable[..., Iterator], *, micro_batch: int, save_every: int) -> None:
    """Train on `folder` and write the results; `batches` is one of data.batches' `*_batches`.

    Raises DataError when the corpus does not fit, ConfigError when `micro_batch` is below 1.
    """
    if micro_batch < 1:
        raise ConfigError(f"--micro-batch: {micro_batch} rows at a time; 1 is the least")
    masked = stage.settings.kind == "sft"
    inputs = _files(folder, "train", masked)
    if not inputs or not all(path.is_file() for path in inputs):
        raise DataError(f"{folder}: no packed corpus for {stage.settings.kind} in it; make it with rwkvpipe.pack")
    _fits(stage, folder)
    config = stage.settings.train.model_copy(update={"seed": stage.seed})
    data = Binidx(folder / "train")
    valid = _files(folder, "valid", masked)
    validate = held_out_loss(Binidx(folder / "valid"), config, micro_batch, masked=masked) if valid else None
    metrics = fit(
        stage.model,
        lambda first, carried: batches(data, config, stage.rank, first),
        lm_losses(micro_batch, config),
        config=config,
        run=run_of(stage, inputs + valid, save_every),
        hooks=Hooks(validate=validate),
    )
    finish(stage, metrics)
