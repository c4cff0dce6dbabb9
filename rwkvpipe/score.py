"""Grade the answers to a benchmark: a score with its 95 % interval, and every answer with its grade.

python -m rwkvpipe.score e.answers.jsonl --spec '{"task":"choice","path":"e.jsonl"}' --questions e.jsonl --out e.json
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from rwkvpipe.base.config import BenchmarkConfig
from rwkvpipe.base.errors import DataError, Parser, new_file, run
from rwkvpipe.base.files import read_jsonl, write_json, write_jsonl
from rwkvpipe.base.strict import check_json
from rwkvpipe.tasks.registry import Task, asked, read_questions

log = logging.getLogger("rwkvpipe")


def graded(task: Task, questions: Sequence[dict], answers: Path) -> list[dict]:
    """Each answer beside its question, in their order. Raises DataError where the two do not belong together."""
    found = list(read_jsonl(answers))
    if len(found) != len(questions):
        raise DataError(f"{answers}: {len(found)} answers to {len(questions)} questions; run bench with these")
    rows = []
    for number, (question, answer) in enumerate(zip(questions, found, strict=True), 1):
        mark = asked(task, question)
        # answers that another program wrote may go without row and mark
        if answer.get("row", number) != number or answer.get("asked", mark) != mark:
            raise DataError(
                f"{answers}:{number}: an answer to another question than line {number} of the questions (or to another"
                " prompt); run bench with these questions and settings"
            )
        try:
            rows.append({"row": number, **task.mark(question, answer)})
        except DataError as error:
            raise DataError(f"{answers}:{number}: {error}") from None
    return rows


def main(argv: list[str] | None = None) -> None:
    """Write the score, and beside it NAME.samples.jsonl: what was asked, answered and wanted, and the grade."""
    parser = Parser(prog="rwkvpipe.score", description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path, help="NAME.answers.jsonl, as rwkvpipe.bench writes it")
    parser.add_argument("--spec", required=True, help="the benchmark's settings as JSON")
    parser.add_argument("--questions", required=True, help="the questions that were asked")
    parser.add_argument("--out", required=True, type=new_file, help="NAME.json")
    given = parser.parse_args(argv)
    spec = check_json(BenchmarkConfig, given.spec, "--spec")
    task, questions = read_questions(given.questions, spec)
    rows = graded(task, questions, given.answers)
    try:
        summary = task.summary(rows)
    except DataError as error:
        raise DataError(f"{given.questions}: {error}") from None
    facts = {"benchmark": given.out.stem, "task": spec.task, "n": len(rows)}
    ends = {name: summary.pop(name) for name in ("score", "low", "high")}
    facts |= {**ends, "better": task.better, **summary}
    write_jsonl(given.out.with_suffix(".samples.jsonl"), rows)
    write_json(given.out, facts)
    log.info("%s: %.4f, between %.4f and %.4f (n %d)", given.out, *ends.values(), facts["n"])


if __name__ == "__main__":
    run(main)
