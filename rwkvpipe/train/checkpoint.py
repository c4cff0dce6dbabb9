"""Resume points: whole, verified by digest, and tied to what they were made from by a mark."""

import hashlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rwkvpipe.base.errors import DataError, WeightsError
from rwkvpipe.base.files import canonical, digest, read_json, write_json
from rwkvpipe.weights.store import read_tensors, write_tensors

log = logging.getLogger("rwkvpipe")


@dataclass(frozen=True)
class Checkpoint:
    """What a training run needs to go on after `step` optimizer steps."""

    step: int
    tensors: dict[str, Tensor]
    notes: dict


def fingerprint(*parts) -> str:
    """One short mark for settings (plain values) and digests of inputs; any change gives another."""
    return hashlib.sha256(canonical(list(parts)).encode()).hexdigest()[:32]


def _paths(folder: Path, step: int) -> tuple[Path, Path]:
    return folder / f"step-{step:09d}.safetensors", folder / f"step-{step:09d}.json"


def save(folder: Path, step: int, tensors: dict[str, Tensor], mark: str, *, notes: dict | None = None) -> None:
    """Write a resume point: the tensors, then the JSON that vouches for them; both flushed to disk and renamed."""
    data, card = _paths(folder, step)
    write_tensors(data, tensors)
    described = {"step": step, "mark": mark, "bytes": data.stat().st_size, "sha256": digest(data)}
    write_json(card, described | {"notes": notes or {}})


def _card(path: Path) -> dict | None:
    """What a card says; None, said aloud, if it cannot be read."""
    try:
        found = read_json(path)
        if isinstance(found, dict) and {"step", "mark", "sha256", "notes"} <= found.keys():
            return found
        log.warning("%s says nothing of a checkpoint: left out", path)
    except (DataError, OSError) as error:
        log.warning("checkpoint left out: %s", error)
    return None


def _remove(card: Path) -> None:
    card.unlink(missing_ok=True)
    card.with_suffix(".safetensors").unlink(missing_ok=True)


def latest(folder: Path, mark: str) -> Checkpoint | None:
    """The newest whole resume point with this mark, or None.

    Points with another mark are removed, damaged ones left out; both are said in the log.
    """
    cards = [(path, _card(path)) for path in sorted(folder.glob("step-*.json"), reverse=True)]
    foreign = [path for path, card in cards if card is not None and card["mark"] != mark]
    if foreign:
        log.info("%s: made from other settings or inputs; removed, training starts again", folder)
        for path in foreign:
            _remove(path)
    for path, card in cards:
        if card is None or path in foreign:
            continue
        data = path.with_suffix(".safetensors")
        try:
            if digest(data) == card["sha256"]:
                return Checkpoint(card["step"], read_tensors(data)[0], card["notes"])
            log.warning("%s is damaged (its digest differs): going back to the one before", data)
        except (OSError, WeightsError) as error:
            log.warning("checkpoint left out: %s", error)
    return None


def prune(folder: Path, keep: int = 2) -> None:
    """Remove all but the newest `keep` resume points, data without a card, and what a kill left half written."""
    for path in sorted(folder.glob("step-*.json"), reverse=True)[keep:]:
        _remove(path)
    for data in folder.glob("step-*.safetensors"):
        if not data.with_suffix(".json").exists():
            data.unlink(missing_ok=True)
    for part in folder.glob(".step-*"):
        part.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove all resume points: the results they led to are written."""
    shutil.rmtree(folder, ignore_errors=True)
