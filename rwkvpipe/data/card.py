"""What a corpus is: counts, lengths, duplicates, the longest documents; kept while it is packed."""

import mmap
import re
from collections import Counter
from pathlib import Path

import numpy as np

from rwkvpipe.base.files import atomic
from rwkvpipe.data.parcel import PARTS, TOP, Parcel, Part

KINDS = 20  # reasons that are told apart
# where a row is, what stands in it, and numbers
PLACE = re.compile(r"^.*?(?::\d+|: (?:row|item) \d+)(?:: record \d+)?: ", re.DOTALL)
VALUE = re.compile(r"'(?:[^'\\]|\\.)*'|(?<= is )(int|float|bool|list|dict) .*(?=, text)")
NUMBER = re.compile(r"(?<= )\d+|(?<=U\+)[0-9A-F]+")
HELD = 1 << 21  # digests of a run that is held in memory, at most twice that
BINS = 32  # lengths below 1, 2, 4, ... tokens


class Seen:
    """Which digests came before, in eight bytes each: of many corpora's worth most lie in files of `folder`."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.runs: list[np.ndarray] = []  # each sorted, each at most half as long as the one before it
        self.laid: list[np.memmap] = []  # sorted runs in files

    def fresh(self, digests: np.ndarray) -> np.ndarray:
        """Which (n,) of the digests (n,) uint64 come for the first time; from now on they have been seen."""
        order = np.argsort(digests, kind="stable")
        wanted = digests[order]  # neighbours look at the same pages of a file
        first = np.ones(len(digests), dtype=bool)
        first[1:] = wanted[1:] != wanted[:-1]
        for run in (*self.laid, *self.runs):
            place = np.searchsorted(run, wanted)
            first &= run[np.minimum(place, len(run) - 1)] != wanted
        for run in self.laid:
            run._mmap.madvise(mmap.MADV_DONTNEED)  # what was looked at need not stay in memory
        if first.any():
            self.runs.append(wanted[first])
        while len(self.runs) > 1 and len(self.runs[-2]) < 2 * len(self.runs[-1]):
            run = np.concatenate(self.runs[-2:])
            run.sort()
            self.runs[-2:] = [run]
        if self.folder is not None and self.runs and len(self.runs[0]) >= HELD:
            self._lay()
        found = np.empty_like(first)
        found[order] = first
        return found

    def _lay(self) -> None:
        """Move the longest run into a file."""
        path = self.folder / f"seen-{len(self.laid)}"
        with atomic(path) as part:
            self.runs.pop(0).tofile(part)
        self.laid.append(np.memmap(path, dtype="<u8", mode="r"))


class Card:
    """Numbers about a corpus. `state` gives them as JSON, from which an equal card is made."""

    def __init__(self, state: dict | None = None):
        state = state or {}
        self.parts = {part: Counter(state.get("parts", {}).get(part, {})) for part in PARTS}
        self.counts = Counter(state.get("counts", {}))
        self.lengths = np.asarray(state.get("lengths", [0] * BINS), dtype=np.int64)
        self.longest: list[list] = state.get("longest", [])
        self.reasons = Counter(state.get("reasons", {}))

    def state(self) -> dict:
        """Everything, as JSON."""
        return {
            "parts": {part: dict(counts) for part, counts in self.parts.items()},
            "counts": dict(self.counts),
            "lengths": self.lengths.tolist(),
            "longest": self.longest,
            "reasons": dict(self.reasons),
        }

    def add(self, name: str, part: Part) -> None:
        """Count documents of a part."""
        counts = self.parts[name]
        counts["documents"] += len(part.sizes)
        counts["tokens"] += int(part.sizes.sum(dtype=np.int64))
        if part.marks is not None:
            counts["learned"] += int(np.count_nonzero(part.marks))
        self.counts["bytes"] += int(part.widths.sum())
        # sizes from 2^(k - 1) up to 2^k - 1 fall into bin k
        bins = np.frexp(part.sizes.astype(np.float64))[1]
        self.lengths += np.bincount(bins, minlength=BINS)[:BINS]
        base = self.counts["seen"]  # documents of the parcels before this one
        found = [[int(part.sizes[number]), base + order, where] for number, (order, where) in part.longest.items()]
        self.longest = sorted([*self.longest, *found], key=lambda each: (-each[0], each[1]))[:TOP]

    def describe(self) -> dict:
        """What corpus.json says of it."""
        tokens = sum(counts["tokens"] for counts in self.parts.values())
        last = int(np.flatnonzero(self.lengths).max(initial=0))
        said = {
            "documents": sum(counts["documents"] for counts in self.parts.values()),
            "tokens": tokens,
            "bytes": self.counts["bytes"],
            "bytes_per_token": round(self.counts["bytes"] / tokens, 4) if tokens and self.counts["bytes"] else None,
            "empty": self.counts["empty"],
            "skipped": self.counts["skipped"],
            "reasons": dict(sorted(self.reasons.items(), key=lambda each: (-each[1], each[0]))),
            "duplicates": self.counts["duplicates"],
            "duplicates_dropped": self.counts["dropped"],
        }
        for part, counts in self.parts.items():
            said[part] = {"documents": 0, "tokens": 0} | dict(counts)
        said["lengths"] = [
            {"from": 1 << max(0, k - 1) if k else 0, "to": (1 << k) - 1, "documents": int(self.lengths[k])}
            for k in range(last + 1)
        ]
        said["longest"] = [{"tokens": tokens, "origin": origin} for tokens, _, origin in self.longest]
        return said


def kept(part: Part, keep: np.ndarray) -> Part:
    """A part without the documents that are not to be kept (n,), but for its tokens, which stay."""
    if keep.all():
        return part
    new = np.cumsum(keep) - 1  # numbers of those that stay
    return Part(
        part.tokens,
        None if part.marks is None else part.marks[np.repeat(keep, part.sizes)],
        part.sizes[keep],
        part.digests[keep],
        part.widths[keep],
        {int(new[number]): found for number, found in part.longest.items() if keep[number]},
    )


def count_parcel(card: Card, parcel: Parcel) -> None:
    """Count what a parcel tells of, after its documents."""
    card.counts.update(parcel.counts)
    card.counts["skipped"] += len(parcel.errors)
    for error in parcel.errors:
        why = reason(error)
        card.reasons[why if why in card.reasons or len(card.reasons) < KINDS else "something else"] += 1


def reason(error: str) -> str:
    """What is wrong with a row, without where it is and what stands in it: one text for all of its kind."""
    said = VALUE.sub(lambda found: found[1] or "...", NUMBER.sub("#", PLACE.sub("", error, count=1)))
    return said.partition(";")[0][:80].strip()
