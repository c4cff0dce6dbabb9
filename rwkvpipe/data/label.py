"""Which positions the labels of tokenised rows belong to: the same ones, or the next. The corpus says so, not a row."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice

from rwkvpipe.base.config import CorpusConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.data.corpus import Reader
from rwkvpipe.data.table import raw_rows, row_of
from rwkvpipe.data.talk import talk

log = logging.getLogger("rwkvpipe")

SEEN = 1000  # rows that are looked at
SURE = 0.99  # share of those which tell that tell the same
KINDS = {"internal": "the same positions", "preshifted": "the next positions"}


def settled(spec: CorpusConfig, paths: Sequence[str]) -> CorpusConfig:
    """The same settings; where labels are `auto`, with what the first rows of the corpus show.

    A row whose labels fit both shows nothing: if none does, labels are those of the same positions. Raises DataError
    naming the first row that speaks against the others where more than a hundredth do. Rows after the first ones are
    judged when they are read.
    """
    if spec.format != "chat" or spec.labels != "auto" or spec.columns:
        return spec
    told, first, rows = Counter(), {}, 0
    for place, row in islice(_tokenised(spec, paths), SEEN):
        rows += 1
        fits = [kind for kind in KINDS if _reads(row, place, spec.model_copy(update={"labels": kind}))]
        if len(fits) == 1:
            told[fits[0]] += 1
            first.setdefault(fits[0], place)
    if not rows:
        return spec
    kind, count = max(told.items(), key=lambda item: item[1], default=("internal", 0))
    if count < SURE * told.total():
        other = next(one for one in KINDS if one != kind)
        raise DataError(
            f"{first[other]}: `labels` are those of {KINDS[other]}, and in {count} of {told.total()} rows those of"
            f" {KINDS[kind]}; mend the rows, or say under labels which are meant (on_error: skip leaves the others out)"
        )
    log.info("labels are those of %s%s", KINDS[kind], "" if count else ": rows fit the next ones as well")
    return spec.model_copy(update={"labels": kind})


def _tokenised(spec: CorpusConfig, paths: Sequence[str]) -> Iterator[tuple[object, dict]]:
    """(place, row) of rows that hold ids, among the first ones; what is wrong with a row is said when it is read."""
    reader = Reader(spec, spec.format)
    raw = (one for path in paths for unit in reader.units(path) for one in raw_rows(unit, reader.needed))
    try:
        for place, text in islice(raw, SEEN):
            with suppress(DataError):
                row = row_of(text, place)
                if row.get("input_ids") is not None:
                    yield place, row
    except DataError:
        return


def _reads(row: dict, place: object, spec: CorpusConfig) -> bool:
    """Whether a row can be read so."""
    try:
        return bool(talk(row, {}, place, spec).messages)
    except DataError:
        return False
