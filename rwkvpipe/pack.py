"""Turn a corpus into tokens: a binidx pair to train on, another to validate with, masks where there are turns.

python -m rwkvpipe.pack --spec '{"synthetic":"counting.documents","count":1000,"tokenizer":"b"}' --tokenizer bytes --out c
"""  # noqa: E501

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from rwkvpipe.base.config import CorpusConfig
from rwkvpipe.base.errors import ConfigError, DataError, Parser, run
from rwkvpipe.base.files import write_json
from rwkvpipe.base.pace import Pace
from rwkvpipe.base.strict import check_json
from rwkvpipe.data.binidx import BinidxWriter, token_dtype
from rwkvpipe.data.corpus import documents
from rwkvpipe.data.document import Document, encoded
from rwkvpipe.data.synthetic import generate
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.tokenizer.load import Tokenizer, load_tokenizer
from rwkvpipe.tokenizer.template import load_template
from rwkvpipe.tokenizer.trie import TrieTokenizer

log = logging.getLogger("rwkvpipe")


def _made(spec: CorpusConfig, seed: int) -> Iterator[Document]:
    """A made corpus, each document checked to be of the spec's format."""
    for document in generate(spec.synthetic, seed if spec.seed is None else spec.seed, spec.count):
        talks = document.messages is not None or (document.question is not None and document.answer is not None)
        fits = {"text": document.text is not None, "chat": talks, "array": document.ids is not None}
        if not fits[spec.format]:
            raise ConfigError(f"synthetic: {spec.synthetic} makes no documents of format {spec.format}")
        yield document


class Packer:
    """Writes documents to the train or the valid pair and counts what it sees."""

    def __init__(self, folder: Path, spec: CorpusConfig, tokenizer: Tokenizer, *, source: str | None = None):
        self.folder, self.spec, self.tokenizer = folder, spec, tokenizer
        self.source = source or spec.path or spec.synthetic
        self.render = load_template(spec.template).render if spec.template else chat.render
        self.counts = {part: Counter() for part in ("train", "valid")}
        self.empty = self.blank_lines = self.tokens = self.documents = 0
        self.pace = Pace("packed", spec.count or 0, "documents") if spec.synthetic else Pace("packed", unit="tokens")

    def pack(self, training: Iterable[Document], validation: Iterable[Document]) -> None:
        """Write both pairs, or neither. `validation` goes to valid; of `training`, the share that the spec says."""
        chat = self.spec.format == "chat"
        dtype = token_dtype(self.tokenizer.size)
        for name in (*self.counts, "corpus.json"):
            for left in self.folder.glob(f".{name}.*"):  # what a killed run was writing
                left.unlink(missing_ok=True)
        with ExitStack() as stack:
            writers = {
                part: stack.enter_context(BinidxWriter(self.folder / part, dtype, masked=chat)) for part in self.counts
            }
            for document in training:
                part = "valid" if self.spec.valid and document.fraction < self.spec.valid else "train"
                self._add(document, writers[part], self.counts[part])
            for document in validation:
                self._add(document, writers["valid"], self.counts["valid"])
            self._check(valid=bool(self.spec.valid) or self.counts["valid"]["documents"] > 0)
            # from here to the end files of an older pack stand beside new ones: without corpus.json it is none
            (self.folder / "corpus.json").unlink(missing_ok=True)

    def _add(self, document: Document, writer: BinidxWriter, counts: Counter) -> None:
        if document.text == "":
            self.empty += 1
            return
        for ids, mask in encoded(document, self.tokenizer, self.render):
            writer.extend(ids, mask)
            counts["tokens"] += len(ids)
            self.tokens += len(ids)
            self.pace.at(self.documents if self.spec.synthetic else self.tokens)
            if mask is not None:
                counts["learned"] += sum(mask)
        writer.end()
        counts["documents"] += 1
        self.documents += 1
        if self.spec.format == "chat":
            said = (turn["content"] for turn in document.talk() if turn["role"] == "assistant")
            self.blank_lines += any(chat.TURN_END in words for words in said)

    def _check(self, valid: bool) -> None:
        found = {part: counts["documents"] for part, counts in self.counts.items()}
        if not found["train"] and not found["valid"]:
            raise DataError(
                f"{self.source}: no documents to train on ({self.empty} empty ones left out); give some text"
            )
        if not found["train"] or (valid and not found["valid"]):
            lacking = "train" if not found["train"] else "valid"
            raise DataError(
                f"{self.source}: valid: a share of {self.spec.valid} of {sum(found.values())} documents leaves none"
                f" to {lacking}; documents are held out whole: give more of them, another share, or valid_path"
            )
        if self.spec.format == "chat" and not self.counts["train"]["learned"]:
            raise DataError(
                f"{self.source}: no talk has words of the assistant, so there is nothing to learn;"
                " check columns and roles"
            )

    def describe(self) -> dict:
        """What corpus.json says."""
        parts = {part: dict(counts) or {"documents": 0, "tokens": 0} for part, counts in self.counts.items()}
        return {
            "format": self.spec.format,
            "vocab_size": self.tokenizer.size,
            "dtype": str(token_dtype(self.tokenizer.size)),
            "documents": sum(part["documents"] for part in parts.values()),
            "tokens": sum(part["tokens"] for part in parts.values()),
            "empty": self.empty,
            **parts,
        }


def main(argv: list[str] | None = None) -> None:
    """Pack a file or a made corpus; writes train and valid pairs and, last of all, corpus.json."""
    parser = Parser(prog="rwkvpipe.pack", description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="the corpus; nothing for a made one")
    parser.add_argument("--spec", required=True, help="the corpus's settings as JSON")
    parser.add_argument("--tokenizer", required=True, help="its vocabulary: a folder, or `bytes`")
    parser.add_argument("--valid", help="a file of its own to validate with")
    parser.add_argument("--seed", type=int, default=0, help="of a made corpus whose settings name none")
    parser.add_argument("--out", required=True, type=Path, help="folder of the packed corpus")
    given = parser.parse_args(argv)
    spec = check_json(CorpusConfig, given.spec, "--spec")
    tokenizer = load_tokenizer(given.tokenizer)
    if spec.format == "question":
        raise ConfigError("--spec: format question is not packed; rwkvpipe.questions writes such corpora")
    if spec.format == "array" and not isinstance(tokenizer, IntegerTokenizer):
        raise ConfigError(f"--tokenizer: format array holds numbers, {given.tokenizer} is not of kind integer")
    file = given.file or spec.path
    valid = given.valid or spec.valid_path
    if (file is None) == (spec.synthetic is None):
        raise ConfigError("--spec: synthetic makes the corpus; give a file or synthetic, not both")
    training = _made(spec, given.seed) if file is None else documents(file, spec)
    packer = Packer(given.out, spec, tokenizer, source=given.file)
    packer.pack(training, documents(valid, spec) if valid else ())
    described = packer.describe()
    write_json(given.out / "corpus.json", described)
    for part in ("train", "valid"):
        log.info("%s: %s documents, %s tokens", part, *(f"{described[part][n]:,}" for n in ("documents", "tokens")))
    if isinstance(tokenizer, TrieTokenizer):
        log.info("tokenizer: engine %s", tokenizer.engine)
    if packer.empty:
        log.info("%d empty documents left out", packer.empty)
    if packer.blank_lines:
        log.info("%d talks have a blank line inside an answer; a blank line ends a turn", packer.blank_lines)


if __name__ == "__main__":
    run(main)
