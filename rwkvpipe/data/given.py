"""Pairs that are there already, made into a corpus: linked, read where they lie, or copied into one."""

from pathlib import Path

import numpy as np

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import atomic, write_json
from rwkvpipe.data.binidx import Binidx, BinidxWriter
from rwkvpipe.data.card import BINS, Card
from rwkvpipe.data.joining import forget, join, joined_index, same_kind
from rwkvpipe.data.parcel import PARTS
from rwkvpipe.data.spread import write_parts
from rwkvpipe.tokenizer.load import Tokenizer

BLOCK = 1 << 20


def _clear(prefix: Path) -> None:
    """Remove the files of an older corpus; what links led to stays."""
    for kind in ("bin", "idx", "mask", "parts"):
        Path(f"{prefix}.{kind}").unlink(missing_ok=True)


def _link(pair: Binidx, prefix: Path, masked: bool) -> None:
    """Let the pair at `prefix` be another one, where that lies: nothing is copied."""
    for kind in ("bin", "idx", *(("mask",) if masked else ())):
        with atomic(f"{prefix}.{kind}") as part:
            part.unlink()
            part.symlink_to(Path(f"{pair.prefix}.{kind}").resolve())


def _spread(pairs: list[Binidx], prefix: Path, dtype: np.dtype) -> None:
    """One index over pairs that stay where they are."""
    write_parts(Path(f"{prefix}.parts"), [pair.prefix for pair in pairs])
    if pairs:
        with atomic(f"{prefix}.idx") as part:
            joined_index(part, pairs)
    else:
        with BinidxWriter(prefix, dtype):
            pass
        Path(f"{prefix}.bin").unlink()


def _count(card: Card, part: str, pairs: list[Binidx]) -> None:
    """What a card says of a part."""
    for pair in pairs:
        card.parts[part]["documents"] += len(pair.documents)
        card.parts[part]["tokens"] += len(pair)
        if pair.masked:
            for first in range(0, len(pair), BLOCK):
                card.parts[part]["learned"] += int((pair.mask(first, min(BLOCK, len(pair) - first)) != 0).sum())
        sizes = np.diff(pair.documents, axis=1).ravel()
        card.lengths += np.bincount(np.frexp(sizes.astype(np.float64))[1], minlength=BINS)


def owned(pair: Binidx, tokenizer: Tokenizer) -> None:
    """Read a pair that others made, and raise DataError for the first id in it that no token of the tokenizer owns."""
    known = np.array([tokenizer.owns(number) or number == tokenizer.eos for number in range(tokenizer.size)])
    for start in range(0, len(pair), BLOCK):
        ids = pair.tokens(start, min(BLOCK, len(pair) - start))
        fits = (ids >= 0) & (ids < len(known))
        fits[fits] = known[ids[fits]]
        if not fits.all():
            place = int(np.argmin(fits))
            raise DataError(
                f"{pair.prefix}.bin: token {start + place + 1} is the id {ids[place]}, which stands for nothing in the"
                f" vocabulary of {tokenizer.size}; name the tokenizer that the pair was made with"
            )


def marked(pair: Binidx) -> None:
    """Read the marks of a pair that others made, and raise DataError for the first that is none."""
    for start in range(0, len(pair), BLOCK):
        found = pair.weights(start, min(BLOCK, len(pair) - start))
        said = pair.mask(start, len(found))
        if said.dtype == np.uint8 and said.max() > 1:
            place = int(np.argmax(said > 1))
            raise DataError(
                f"{pair.prefix}.mask: token {start + place + 1} has the byte {said[place]}; a byte is 0 or 1, and other"
                " weights are fp32 numbers (little-endian), four bytes a token"
            )


def adopt(folder: Path, found: dict[str, list[str]], about: dict, *, how: str, tokenizer: Tokenizer) -> dict:
    """Make a corpus of pairs that are there, train and perhaps valid; returns what corpus.json says.

    One is linked. Several are read where they lie, or with `how` copy written as one pair. Raises DataError for pairs
    that do not go together.
    """
    pairs = {part: [Binidx(prefix) for prefix in found.get(part, ())] for part in PARTS}
    every = [pair for part in PARTS for pair in pairs[part]]
    same_kind(every)
    if not sum(map(len, pairs["train"])):
        raise DataError(f"{', '.join(found['train'])}: no tokens in it; give a pair that has some")
    for pair in every:
        owned(pair, tokenizer)
        if pair.masked:
            marked(pair)
    (folder / "corpus.json").unlink(missing_ok=True)
    card, masked, dtype = Card(), every[0].masked, every[0].dtype
    spread = how == "link" and max(map(len, pairs.values())) > 1
    for part in PARTS:
        prefix = folder / part
        if how == "copy" and pairs[part]:
            if not (folder / f".{part}.join").is_dir():  # or else it goes on
                _clear(prefix)
            join(found[part], prefix)
        else:
            forget(prefix)
            _clear(prefix)
            if spread:
                _spread(pairs[part], prefix, dtype)
            elif pairs[part]:
                _link(pairs[part][0], prefix, masked)
            else:
                with BinidxWriter(prefix, np.int32 if dtype.kind == "f" else dtype, masked=masked):
                    pass
        _count(card, part, pairs[part])
    inputs = [{"file": pair.prefix, "tokens": len(pair)} for pair in every]
    described = about | {"inputs": inputs, "dtype": str(dtype)} | card.describe()
    write_json(folder / "corpus.json", described)
    return described
