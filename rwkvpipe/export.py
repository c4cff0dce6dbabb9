"""Write a checkpoint for other programs: a .pth for RWKV-LM, a hub's folder, Hugging Face's layout, GGUF.

python -m rwkvpipe.export results/demo/reason/model.safetensors --to pth --out reason.pth
"""

from typing import get_args

from rwkvpipe.base.config import ExportConfig, Format
from rwkvpipe.base.errors import ConfigError, Parser, run
from rwkvpipe.base.strict import check_json
from rwkvpipe.weights.export import export


def main(argv: list[str] | None = None) -> None:
    """Export one model, tensor by tensor; dtypes and bits are kept unless another dtype is asked for."""
    parser = Parser(prog="rwkvpipe.export", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a .pth, .safetensors or .gguf file, an index of shards, a folder; an adapter")
    parser.add_argument("--to", choices=get_args(Format), help="the format")
    parser.add_argument("--spec", help="or all settings of an export as JSON")
    parser.add_argument("--tokenizer", help="its vocabulary: a folder, a vocabulary file, `bytes` or `world`")
    parser.add_argument("--scores", nargs="*", default=(), help="for the page: what rwkvpipe.score wrote")
    parser.add_argument("--out", required=True, help="the file to write; for hub and hf the folder")
    given = parser.parse_args(argv)
    if (given.to is None) == (given.spec is None):
        raise ConfigError("--to: give one of --to and --spec")
    spec = ExportConfig(format=given.to) if given.to else check_json(ExportConfig, given.spec, "--spec")
    export(given.model, given.out, spec, tokenizer=given.tokenizer, scores=given.scores)


if __name__ == "__main__":
    run(main)
