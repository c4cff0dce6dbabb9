"""Turn a checkpoint of any naming into model.safetensors with its sizes in config.json.

python -m rwkvpipe.convert RWKV-x070-World-0.1B.pth --out results/shared/weights/world/model.safetensors
"""

import logging

from rwkvpipe.base.errors import Parser, new_file, run
from rwkvpipe.model.family import contradiction
from rwkvpipe.weights import store
from rwkvpipe.weights.merging import with_adapter

log = logging.getLogger("rwkvpipe")


def main(argv: list[str] | None = None) -> None:
    """Convert one checkpoint, tensor by tensor; dtypes and bits are kept."""
    parser = Parser(prog="rwkvpipe.convert", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a .pth or .safetensors file, an index of shards, or a folder with one")
    parser.add_argument("--adapter", help="what to merge into it: a folder of PEFT, or adapter.safetensors")
    parser.add_argument("--out", required=True, type=new_file, help="model.safetensors")
    given = parser.parse_args(argv)
    found = store.open_model(given.checkpoint)
    config, tensors = found.config, found.tensors
    if what := contradiction(given.checkpoint, config):
        log.warning("%s: %s", given.checkpoint, what)
    if given.adapter is not None:
        config, tensors = with_adapter(given.checkpoint, given.adapter)
    store.write(given.out, config, tensors)
    log.info("%s: %s, %d layers, width %d", given.out, config.family, config.n_layer, config.n_embd)


if __name__ == "__main__":
    run(main)
