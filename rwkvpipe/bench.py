"""Let a model answer the questions of a benchmark; nothing is graded yet.

python -m rwkvpipe.launch 0 bench --spec '{"task":"choice","path":"e.jsonl"}' --model m.pth --tokenizer bytes \
    --questions e.jsonl --out e.answers.jsonl
"""

import logging
from pathlib import Path

from rwkvpipe.base.config import BenchmarkConfig
from rwkvpipe.base.errors import ConfigError, DataError, Parser, new_file, run
from rwkvpipe.base.partial import Partial, mark
from rwkvpipe.base.strict import check_json
from rwkvpipe.infer.engine import Engine, load_vocabulary
from rwkvpipe.infer.progress import Progress
from rwkvpipe.tasks.registry import TASKS, Task, asked, read_questions
from rwkvpipe.train import dist
from rwkvpipe.weights import store

log = logging.getLogger("rwkvpipe")


def named(error: DataError, engine: Engine, task: Task, questions: list[dict], path: str) -> DataError:
    """The same error with file and line, if it is that the vocabulary lacks what a question is made of."""
    read = engine.tokenizer.encode if isinstance(task, TASKS["bits"]) else engine.begin  # no prompt may be empty
    for number, question in enumerate(questions, 1):
        try:
            read(task.prompt(question))
            for option in question.get("options") or ():
                engine.tokenizer.encode(option)
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
    decides = [spec.model_dump(mode="json"), store.mark(given.model)]
    partial = Partial(given.out, mark(decides, given.tokenizer, [Path(given.questions)]))
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
        partial.leave()
        raise named(error, engine, task, questions, given.questions) from None
    log.info("%s: %d answers", given.out, partial.finish())


if __name__ == "__main__":
    run(main)
