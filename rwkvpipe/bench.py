"""Let a model answer the questions of a benchmark; nothing is graded yet.

python -m rwkvpipe.launch 0 bench --spec '{"task":"choice","path":"e.jsonl"}' --model m.pth --tokenizer bytes \
    --questions e.jsonl --out e.answers.jsonl
"""

import hashlib
import json
import logging
from pathlib import Path

from rwkvpipe.base.config import BenchmarkConfig
from rwkvpipe.base.errors import ConfigError, DataError, Parser, new_file, run
from rwkvpipe.base.files import append_line, canonical, digest, write_jsonl
from rwkvpipe.base.strict import check_json
from rwkvpipe.infer.engine import Engine, load_vocabulary
from rwkvpipe.infer.progress import Progress
from rwkvpipe.tasks.registry import Task, asked, read_questions
from rwkvpipe.train import dist
from rwkvpipe.weights import store

log = logging.getLogger("rwkvpipe")


def mark(spec: BenchmarkConfig, model: str, tokenizer: str, questions: str) -> str:
    """What decides the answers, as one short text: settings, weights, vocabulary, questions."""
    given = Path(tokenizer)
    folder = given.parent if given.suffix == ".json" else given
    words = [path for path in (folder / "tokenizer.json", folder / "vocab.txt", given) if path.is_file()]
    parts = [spec.model_dump(mode="json"), "" if words else tokenizer]
    parts += [store.mark(model), *(digest(path) for path in (Path(questions), *words))]
    return hashlib.sha256(canonical(parts).encode()).hexdigest()[:32]


class Partial:
    """Answers on their way, in the order in which they come: a line that says to what, then one an answer."""

    def __init__(self, path: Path, mark: str):
        self.path, self.mark = path, mark
        self.answers: dict[int, dict] = {}

    def open(self, count: int) -> None:
        """Take over what an earlier run with the same mark left whole of `count` answers; begin anew otherwise."""
        rows = self._rows() if self.path.is_file() else []
        if rows and rows[0].get("mark") == self.mark:
            found = {row["row"]: row for row in rows[1:] if isinstance(row.get("row"), int)}
            self.answers = {row: answer for row, answer in found.items() if 1 <= row <= count}
        elif self.path.is_file():
            log.info("%s: answers of other weights, questions or settings; left out", self.path)
        # a torn last line must not join the next one
        write_jsonl(self.path, [{"mark": self.mark}, *self.answers.values()])

    def _rows(self) -> list[dict]:
        """Whole lines up to the first that is not: what follows that is not to be trusted."""
        rows = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict):
                break
            rows.append(row)
        return rows

    def add(self, answer: dict) -> None:
        """Keep one more answer."""
        append_line(self.path, answer)
        self.answers[answer["row"]] = answer

    def finish(self, path: Path) -> int:
        """Write all answers in the order of their questions; the partial file has served and goes."""
        count = write_jsonl(path, (self.answers[row] for row in sorted(self.answers)))
        self.path.unlink(missing_ok=True)
        return count


def named(error: DataError, engine: Engine, task: Task, questions: list[dict], path: str) -> DataError:
    """The same error with file and line, if it is that the vocabulary lacks what a question is made of."""
    for number, question in enumerate(questions, 1):
        try:
            for text in (task.prompt(question), *(question.get("options") or ())):
                engine.tokenizer.encode(text)
        except DataError as found:
            return DataError(f"{path}:{number}: {found}")
    return error


def main(argv: list[str] | None = None) -> None:
    """Write one answer a line in the order of the questions; goes on where a stopped run was."""
    parser = Parser(prog="rwkvpipe.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--spec", required=True, help="the benchmark's settings as JSON")
    parser.add_argument("--model", required=True, help="the weights that answer")
    parser.add_argument("--tokenizer", required=True, help="their vocabulary: a folder, or `bytes`")
    parser.add_argument("--questions", required=True, help="FILE.jsonl, as rwkvpipe.questions writes it")
    parser.add_argument("--rows", type=int, default=64, help="rows at a time; decides memory, no result")
    parser.add_argument("--out", required=True, type=new_file, help="NAME.answers.jsonl")
    given = parser.parse_args(argv)
    if given.rows < 1:
        raise ConfigError(f"--rows: {given.rows} at a time; 1 is the least")
    spec = check_json(BenchmarkConfig, given.spec, "--spec")
    task, questions = read_questions(given.questions, spec)
    model = store.load_model(given.model, dist.start().device)
    engine = Engine(model, load_vocabulary(given.tokenizer, model.config.vocab_size, given.model), given.rows)
    partial = Partial(
        given.out.with_name(f"{given.out.name}.part"), mark(spec, given.model, given.tokenizer, given.questions)
    )
    partial.open(len(questions))
    done, left = {row - 1 for row in partial.answers}, len(questions) - len(partial.answers)
    if done:
        log.info("going on: %d of %d are answered", len(done), len(questions))
    log.info("task %s: %d questions, %d rows at a time, precision fp32", spec.task, left, given.rows)
    progress = Progress("answered", left)
    try:
        for number, answer in task.ask(engine, questions, spec, done):
            partial.add({"row": number + 1, "asked": asked(task, questions[number]), **answer})
            progress.add(1)
    except DataError as error:
        if not partial.answers:
            partial.path.unlink(missing_ok=True)
        raise named(error, engine, task, questions, given.questions) from None
    log.info("%s: %d answers", given.out, partial.finish(given.out))


if __name__ == "__main__":
    run(main)
