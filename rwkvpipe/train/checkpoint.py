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


@dataclass(frozen=True)
class Stem:
    """What runs have in common that differ in their length alone: a mark of all else, and the step until which."""

    mark: str = ""
    until: int = 0


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    mark: str,
    *,
    notes: dict | None = None,
    stem: Stem | None = None,
) -> None:
    """Write a resume point: the tensors, then the JSON that vouches for them; both flushed to disk and renamed.

    A longer run may go on from it, too, if it stands no later than `stem` says.
    """
    data, card = _paths(folder, step)
    write_tensors(data, tensors)
    described = {"step": step, "mark": mark, "sha256": digest(data), "notes": notes or {}}
    if stem is not None and step <= stem.until:
        described["stem"] = stem.mark
    write_json(card, described | {"check": fingerprint(described)})


def _card(path: Path) -> dict | None:
    """What a card says; None, said aloud, if it cannot be read."""
    try:
        found = read_json(path)
        if isinstance(found, dict) and found.pop("check", None) == fingerprint(found):
            return found
        log.warning("%s is damaged (what it says does not fit its digest)", path)
    except DataError as error:
        log.warning("damaged: %s", error)
    return None


def _remove(card: Path) -> None:
    card.unlink(missing_ok=True)
    card.with_suffix(".safetensors").unlink(missing_ok=True)


def latest(folder: Path, mark: str, stem: Stem | None = None) -> Checkpoint | None:
    """The newest whole resume point with this mark, or of a run of another length with this stem; or None.

    Points with another mark are removed, and damaged ones, which would outlive the good ones before them; both are
    said in the log. Raises OSError for what is there and may not be read: it may be whole.
    """
    cards = [(path, _card(path)) for path in sorted(folder.glob("step-*.json"), reverse=True)]
    foreign = [path for path, card in cards if card is not None and not _ours(card, mark, stem)]
    if foreign:
        why = "made from other settings or inputs, or for another length, on which its rates depend"
        log.info("%s: %s; removed, training starts again", folder, why)
        for path in foreign:
            _remove(path)
    for path, card in cards:
        if path in foreign:
            continue
        tensors = None if card is None else _tensors(path.with_suffix(".safetensors"), card["sha256"])
        if tensors is not None:
            return Checkpoint(card["step"], tensors, card["notes"])
        log.warning("resume point %s is removed; going back to the one before, if there is one", path.stem)
        _remove(path)
    return None


def _ours(card: dict, mark: str, stem: Stem | None) -> bool:
    """Whether a run may go on from the point that a card tells of."""
    return card["mark"] == mark or (stem is not None and card.get("stem") == stem.mark and card["step"] <= stem.until)


def _tensors(data: Path, wanted: str) -> dict[str, Tensor] | None:
    """The tensors of a resume point; None, said aloud, if they are not those that were saved."""
    try:
        if digest(data) == wanted:
            return read_tensors(data)[0]
        log.warning("%s is damaged (its digest differs)", data)
    except (FileNotFoundError, WeightsError) as error:
        log.warning("damaged: %s", error)
    return None


def prune(folder: Path, keep: int = 2, stem: Stem | None = None) -> None:
    """Remove all but the newest `keep` resume points, data without a card, and what a kill left half written.

    The newest that longer runs may go on from stays, too.
    """
    for path in sorted(folder.glob("step-*.json"), reverse=True)[keep:]:
        if stem is None or path != _reusable(folder, stem):
            _remove(path)
    for data in folder.glob("step-*.safetensors"):
        if not data.with_suffix(".json").exists():
            data.unlink(missing_ok=True)
    for part in folder.glob(".step-*"):
        part.unlink(missing_ok=True)


def _reusable(folder: Path, stem: Stem) -> Path | None:
    """The card of the newest point that longer runs may go on from."""
    for path in sorted(folder.glob("step-*.json"), reverse=True):
        card = _card(path)
        if card is not None and card.get("stem") == stem.mark:
            return path
    return None


def leave(folder: Path, stem: Stem) -> bool:
    """Of all resume points leave the one that a longer run may go on from, if there is one."""
    kept = _reusable(folder, stem)
    for path in folder.glob("step-*.json") if kept else ():
        if path != kept:
            _remove(path)
    return kept is not None


def clear(folder: Path) -> None:
    """Remove all resume points, at once or not at all: the results they led to are written."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
