"""Resume points: whole, verified by digest, and tied to what they were made from by a mark.

One is a file of tensors, or several, each with what one process keeps of a model that is cut, and a card of JSON that
vouches for all of them. Any number of processes goes on from it.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkvpipe.base.errors import DataError, WeightsError
from rwkvpipe.base.files import canonical, digest, read_json, write_json
from rwkvpipe.weights.tensors import Tensors, open_safetensors, write_tensors

log = logging.getLogger("rwkvpipe")

ENDED = "ended.json"  # in a folder of resume points: which run they led to the end of


@dataclass(frozen=True)
class Checkpoint:
    """What a training run needs to go on after `step` optimizer steps; tensors are read when they are asked for."""

    step: int
    tensors: Mapping[str, Tensor]
    notes: dict


def fingerprint(*parts) -> str:
    """One short mark for settings (plain values) and digests of inputs; any change gives another."""
    return hashlib.sha256(canonical(list(parts)).encode()).hexdigest()[:32]


def _card_of(data: Path) -> Path:
    return data.with_name(f"{data.name.partition('.')[0]}.json")


@dataclass(frozen=True)
class Stem:
    """What runs have in common that differ in their length alone: a mark of all else, and the step until which.

    With the length of this one, and how its rates fall, in words.
    """

    mark: str = ""
    until: int = 0
    steps: int = 0
    schedule: str = ""


def write_part(
    folder: Path, step: int, tensors: Mapping[str, Tensor], *, cut: Mapping[str, int] | None = None, end: str = ""
) -> dict[str, str]:
    """Write the tensors of a resume point, or one process's part of them; returns what its card is to say of the file.

    `cut` has, for tensors of which these are some rows, the number of all their rows; `end` tells parts apart.
    """
    data = folder / f"step-{step:09d}{end}.safetensors"
    write_tensors(data, tensors, {"cut": canonical(dict(cut))} if cut is not None else None)
    return {"file": data.name, "sha256": digest(data)}


def save(
    folder: Path, step: int, parts: list[dict[str, str]], mark: str, *, notes: dict | None = None, stem=None
) -> None:
    """Write the JSON that vouches for the parts of a resume point, which are there; with it the point is one.

    A longer run may go on from it, too, if it stands no later than `stem` says.
    """
    described = {"step": step, "mark": mark, "parts": parts, "notes": notes or {}}
    if stem is not None:
        described |= {"stem": stem.mark, "until": stem.until, "steps": stem.steps}
    write_json(folder / f"step-{step:09d}.json", described | {"check": fingerprint(described)})


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
    for data in card.parent.glob(f"{card.stem}.*safetensors"):
        data.unlink(missing_ok=True)


def latest(folder: Path, mark: str, stem: Stem | None = None) -> Checkpoint | None:
    """The newest whole resume point with this mark, or of a run of another length with this stem; or None.

    Points with another mark are removed, and damaged ones, which would outlive the good ones before them; both are
    said in the log. Raises OSError for what is there and may not be read: it may be whole.
    """
    cards = [(path, _card(path)) for path in sorted(folder.glob("step-*.json"), reverse=True)]
    foreign = [path for path, card in cards if card is not None and not _ours(card, mark, stem)]
    if foreign:
        other = [card["steps"] for path, card in cards if path in foreign and _akin(card, stem) and "steps" in card]
        why = _longer(other[0], stem) if other else "made from other settings or inputs"
        log.info("%s: %s; removed, training starts again", folder, why)
        for path in foreign:
            _remove(path)
    for path, card in cards:
        if path in foreign:
            continue
        tensors = None if card is None else _tensors(path, card)
        if tensors is not None:
            return Checkpoint(card["step"], tensors, card["notes"])
        log.warning("resume point %s is removed; going back to the one before, if there is one", path.stem)
        _remove(path)
    return None


def _akin(card: dict, stem: Stem | None) -> bool:
    """Whether a card tells of a run that differs in its length alone."""
    return stem is not None and bool(stem.mark) and card.get("stem") == stem.mark


def _reusable(card: dict, stem: Stem | None) -> bool:
    """Whether a run of another length may go on from the point that a card tells of."""
    return _akin(card, stem) and card["step"] <= min(stem.until, card.get("until", card["step"]))


def _ours(card: dict, mark: str, stem: Stem | None) -> bool:
    """Whether a run may go on from the point that a card tells of."""
    return card["mark"] == mark or _reusable(card, stem)


def _longer(steps: int, stem: Stem) -> str:
    """Why one of so many steps is no beginning of this one."""
    if stem.until:
        why = f"which are those of {steps} up to step {min(steps, stem.until)} alone"
    else:
        why = f"all of which depend on the length with schedule {stem.schedule} (with constant and wsd they do not)"
    return f"trained for {steps} steps, and {stem.steps} have other rates, {why}"


def _tensors(path: Path, card: dict) -> Tensors | None:
    """The tensors of a resume point; None, said aloud, if they are not those that were saved."""
    parts = card.get("parts") or [{"file": f"{path.stem}.safetensors", "sha256": card["sha256"]}]
    found = []
    try:
        for part in parts:
            data = path.with_name(part["file"])
            if digest(data) != part["sha256"]:
                log.warning("%s is damaged (its digest differs)", data)
                return None
            found.append(open_safetensors(data))
    except (FileNotFoundError, WeightsError) as error:
        log.warning("damaged: %s", error)
        return None
    return _together(found)


def _together(found: list[tuple[Tensors, dict[str, str]]]) -> Tensors:
    """Tensors out of the parts of a resume point: those that are cut from the rows in all of them, in order."""
    like: dict[str, Tensor] = {}
    cut: dict[str, int] = {}
    for tensors, metadata in found:
        like |= tensors.like
        cut |= json.loads(metadata.get("cut", "{}"))
    like |= {name: like[name].new_empty((rows, *like[name].shape[1:])) for name, rows in cut.items()}

    def load(name: str) -> Tensor:
        pieces = [tensors[name] for tensors, _ in found if name in tensors]
        return torch.cat(pieces) if name in cut else pieces[0]

    return Tensors(like, load)


def prune(folder: Path, keep: int = 2, stem: Stem | None = None) -> None:
    """Remove all but the newest `keep` resume points, data without a card, and what a kill left half written.

    The newest that longer runs may go on from stays, too.
    """
    for path in sorted(folder.glob("step-*.json"), reverse=True)[keep:]:
        if stem is None or path != _root(folder, stem):
            _remove(path)
    for data in folder.glob("step-*.safetensors"):
        if not _card_of(data).exists():
            data.unlink(missing_ok=True)
    for part in folder.glob(".step-*"):
        part.unlink(missing_ok=True)


def _root(folder: Path, stem: Stem) -> Path | None:
    """The card of the newest point that longer runs may go on from."""
    for path in sorted(folder.glob("step-*.json"), reverse=True):
        card = _card(path)
        if card is not None and _reusable(card, stem):
            return path
    return None


def noted(folder: Path, name: str) -> set:
    """What the resume points that can be read note under a name."""
    return {card["notes"].get(name) for path in folder.glob("step-*.json") if (card := _card(path)) is not None}


def leave(folder: Path, stem: Stem) -> bool:
    """Of all resume points leave the one that a longer run may go on from, if there is one."""
    kept = _root(folder, stem)
    for path in folder.glob("step-*.json") if kept else ():
        if path != kept:
            _remove(path)
    return kept is not None


def clear(folder: Path, stem: Stem | None = None) -> None:
    """Remove all resume points, at once or not at all: the results they led to are written.

    What is left is a note of their run, for one of another length, which cannot go on from it.
    """
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    if stem is not None and stem.mark:
        write_json(folder / ENDED, {"stem": stem.mark, "steps": stem.steps})
    shutil.rmtree(gone, ignore_errors=True)


def tell_ended(folder: Path, stem: Stem) -> None:
    """Say so where a finished run of another length is no beginning of this one, which starts anew."""
    path = folder / ENDED
    if not path.exists():
        return
    found = read_json(path)
    if isinstance(found, dict) and _akin(found, stem) and found.get("steps") != stem.steps:
        log.info("%s: %s; training starts again", folder, _longer(found["steps"], stem))
    path.unlink(missing_ok=True)
