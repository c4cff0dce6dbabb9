"""Improve a model by its own graded answers (GRPO, arXiv 2402.03300).

python -m rwkvpipe.launch 0 grpo settings.json --model m.pth --tokenizer bytes --data q.jsonl --out a.safetensors
"""

from pathlib import Path

from rwkvpipe.base.errors import ConfigError, Parser, new_file, run
from rwkvpipe.base.files import write_jsonl
from rwkvpipe.data.batches import check_batch
from rwkvpipe.infer.engine import load_vocabulary
from rwkvpipe.tasks.answer import PROMPT, Answer
from rwkvpipe.tasks.registry import grader
from rwkvpipe.train.loop import Hooks, fit
from rwkvpipe.train.optim import whole_length
from rwkvpipe.train.policy import Rollout, grpo_losses
from rwkvpipe.train.rollout import Sampler, check_fits, read_questions
from rwkvpipe.train.stage import finish, open_stage, run_of
from rwkvpipe.train.tracker import add_trackers


def _tokens(rollout: Rollout) -> int:
    return int((rollout.first + rollout.mask.sum(1)).sum())


def main(argv: list[str] | None = None) -> None:
    """Sample, grade, learn; writes the model or adapter, metrics.jsonl and rollouts.jsonl."""
    parser = Parser(prog="rwkvpipe.grpo", description=__doc__.splitlines()[0])
    parser.add_argument("settings", help="settings.json of the stage")
    parser.add_argument("--model", required=True, help="the weights it starts from")
    parser.add_argument("--tokenizer", required=True, help="their vocabulary: a folder, or `bytes`")
    parser.add_argument("--data", type=Path, required=True, help="questions with answers, JSONL")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows at a time; decides memory, no result")
    parser.add_argument("--save-every", type=int, default=100, help="steps between resume points")
    add_trackers(parser)
    parser.add_argument("--out", required=True, type=new_file, help="model.safetensors; with lora adapter.safetensors")
    given = parser.parse_args(argv)
    if given.micro_batch < 1:
        raise ConfigError(f"--micro-batch: {given.micro_batch} rows at a time; 1 is the least")
    stage = open_stage(given.settings, given.model, given.out, kind="grpo", track=given.track)
    tokenizer = load_vocabulary(given.tokenizer, stage.model.config.vocab_size, given.model)
    settings = stage.settings
    tasks = [grader(name)(settings.prompt or PROMPT) for name in settings.rollout.rewards if ":" not in name]
    asked = Answer(settings.prompt or PROMPT).prompt
    questions = read_questions(given.data, asked, tokenizer, check_fits(stage), [task.check for task in tasks])
    check_batch(given.data, len(questions), "questions", settings.train)
    config = whole_length(settings.train, len(questions), settings.rollout.iterations)
    sampler = Sampler(stage, questions, tokenizer, given.micro_batch)
    losses = grpo_losses(
        settings.rollout, given.micro_batch, precision=settings.train.precision,
        report=sampler.parts.append, rank=stage.rank,
    )  # fmt: skip
    hooks = Hooks(measures=sampler.measures, carry=sampler.carry, tokens=_tokens)
    where = run_of(stage, [given.data, *map(Path, settings.rollout.reward_files)], given.save_every)
    metrics = fit(stage.model, sampler.batches, losses, config=config, run=where, hooks=hooks)
    write_jsonl(stage.out.parent / "rollouts.jsonl", sampler.log.rows())
    finish(stage, metrics)


if __name__ == "__main__":
    run(main)
