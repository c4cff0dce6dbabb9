"""Sources with targets, for models that read the one and write the other: rows as pairs, and pairs as ids.

A packed pair is one document: the source's ids, the id that ends texts, the target's ids, and that id again. The mask
beside them is 0 over the source and 1 over the target, so that nothing else need be stored: what a decoder reads is the
target behind the id `begin` of corpus.json, less its last id, and its labels are the target.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import canonical
from rwkvpipe.data.document import Document
from rwkvpipe.data.question import words
from rwkvpipe.data.talk import KEYS, UNLEARNED, equipped, recognised, whole_numbers
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.load import Tokenizer

SIDES = ("source", "target")
TRIPLET = ("encoder_ids", "decoder_input_ids", "labels")
PAIR_KEYS = KEYS | {*SIDES, *TRIPLET, "targets"}


class Choices(Protocol):
    """Settings that say where texts are divided, and into windows of how many ids long ones are cut before."""

    pairing: Literal["rows", "split", "copy"]
    cut: int | None


def _triplet(row: dict, where: object) -> tuple[dict, ...]:
    """Ids of three kinds as some programs write them: the decoder's input must be its labels, one place later."""
    labels = row["labels"] if row.get("labels") is not None else row.get("targets")
    source = whole_numbers(row["encoder_ids"], "encoder_ids", where)
    target = [label for label in whole_numbers(labels, "labels", where, least=UNLEARNED) if label != UNLEARNED]
    given = row.get("decoder_input_ids")
    if not target:
        raise DataError(f"{where}: `labels` has nothing to learn; remove the row")
    if given is not None:
        read = whole_numbers(given, "decoder_input_ids", where)[1 : len(target)]
        if read != target[:-1]:
            raise DataError(
                f"{where}: `decoder_input_ids` is not `labels` behind a first id; what a decoder reads is what it wrote"
            )
    return ({"role": "ids", "content": "", "ids": [*source, *target], "marks": [0] * len(source) + [1] * len(target)},)


def two_sides(row: dict, columns: Mapping[str, str], where: object, choices: Choices) -> Document:
    """A row as a pair: `source` and `target`, all that talks are told by, `encoder_ids` with `labels`, or a text.

    Of a talk the last turn is the target. Raises DataError naming `where`.
    """
    whole = choices.pairing == "rows" and not columns
    if whole and row.get("encoder_ids") is not None:
        return Document(messages=_triplet(row, where), origin=where)
    if whole and all(row.get(side) is not None for side in SIDES):
        raw = ({"role": "raw", "content": words(row, side, where)} for side in SIDES)
        return Document(messages=tuple(raw), origin=where)
    found = tuple(equipped(recognised(row, columns, where), row, where, None))
    if choices.pairing != "rows":
        if len(found) != 1 or found[0]["role"] != "raw":
            raise DataError(f"{where}: pairing {choices.pairing} divides texts, in `text`; this row has sides already")
    elif len(found) < 2 or found[-1]["role"] not in ("assistant", "raw"):
        raise DataError(
            f"{where}: a source without a target; give both (source and target, question and answer, a talk that ends"
            " with the assistant), or for texts pairing: split"
        )
    return Document(messages=found, origin=where)


def divided(content: str, count: int) -> int:
    """Where a text of `count` tokens is divided: by lot between a quarter and three quarters, its content the lot."""
    lot = hashlib.blake2b(canonical(content).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    share = 0.25 + int.from_bytes(lot, "little") / 2**65
    return min(max(1, int(count * share)), count - 1)


class Pairing:
    """Pairs as ids (n,) with marks (n,), 1 over the target."""

    def __init__(self, choices: Choices):
        self.copies = choices.pairing == "copy"
        self.cut = choices.cut

    def windows(self, document: Document, tokenizer: Tokenizer) -> Iterator[Document]:
        """A text as documents of `cut` ids at most, each a pair; a last one too short to be divided is left out.

        All else, and without `cut`, stays one document. Raises DataError for a text that has no ids.
        """
        messages = document.messages or ()
        try:
            ids = tokenizer.encode(messages[0]["content"]) if self.cut and len(messages) == 1 else []
        except DataError as error:
            raise DataError(f"{document.origin}: {error}") from None
        if len(ids) <= (self.cut or 0) or messages[0]["role"] == "ids":
            yield document
            return
        for start in range(0, len(ids), self.cut):
            window = ids[start : start + self.cut]
            if len(window) > 1 or self.copies:
                said = tokenizer.decode(window)
                both, marks = self._sides(said, window, tokenizer)
                turn = {"role": "ids", "content": said, "ids": both, "marks": marks}
                yield Document(messages=(turn,), origin=document.origin)

    def _sides(self, content: str, ids: list[int], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """A text of these ids as a pair of ids and marks."""
        if not self.copies and len(ids) < 2:
            raise DataError("a text of one token cannot be divided; remove the row, or on_error: skip")
        place = divided(content, len(ids)) if not self.copies else 0
        return _joined(ids if self.copies else ids[:place], ids[place:], tokenizer)

    def __call__(self, messages: Sequence[dict], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Ids and marks of a pair. Raises DataError for a text that is too short to be divided."""
        if messages[0]["role"] == "ids":
            return messages[0]["ids"], messages[0]["marks"]
        if len(messages) == 1:
            content = messages[0]["content"]
            return self._sides(content, tokenizer.encode(content), tokenizer)
        asked = messages[0]["content"] if len(messages) == 2 else chat.prompt(messages[:-1])
        return _joined(tokenizer.encode(asked), tokenizer.encode(messages[-1]["content"]), tokenizer)


def _joined(source: list[int], target: list[int], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of both sides, each with its end, and marks."""
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    return [*source, *end, *target, *end], [0] * len([*source, *end]) + [1] * len([*target, *end])
