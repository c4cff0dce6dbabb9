"""Parcels put together: the pairs of a packed corpus, which grow side by side and survive a kill, and its card."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from rwkvpipe.base.config import CorpusConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import atomic, canonical, write_json
from rwkvpipe.base.growing import Growing
from rwkvpipe.base.pace import Pace
from rwkvpipe.data.binidx import write_index
from rwkvpipe.data.card import Card, Seen, count_parcel, kept
from rwkvpipe.data.marks import RUN, narrowed, runs, widened
from rwkvpipe.data.parcel import PARTS, Parcel, Part, array_of

log = logging.getLogger("rwkvpipe")

BLOCK = 1 << 20
WORK = ".pack"  # where a corpus lies while it is made


class Packing:
    """A packed corpus while it is made, in a hidden folder beside its place. `done` parcels were added by earlier runs.

    `mark` says what it is made of: the work of a run that was killed is gone on with if that is the same.
    """

    def __init__(self, folder: Path, spec: CorpusConfig, dtype: np.dtype, mark: str):
        self.folder, self.spec, self.dtype = folder, spec, dtype
        self.kinds = ("bin", "mask", "sizes") if spec.masked else ("bin", "sizes")
        names = tuple(f"{part}.{kind}" for part in PARTS for kind in (*self.kinds, *["weights"] * spec.masked))
        self.files = Growing(folder / WORK, mark, (*names, "digests", "skipped.jsonl"))
        state = self.files.state or {}
        self.done, self.card = state.get("done", 0), Card(state.get("card"))
        self.seen = Seen(folder / WORK)
        if self.done:
            log.info("going on after %d pieces of the corpus", self.done)
            digests = np.fromfile(folder / WORK / "digests", dtype="<u8")
            for first in range(0, len(digests), BLOCK):
                self.seen.fresh(digests[first : first + BLOCK])

    def add(self, parcel: Parcel) -> None:
        """Append a parcel."""
        for error in parcel.errors:
            self.files.append("skipped.jsonl", (canonical({"error": error}) + "\n").encode("utf-8", "backslashreplace"))
        for name, given in parcel.parts.items():
            part = replace(given, marks=array_of(given.marks, given.kind)) if isinstance(given.marks, Path) else given
            fresh = self.seen.fresh(part.digests)
            self.files.append("digests", part.digests[fresh].tobytes())
            self.card.counts["duplicates"] += int((~fresh).sum())
            wanted = fresh if self.spec.duplicates == "drop" else np.ones_like(fresh)
            self.card.counts["dropped"] += int((~wanted).sum())
            self._add_tokens(f"{name}.bin", part, wanted)
            part = kept(part, wanted)
            self.files.append(f"{name}.sizes", part.sizes.tobytes())
            if part.marks is not None:
                for first in range(0, len(part.marks), BLOCK):
                    some = part.marks[first : first + BLOCK]
                    # what weighs other than 1 is kept beside them until all are there
                    told = runs(some, self.card.parts[name]["tokens"] + first)
                    self.files.append(f"{name}.weights", told.tobytes())
                    self.files.append(f"{name}.mask", narrowed(some).data)
            self.card.add(name, part)
        count_parcel(self.card, parcel)
        self.done += 1
        self.files.record({"done": self.done, "card": self.card.state()})

    def _add_tokens(self, name: str, part: Part, wanted: np.ndarray) -> None:
        """Append the tokens of the documents that are wanted (n,)."""
        if isinstance(part.tokens, np.ndarray):
            tokens = part.tokens if wanted.all() else part.tokens[np.repeat(wanted, part.sizes)]
            self.files.append(name, tokens.data)
            return
        ends = np.cumsum(part.sizes, dtype=np.int64) * self.dtype.itemsize
        starts = ends - part.sizes * self.dtype.itemsize
        ranges = (
            [(0, int(ends[-1]))] if wanted.all() else zip(starts[wanted].tolist(), ends[wanted].tolist(), strict=True)
        )
        self.files.take(name, part.tokens, ranges)

    def add_all(self, parcels: Iterable[Parcel], pace: Pace) -> None:
        """Append parcels and say, now and then, how far it is: by bytes of files, or by documents."""
        read = 0
        for parcel in parcels:
            self.add(parcel)
            read += parcel.weight or (parcel.counts["seen"] if pace.unit == "documents" else 0)
            pace.at(read)

    def check(self, source: str, valid: bool) -> None:
        """Raise DataError where a part would be empty that is asked for, or nothing could be learned."""
        found = {part: counts["documents"] for part, counts in self.card.parts.items()}
        out = self.card.counts
        if not found["train"] and not found["valid"]:
            raise DataError(
                f"{source}: no documents to train on ({out['empty']} empty ones left out, {out['skipped']} rows"
                " skipped); give some text"
            )
        if not found["train"] or (valid and not found["valid"]):
            lacking = "train" if not found["train"] else "valid"
            raise DataError(
                f"{source}: valid: a share of {self.spec.valid} of {sum(found.values())} documents leaves none"
                f" to {lacking}; documents are held out whole: give more of them, another share, or valid_path"
            )
        if self.spec.format == "chat" and not self.card.parts["train"]["learned"]:
            raise DataError(
                f"{source}: no talk has words of the assistant, so there is nothing to learn; check columns and roles"
            )

    def finish(self, about: dict) -> dict:
        """Put the files in place, corpus.json last of all, and return what that says."""
        self.files.close()
        folder, work = self.folder, self.folder / WORK
        for name in (*PARTS, "corpus.json"):
            for left in folder.glob(f".{name}.*"):  # what a killed run was writing
                left.unlink(missing_ok=True)
        # from here to the end files of an older pack stand beside new ones: without corpus.json it is none
        (folder / "corpus.json").unlink(missing_ok=True)
        for part in PARTS:
            with atomic(folder / f"{part}.idx") as index:
                sizes = work / f"{part}.sizes"
                filled = sizes.stat().st_size
                write_index(index, self.dtype, np.memmap(sizes, "<i4", "r") if filled else np.zeros(0, "<i4"))
            self.files.place(f"{part}.bin", folder / f"{part}.bin")
            if "mask" in self.kinds:
                self._place_marks(part)
        (folder / "skipped.jsonl").unlink(missing_ok=True)
        if self.card.counts["skipped"]:
            self.files.place("skipped.jsonl", folder / "skipped.jsonl")
        described = about | self.card.describe()
        write_json(folder / "corpus.json", described)
        self.files.remove()
        return described

    def _place_marks(self, part: str) -> None:
        """Put the mask in place: a byte a token, or its weight."""
        source, target = self.folder / WORK / f"{part}.mask", self.folder / f"{part}.mask"
        told = np.fromfile(source.with_suffix(".weights"), RUN)
        if not len(told):
            self.files.place(source.name, target)
            return
        with atomic(target) as wide, open(wide, "wb") as file:
            file.writelines(widened(source, told))


def tell(described: dict, counts: Counter) -> None:
    """What a pack came to, in a few lines."""
    for part in PARTS:
        log.info("%s: %s documents, %s tokens", part, *(f"{described[part][n]:,}" for n in ("documents", "tokens")))
    for count, what in (
        (described["empty"], "%d empty documents left out"),
        (described["skipped"], "%d rows left out, listed in skipped.jsonl"),
        (described["duplicates_dropped"], "%d documents left out that came before"),
        (counts["blank_lines"], "%d talks have a blank line inside an answer; a blank line ends a turn"),
    ):
        if count:
            log.info(what, count)
