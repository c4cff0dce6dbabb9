"""Write the questions of a benchmark, or the questions or pairs of a corpus, as rows that the other steps read.

python -m rwkvpipe.questions --spec '{"task":"choice","synthetic":"counting.exam","limit":200}' --out exam.jsonl
"""

import logging
from collections.abc import Iterator
from itertools import chain, islice

from rwkvpipe.base.config import BenchmarkConfig, CorpusConfig
from rwkvpipe.base.corpus import PLAIN
from rwkvpipe.base.errors import ConfigError, DataError, Parser, new_file, run
from rwkvpipe.base.files import write_jsonl
from rwkvpipe.base.strict import check, given_json
from rwkvpipe.data import corpus
from rwkvpipe.data.document import Document
from rwkvpipe.data.synthetic import generate

log = logging.getLogger("rwkvpipe")
MADE = 1000  # questions of a made benchmark whose settings set no limit


def read_spec(text: str) -> BenchmarkConfig | CorpusConfig:
    """A benchmark's settings (they have a task) or a corpus's. Raises ConfigError for others."""
    value = given_json(text, "--spec")
    benchmark = isinstance(value, dict) and "task" in value
    spec = check(BenchmarkConfig if benchmark else CorpusConfig, value, "--spec")
    if not benchmark and spec.format not in PLAIN:
        raise ConfigError(f"--spec: format {spec.format}; a corpus of questions has format question, of pairs pairs")
    return spec


def texts(file: str | None, spec: BenchmarkConfig, seed: int) -> Iterator[dict]:
    """Rows of task bits: a whole text file is one text, of JSON rows each is one."""
    if file is None:
        for document in generate(spec.synthetic, seed, spec.limit or MADE):
            if document.text is None:
                raise ConfigError(f"synthetic: {spec.synthetic} makes no texts, which task bits reads")
            yield {"text": document.text}
    else:
        for document in corpus.Reader(spec, "text").documents(file):
            if document.ids is not None:
                raise DataError(f"{document.origin}: numbers; task bits reads texts: write them as one, with spaces")
            if not document.text:
                raise DataError(f"{document.origin}: the text is empty; task bits needs one to read")
            yield {"text": document.text}


def found(
    file: str | None, spec: BenchmarkConfig | CorpusConfig, seed: int, bad: corpus.Bad = corpus.stop
) -> Iterator[Document]:
    """Questions of a file or of a made corpus, each with what the task needs; bad rows go to `bad`."""
    choice = isinstance(spec, BenchmarkConfig) and spec.task == "choice"
    if isinstance(spec, CorpusConfig) and spec.format == "pairs":
        yield from corpus.documents(file, spec, bad)
        return
    if file is not None:
        source = corpus.questions(file, spec, bad)
    elif isinstance(spec, CorpusConfig):
        source = generate(spec.synthetic, seed if spec.seed is None else spec.seed, spec.count)
    else:
        source = generate(spec.synthetic, seed, spec.limit or MADE)
    for document in source:
        if document.question is None:
            raise ConfigError(f"synthetic: {spec.synthetic} makes no questions")
        if choice and document.options is None:
            raise DataError(f"{document.origin}: no options, which task choice compares; columns.options names them")
        yield document


def main(argv: list[str] | None = None) -> None:
    """Write questions with answers (and options), or texts for task bits, one JSON row a line."""
    parser = Parser(prog="rwkvpipe.questions", description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="the questions as they came; nothing for made ones")
    parser.add_argument("--spec", required=True, help="settings of the benchmark, or of the corpus, as JSON")
    parser.add_argument("--seed", type=int, default=0, help="of made questions")
    parser.add_argument("--out", required=True, type=new_file, help="FILE.jsonl")
    given = parser.parse_args(argv)
    spec = read_spec(given.spec)
    file = given.file or spec.path
    if (file is None) == (spec.synthetic is None):
        raise ConfigError("--spec: synthetic makes the questions; give a file or synthetic, not both")
    bits = isinstance(spec, BenchmarkConfig) and spec.task == "bits"
    skipped: list[dict] = []
    learned = isinstance(spec, CorpusConfig)  # then rewards may ask for columns of the user's own
    bad = corpus.strict if learned else corpus.stop
    if learned and spec.on_error == "skip":

        def bad(error: DataError) -> None:
            skipped.append({"error": str(error)})

    asked = (
        texts(file, spec, given.seed)
        if bits
        else ((each.more or {} if learned else {}) | each.row() for each in found(file, spec, given.seed, bad))
    )
    limit = spec.limit
    rows = islice(asked, limit)
    if (first := next(rows, None)) is None:
        raise DataError(f"{file or spec.synthetic}: nothing in it; give at least one {'text' if bits else 'question'}")
    count = write_jsonl(given.out, chain([first], rows))
    if limit and file is not None and count < limit:
        log.info("%s: %d rows, limit is %d", file, count, limit)
    if skipped:
        write_jsonl(given.out.with_suffix(".skipped.jsonl"), skipped)
        log.info("%d rows left out, listed in %s", len(skipped), given.out.with_suffix(".skipped.jsonl"))
    log.info("%s: %d rows", given.out, count)


if __name__ == "__main__":
    run(main)
