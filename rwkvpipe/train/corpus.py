"""Training on a packed corpus: what pretrain and sft do, but for how a step's rows are chosen."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import read_json
from rwkvpipe.data.batches import Mix, documents_of, read_of, rows_of
from rwkvpipe.data.binidx import Binidx
from rwkvpipe.data.spread import read_parts
from rwkvpipe.train.dist import ALONE
from rwkvpipe.train.heldout import held_out_loss
from rwkvpipe.train.infctx import chunked_lm_losses
from rwkvpipe.train.loop import Hooks, fit
from rwkvpipe.train.loss import lm_losses
from rwkvpipe.train.optim import whole_length
from rwkvpipe.train.stage import Stage, finish, run_of


def _files(folder: Path, part: str, masked: bool) -> list[Path]:
    """The files of one part of a corpus; none where the part is absent or empty."""
    listed, kinds = folder / f"{part}.parts", ("bin", "idx", *(("mask",) if masked else ()))
    prefixes = read_parts(listed) if listed.is_file() else [str(folder / part)]
    found = [Path(f"{prefix}.{kind}") for prefix in prefixes for kind in kinds]
    if not any(file.is_file() and file.stat().st_size for file in found if file.suffix == ".bin"):
        return []
    return [*found, listed, folder / f"{part}.idx"] if listed.is_file() else found


def _fits(stage: Stage, folder: Path) -> None:
    """Raise DataError if the corpus is no whole one, or has ids that the model has no row for."""
    described = folder / "corpus.json"
    if not described.is_file():  # written last of all
        raise DataError(f"{described}: no such file, so packing came to no end; make the corpus with rwkvpipe.pack")
    found = read_json(described)
    size = found.get("vocab_size", 0) if isinstance(found, dict) else None
    if isinstance(size, bool) or not isinstance(size, int):
        raise DataError(f"{described}: no vocab_size that is a whole number; make the corpus with rwkvpipe.pack")
    if size > stage.model.config.vocab_size:
        raise DataError(
            f"{folder}: was packed with a vocabulary of {size}, the model has {stage.model.config.vocab_size} rows;"
            " give the corpus the model's tokenizer"
        )


def _weights(stage: Stage, folders: Sequence[Path]) -> tuple[float, ...]:
    """How large a part of the rows each corpus gives."""
    weights = stage.settings.mix or (1.0,)
    if len(weights) != len(folders):
        raise ConfigError(f"--data: {len(folders)} corpora, the settings have {len(weights)} weights (mix)")
    return weights


def left_of(data: Mix, config: TrainConfig, *, masked: bool) -> dict[str, float]:
    """How many documents of all corpora are cut, and how many left out, where rows are documents."""
    if not masked and config.rows not in ("documents", "packed"):
        return {}
    found = [read_of(corpus, config.ctx_len, masked=masked) for corpus in data.corpora]
    return {f"documents_{name}": sum(each[name] for each in found) for name in ("cut", "left_out")}


def train(stage: Stage, folders: Sequence[Path], batches: Callable[..., Iterator], *, micro_batch: int) -> None:
    """Train on packed corpora and write the results; `batches` is one of data.batches' `*_batches`.

    Raises DataError when the corpus does not fit, ConfigError when `micro_batch` is below 1.
    """
    batch, count = stage.settings.train.batch, stage.rank.count
    if batch < count:
        raise ConfigError(f"train.batch: {batch} rows a step for {count} devices; each needs one at least")
    masked = stage.settings.kind == "sft"
    inputs: list[Path] = []
    for folder in folders:
        found = _files(folder, "train", masked)
        if not found or not all(path.is_file() for path in found):
            lacking = " (no .mask, which says what is learned)" if _files(folder, "train", False) else ""
            raise DataError(
                f"{folder}: no packed corpus for {stage.settings.kind} in it{lacking}; make it with rwkvpipe.pack"
            )
        _fits(stage, folder)
        inputs += found
    config = stage.settings.train.model_copy(update={"seed": stage.seed})
    rows = stage.model.config.vocab_size
    data = Mix(tuple(Binidx(folder / "train", rows) for folder in folders), _weights(stage, folders))
    passed = rows_of(data.corpora[0], config, masked=masked) if config.epochs is not None else 0
    config = whole_length(config, passed)
    valid = [file for folder in folders for file in _files(folder, "valid", masked)]
    parts = [Binidx(folder / "valid", rows) for folder in folders if _files(folder, "valid", masked)]
    validate = held_out_loss(parts, config, micro_batch, masked=masked, rank=stage.rank) if parts else None
    if config.valid_every and validate is None:
        raise DataError(
            f"{folders[0]}: has no held-out part, whose loss train.valid_every asks for; pack it with valid"
        )
    counts = left_of(data, config, masked=masked)
    resumed = any(stage.folder.glob("step-*.json"))
    before = config.begun  # steps of another training, whose rows are not read again
    stream = None if resumed else batches(data, config, ALONE, before)  # judges the corpus before anything is written
    metrics = fit(
        stage.model,
        lambda first, carried: stream if stream and not first else batches(data, config, ALONE, before + first),
        (lm_losses if config.chunk is None else chunked_lm_losses)(micro_batch, config, stage.rank),
        config=config,
        run=run_of(stage, inputs + valid),
        hooks=Hooks(
            validate, lambda: counts, read=lambda step: documents_of(data, config, before + step, masked=masked)
        ),
    )
    finish(stage, metrics)
