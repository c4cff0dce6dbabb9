"""Tune a model by pairs of answers, of which people preferred one (DPO, arXiv 2305.18290).

python -m rwkvpipe.launch 0 dpo settings.json --model m.pth --tokenizer bytes --data pairs.jsonl --out a.safetensors
"""

from pathlib import Path

from rwkvpipe.base.config import DpoConfig
from rwkvpipe.base.errors import ConfigError, Parser, new_file, run
from rwkvpipe.data.batches import check_batch
from rwkvpipe.infer.engine import load_vocabulary
from rwkvpipe.train.loop import Hooks, fit
from rwkvpipe.train.optim import whole_length
from rwkvpipe.train.preference import Preferences, pair_batches, read_pairs, tokens
from rwkvpipe.train.stage import finish, open_stage, run_of
from rwkvpipe.train.tracker import add_trackers


def main(argv: list[str] | None = None) -> None:
    """Train; writes the model or adapter and metrics.jsonl, and goes on where a stopped run was."""
    parser = Parser(prog="rwkvpipe.dpo", description=__doc__.splitlines()[0])
    parser.add_argument("settings", help="settings.json of the stage")
    parser.add_argument("--model", required=True, help="the weights it starts from, and is compared with")
    parser.add_argument("--tokenizer", required=True, help="their vocabulary: a folder, or `bytes`")
    parser.add_argument("--data", type=Path, required=True, help="pairs, JSONL: prompt, chosen, rejected")
    parser.add_argument("--micro-batch", type=int, default=8, help="answers at a time; decides memory, no result")
    parser.add_argument("--save-every", type=int, default=100, help="steps between resume points")
    add_trackers(parser)
    parser.add_argument("--out", required=True, type=new_file, help="model.safetensors; with lora adapter.safetensors")
    given = parser.parse_args(argv)
    if given.micro_batch < 1:
        raise ConfigError(f"--micro-batch: {given.micro_batch} rows at a time; 1 is the least")
    stage = open_stage(given.settings, given.model, given.out, kind="dpo", track=given.track)
    tokenizer = load_vocabulary(given.tokenizer, stage.model.config.vocab_size, given.model)
    config = stage.settings.train
    pairs = read_pairs(given.data, tokenizer, config.ctx_len)
    check_batch(given.data, len(pairs), "pairs", config)
    config = whole_length(config, len(pairs))
    wanted = Preferences(stage, stage.settings.dpo or DpoConfig(), given.micro_batch)
    metrics = fit(
        stage.model,
        lambda first, carried: pair_batches(pairs, config, stage.seed, first),
        wanted.losses,
        config=config,
        run=run_of(stage, [given.data], given.save_every),
        hooks=Hooks(measures=wanted.measures, tokens=tokens),
    )
    finish(stage, metrics)


if __name__ == "__main__":
    run(main)
