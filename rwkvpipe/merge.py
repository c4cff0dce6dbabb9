"""Put an adapter, or tuned initial states, into the weights they were trained beside.

python -m rwkvpipe.merge --model base/model.safetensors --adapter chat/adapter.safetensors --out chat/model.safetensors
"""

import logging

from rwkvpipe.base.errors import Parser, new_file, run
from rwkvpipe.weights import store
from rwkvpipe.weights.merging import with_adapter

log = logging.getLogger("rwkvpipe")


def main(argv: list[str] | None = None) -> None:
    """Merge in fp64, rounded once to the dtype of each matrix; tensors without adapter stay as they are."""
    parser = Parser(prog="rwkvpipe.merge", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the weights that training started from")
    parser.add_argument("--adapter", required=True, help="adapter.safetensors, a folder of PEFT, or a file of states")
    parser.add_argument("--out", required=True, type=new_file, help="model.safetensors")
    given = parser.parse_args(argv)
    store.write(given.out, *with_adapter(given.model, given.adapter))
    log.info("%s: %s with %s in it", given.out, given.model, given.adapter)


if __name__ == "__main__":
    run(main)
