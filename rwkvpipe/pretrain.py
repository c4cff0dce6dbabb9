"""Train a model on the tokens of a corpus, every one of them a target.

python -m rwkvpipe.launch 0 pretrain settings.json --model init.safetensors --data sums --out base/model.safetensors
"""

from pathlib import Path

from rwkvpipe.base.errors import run
from rwkvpipe.data.batches import token_batches
from rwkvpipe.train.corpus import train
from rwkvpipe.train.stage import open_stage, stage_parser


def main(argv: list[str] | None = None) -> None:
    """Train; writes the model (with lora: the adapter) and metrics.jsonl, and goes on where a stopped run was."""
    parser = stage_parser("pretrain", __doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of packed corpora, as mixed")
    given = parser.parse_args(argv)
    stage = open_stage(given, kind="pretrain")
    train(stage, given.data, token_batches, micro_batch=given.micro_batch)


if __name__ == "__main__":
    run(main)
