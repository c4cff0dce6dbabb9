"""Tune a model on documents of which only a part, the answers, is learned.

python -m rwkvpipe.launch 0 sft settings.json --model init.safetensors --data corpora/sums --out chat/model.safetensors
"""

from pathlib import Path

from rwkvpipe.base.errors import Parser, new_file, run
from rwkvpipe.data.batches import masked_batches
from rwkvpipe.train.corpus import train
from rwkvpipe.train.stage import open_stage
from rwkvpipe.train.tracker import add_trackers


def main(argv: list[str] | None = None) -> None:
    """Train; writes the model (with lora: the adapter) and metrics.jsonl, and goes on where a stopped run was."""
    parser = Parser(prog="rwkvpipe.sft", description=__doc__.splitlines()[0])
    parser.add_argument("settings", help="settings.json of the stage")
    parser.add_argument("--model", required=True, help="the weights it starts from")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of packed corpora, as mixed")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows at a time; decides memory, no result")
    parser.add_argument("--save-every", type=int, default=100, help="steps between resume points")
    add_trackers(parser)
    parser.add_argument("--out", required=True, type=new_file, help="model.safetensors; with lora adapter.safetensors")
    given = parser.parse_args(argv)
    stage = open_stage(given.settings, given.model, given.out, kind="sft", track=given.track)
    train(stage, given.data, masked_batches, micro_batch=given.micro_batch, save_every=given.save_every)


if __name__ == "__main__":
    run(main)
