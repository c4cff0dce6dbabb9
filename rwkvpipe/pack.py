"""Turn a corpus into tokens: a binidx pair to train on, another to validate with, masks where there are turns.

python -m rwkvpipe.pack --spec '{"synthetic":"counting.documents","count":1000,"tokenizer":"b"}' --tokenizer bytes --out c
"""  # noqa: E501

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from rwkvpipe.base.config import CorpusConfig
from rwkvpipe.base.errors import ConfigError, DataError, Parser, PipeError, run
from rwkvpipe.base.files import canonical, digest
from rwkvpipe.base.fingerprint import fingerprint
from rwkvpipe.base.pace import Pace
from rwkvpipe.base.sources import pairs_of
from rwkvpipe.base.strict import check_json
from rwkvpipe.data.document import Document
from rwkvpipe.data.given import adopt
from rwkvpipe.data.label import settled
from rwkvpipe.data.packing import WORK, Packing, tell
from rwkvpipe.data.parcel import Packer, Parcel, Task, limited, loose
from rwkvpipe.data.synthetic import generate
from rwkvpipe.data.unit import Unit
from rwkvpipe.data.workers import in_order
from rwkvpipe.tokenizer.bpe import BpeTokenizer
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.tokenizer.load import BPE_ENGINES, load_engine
from rwkvpipe.tokenizer.trie import TrieTokenizer

log = logging.getLogger("rwkvpipe")

Job = tuple[Unit, str | None]


def _made(spec: CorpusConfig, seed: int) -> Iterator[Document]:
    """A made corpus, each document checked to be of the spec's format."""
    for document in generate(spec.synthetic, seed if spec.seed is None else spec.seed, spec.count):
        talks = document.messages is not None or (document.question is not None and document.answer is not None)
        fits = {"text": document.text is not None, "chat": talks, "seq2seq": talks, "array": document.ids is not None}
        if not fits[spec.format]:
            raise ConfigError(f"synthetic: {spec.synthetic} makes no documents of format {spec.format}")
        yield document


def _stamp(file: str) -> list:
    found = os.stat(file)
    return [file, found.st_size, found.st_mtime_ns]


def _paths(given: str | Sequence[str] | None) -> list[str]:
    """One path, several or none, as a list."""
    return [given] if isinstance(given, str) else list(given or ())


class Source:
    """The files that a corpus is read from, cut into jobs, and what they were when that was done."""

    def __init__(self, packer: Packer, task: Task, workers: int):
        self.packer, self.task, self.workers = packer, task, workers
        self.jobs: list[Job] = []
        self.inputs: list[dict] = []
        self.stamps: list[list] = []

    def add(self, path: str, part: str | None) -> None:
        """Add the files of a path, whose documents belong to `part`, or are shared out."""
        units = self.packer.reader.units(path)
        files = list(dict.fromkeys(unit.path for unit in units))
        stamps = [_stamp(file) for file in files]
        borders = {file: [unit.start for unit in units if unit.path == file and unit.kind == "lines"] for file in files}
        found = dict(zip(files, in_order(self.task, list(borders.items()), self.workers), strict=True))
        lines = {(file, start): n for file in files for start, n in zip(borders[file], found[file][1], strict=True)}
        self.jobs += [(replace(unit, lines=lines.get((unit.path, unit.start))), part) for unit in units]
        self.inputs += [
            {"file": file, "bytes": stamp[1], "sha256": found[file][0]}
            for file, stamp in zip(files, stamps, strict=True)
        ]
        self.stamps += stamps

    def check(self) -> None:
        """Raise DataError when a file is not what it was."""
        for stamp in self.stamps:
            if _stamp(stamp[0]) != stamp:
                raise DataError(f"{stamp[0]}: changed while it was packed; run the same command again")

    def parcels(self, done: int, limit: int | None) -> Iterable[Parcel]:
        """Parcels of the jobs after those that are done, in order."""
        if limit is None:
            return in_order(self.task, self.jobs[done:], self.workers)
        shared = [unit for unit, part in self.jobs if part is None]
        return chain(limited(self.packer, shared, limit), map(self.task, self.jobs[len(shared) :]))


def _tokenizer_digest(tokenizer: str) -> str:
    """Digest of a tokenizer's files; of one that has none, its name."""
    path = Path(tokenizer)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    files = [file for file in files if file.is_file() and not file.name.startswith(".")]
    return canonical({file.name: digest(file) for file in files}) if files else tokenizer


def pack(folder: Path, spec: CorpusConfig, tokenizer: str, source: Source, made: Iterable[Document] | None) -> dict:
    """Write both pairs and what is said of them, or nothing."""
    packer = source.packer
    mark = {"spec": spec.model_dump(mode="json"), "files": source.stamps, "tokenizer": _tokenizer_digest(tokenizer)}
    mark |= {"code": fingerprint("pack"), "jobs": len(source.jobs)}
    once = made is not None or spec.limit is not None  # quick: it begins at the beginning
    packing = Packing(folder, spec, packer.dtype, f"once {time.time_ns()}" if once else canonical(mark))
    try:
        parcels = source.parcels(packing.done, spec.limit)
        if made is not None:
            parcels = chain(loose(packer, made), parcels)
        whole = sum(unit.weight for unit, _ in source.jobs[packing.done :])
        pace = Pace("packed", whole) if made is None else Pace("packed", spec.count, "documents")
        packing.add_all(parcels, pace)
        source.check()
        valid = bool(spec.valid) or packing.card.parts["valid"]["documents"] > 0
        name = source.inputs[0]["file"] if len(source.inputs) == 1 else spec.path or spec.synthetic
        packing.check(name, valid)
        about = {"format": spec.format, "vocab_size": packer.tokenizer.size, "dtype": str(packer.dtype)}
        about |= {"begin": packer.tokenizer.eos or 0} if spec.format == "seq2seq" else {}
        about |= {"inputs": source.inputs, "tokenizer": _tokenizer_digest(tokenizer)}
        described = packing.finish(about)
    except (PipeError, OSError):
        packing.files.forget()
        raise
    tell(described, packing.card.counts)
    if isinstance(packer.tokenizer, TrieTokenizer | BpeTokenizer):
        log.info("tokenizer: engine %s", packer.tokenizer.engine)
    return described


def main(argv: list[str] | None = None) -> None:
    """Pack files or a made corpus; writes train and valid pairs and, last of all, corpus.json."""
    parser = Parser(prog="rwkvpipe.pack", description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="*", help="the corpus: a file, a folder or a glob; nothing for a made one")
    parser.add_argument("--spec", required=True, help="the corpus's settings as JSON")
    parser.add_argument("--tokenizer", required=True, help="its vocabulary: a folder, or `bytes`")
    parser.add_argument("--valid", nargs="+", help="files of its own to validate with")
    parser.add_argument("--seed", type=int, default=0, help="of a made corpus whose settings name none")
    parser.add_argument("--workers", type=int, default=1, help="processes that read and encode")
    parser.add_argument("--bpe-engine", choices=BPE_ENGINES, default="tokenizers", help="what encodes by a BPE")
    parser.add_argument("--out", required=True, type=Path, help="folder of the packed corpus")
    given = parser.parse_args(argv)
    spec = check_json(CorpusConfig, given.spec, "--spec")
    if given.workers < 1:
        raise ConfigError(f"--workers: {given.workers} processes; 1 is the least")
    load = partial(load_engine, given.tokenizer, given.bpe_engine)
    tokenizer = load()
    if spec.format == "question":
        raise ConfigError("--spec: format question is not packed; rwkvpipe.questions writes such corpora")
    if spec.format == "array" and not isinstance(tokenizer, IntegerTokenizer):
        raise ConfigError(f"--tokenizer: format array holds numbers, {given.tokenizer} is not of kind integer")
    files, valid = _paths(given.file or spec.path), _paths(given.valid or spec.valid_path)
    if (not files) == (spec.synthetic is None):
        raise ConfigError("--spec: synthetic makes the corpus; give a file or synthetic, not both")
    if spec.format == "binidx":
        parts = {"train": files, "valid": valid}
        found = {part: [pair for path in paths for pair in pairs_of(path)] for part, paths in parts.items()}
        about = {"format": spec.format, "vocab_size": tokenizer.size, "tokenizer": _tokenizer_digest(given.tokenizer)}
        tell(adopt(given.out, found, about, how=spec.join, tokenizer=tokenizer), Counter())
        return
    if max(len(files), len(valid)) > 1:
        raise ConfigError(f"{files[1]}: one path, please: a folder or a glob means many files")
    if spec.eod and tokenizer.eos is None:
        raise ConfigError(f"--spec: eod: {given.tokenizer} knows no id that ends texts; leave eod out")
    spec = settled(spec, [*files, *valid])
    room = given.out.resolve() / WORK
    task = Task(spec, load, room)
    task.packer = Packer(spec, tokenizer, room)
    source = Source(task.packer, task, given.workers)
    for path, part in [(path, None) for path in files] + [(path, "valid") for path in valid]:
        source.add(path, part)
    pack(given.out, spec, given.tokenizer, source, None if files else _made(spec, given.seed))


if __name__ == "__main__":
    run(main)
