"""Tune a model by pairs of answers, of which people preferred one (DPO, arXiv 2305.18290).

python -m rwkvpipe.launch 0 dpo settings.json --model m.pth --tokenizer bytes --data pairs.jsonl --out a.safetensors
"""

from pathlib import Path

from rwkvpipe.base.config import DpoConfig
from rwkvpipe.base.errors import run
from rwkvpipe.data.batches import check_batch
from rwkvpipe.infer.engine import load_vocabulary
from rwkvpipe.tokenizer.load import files_of
from rwkvpipe.train.loop import Hooks, fit
from rwkvpipe.train.optim import whole_length
from rwkvpipe.train.preference import Preferences, pair_batches, read_pairs, targets, tokens
from rwkvpipe.train.question import drawn
from rwkvpipe.train.stage import finish, open_stage, run_of, stage_parser


def main(argv: list[str] | None = None) -> None:
    """Train; writes the model or adapter and metrics.jsonl, and goes on where a stopped run was."""
    parser = stage_parser("dpo", __doc__)
    parser.add_argument("--tokenizer", required=True, help="their vocabulary: a folder, or `bytes`")
    parser.add_argument("--data", type=Path, required=True, help="pairs, JSONL: prompt, chosen, rejected")
    given = parser.parse_args(argv)
    stage = open_stage(given, kind="dpo")
    tokenizer = load_vocabulary(given.tokenizer, stage.model.config.vocab_size, given.model)
    config = stage.settings.train
    pairs = read_pairs(given.data, tokenizer, config.ctx_len)
    check_batch(given.data, len(pairs), "pairs", config)
    config = whole_length(config, len(pairs))
    wanted = Preferences(stage, stage.settings.dpo or DpoConfig(), given.micro_batch)

    def read(step: int) -> str:
        asked = drawn(len(pairs), config, step, stage.seed)
        return f"pairs {', '.join(str(number + 1) for number in sorted(asked))}"

    metrics = fit(
        stage.model,
        lambda first, carried: pair_batches(pairs, config, stage.seed, first),
        wanted.losses,
        config=config,
        run=run_of(stage, [given.data, *files_of(given.tokenizer)]),
        hooks=Hooks(measures=wanted.measures, tokens=tokens, targets=targets, read=read),
    )
    finish(stage, metrics)


if __name__ == "__main__":
    run(main)
