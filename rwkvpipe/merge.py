"""Put an adapter, or tuned initial states, into the weights they were trained beside.

python -m rwkvpipe.merge --model base/model.safetensors --adapter chat/adapter.safetensors --out chat/model.safetensors
"""

import logging

import torch

from rwkvpipe.base.errors import Parser, PipeError, WeightsError, new_file, run
from rwkvpipe.model.family import build
from rwkvpipe.weights import lora, store
from rwkvpipe.weights.states import read_states, with_states

log = logging.getLogger("rwkvpipe")


def main(argv: list[str] | None = None) -> None:
    """Merge in fp64, rounded once to the dtype of each matrix; tensors without adapter stay as they are."""
    parser = Parser(prog="rwkvpipe.merge", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the weights that training started from")
    parser.add_argument("--adapter", required=True, help="adapter.safetensors, or a file of initial states")
    parser.add_argument("--out", required=True, type=new_file, help="model.safetensors")
    given = parser.parse_args(argv)
    states = read_states(given.adapter)
    if states is not None:
        base = store.describe(given.adapter)[1].get("base")
        if base and base != store.mark(given.model):
            raise WeightsError(f"{given.adapter}: was trained beside other weights than {given.model}; give those")
        store.write(given.out, *with_states(*store.read(given.model), states, given.adapter))
        log.info("%s: starts from the states of %s", given.out, given.adapter)
        return
    adapter, settings, base = lora.read_adapter(given.adapter)
    config, tensors = store.read(given.model)
    if base and base != store.mark(given.model):
        raise WeightsError(f"{given.adapter}: was trained beside other weights than {given.model}; give those")
    with torch.device("meta"):
        network = build(config)
    try:
        lora.check_fits(network, adapter, settings)
    except PipeError as error:
        raise WeightsError(f"{given.adapter}: {error}") from None
    store.write(given.out, config, lora.merged(tensors, adapter, settings))
    log.info("%s: %d tensors of the adapter merged", given.out, len(adapter))


if __name__ == "__main__":
    run(main)
