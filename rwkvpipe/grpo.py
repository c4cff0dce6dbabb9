"""Improve a model by its own graded answers (GRPO, arXiv 2402.03300).

python -m rwkvpipe.launch 0 grpo settings.json --model m.pth --tokenizer bytes --data q.jsonl --out a.safetensors
"""

from pathlib import Path

from rwkvpipe.base.errors import run
from rwkvpipe.base.files import write_jsonl
from rwkvpipe.data.batches import check_batch
from rwkvpipe.infer.engine import load_vocabulary
from rwkvpipe.tasks.answer import PROMPT, Answer
from rwkvpipe.tasks.registry import grader
from rwkvpipe.tokenizer.load import files_of
from rwkvpipe.train.loop import Hooks, fit
from rwkvpipe.train.optim import whole_length
from rwkvpipe.train.policy import Rollout, grpo_losses
from rwkvpipe.train.question import read_questions
from rwkvpipe.train.rollout import Sampler, check_fits
from rwkvpipe.train.stage import finish, open_stage, run_of, stage_parser


def _tokens(rollout: Rollout) -> int:
    return int((rollout.first + (rollout.mask != 0).sum(1)).sum())


def _targets(rollout: Rollout) -> int:
    return int((rollout.mask != 0).sum())


def main(argv: list[str] | None = None) -> None:
    """Sample, grade, learn; writes the model or adapter, metrics.jsonl and rollouts.jsonl."""
    parser = stage_parser("grpo", __doc__)
    parser.add_argument("--tokenizer", required=True, help="their vocabulary: a folder, or `bytes`")
    parser.add_argument("--data", type=Path, required=True, help="questions with answers, JSONL")
    given = parser.parse_args(argv)
    stage = open_stage(given, kind="grpo")
    tokenizer = load_vocabulary(given.tokenizer, stage.model.config.vocab_size, given.model)
    settings = stage.settings
    tasks = [grader(name)(settings.prompt or PROMPT) for name in settings.rollout.rewards if ":" not in name]
    asked = Answer(settings.prompt or PROMPT).prompt
    questions = read_questions(given.data, asked, tokenizer, check_fits(stage), [task.check for task in tasks])
    check_batch(given.data, len(questions), "questions", settings.train)
    config = whole_length(settings.train, len(questions), settings.rollout.iterations * settings.rollout.slices)
    sampler = Sampler(stage, questions, tokenizer, given.micro_batch)
    losses = grpo_losses(
        settings.rollout, given.micro_batch, precision=settings.train.precision,
        report=sampler.parts.append, rank=stage.rank,
    )  # fmt: skip
    hooks = Hooks(measures=sampler.measures, carry=sampler.carry, tokens=_tokens, targets=_targets, read=sampler.read)
    inputs = [given.data, *map(Path, settings.rollout.files), *files_of(given.tokenizer)]
    where = run_of(stage, inputs)
    metrics = fit(stage.model, sampler.batches, losses, config=config, run=where, hooks=hooks)
    write_jsonl(stage.out.parent / "rollouts.jsonl", sampler.log.rows())
    finish(stage, metrics)


if __name__ == "__main__":
    run(main)
