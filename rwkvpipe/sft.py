"""Tune a model on documents of which only a part, the answers, is learned.

python -m rwkvpipe.launch 0 sft settings.json --model init.safetensors --data corpora/sums --out chat/model.safetensors
"""

from pathlib import Path

from rwkvpipe.base.errors import run
from rwkvpipe.data.batches import masked_batches
from rwkvpipe.train.corpus import train
from rwkvpipe.train.stage import open_stage, stage_parser


def main(argv: list[str] | None = None) -> None:
    """Train; writes the model (with lora: the adapter) and metrics.jsonl, and goes on where a stopped run was."""
    parser = stage_parser("sft", __doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of packed corpora, as mixed")
    given = parser.parse_args(argv)
    stage = open_stage(given, kind="sft")
    train(stage, given.data, masked_batches, micro_batch=given.micro_batch)


if __name__ == "__main__":
    run(main)
