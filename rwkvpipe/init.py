"""Make a new model with RWKV-LM's initial values.

python -m rwkvpipe.init settings.json --tokenizer results/shared/tokenizers/digits --out init.safetensors
"""

import logging

from rwkvpipe.base.config import read_settings
from rwkvpipe.base.errors import ConfigError, Parser, new_file, run
from rwkvpipe.base.files import canonical
from rwkvpipe.model.family import build, complete
from rwkvpipe.tokenizer.load import load_tokenizer
from rwkvpipe.weights import store

log = logging.getLogger("rwkvpipe")


def main(argv: list[str] | None = None) -> None:
    """Initialise the model of the settings; the same seed gives the same weights."""
    parser = Parser(prog="rwkvpipe.init", description=__doc__.splitlines()[0])
    parser.add_argument("settings", help="settings.json of the stage")
    parser.add_argument("--tokenizer", required=True, help="its vocabulary: a folder, or `bytes`")
    parser.add_argument("--out", required=True, type=new_file, help="init.safetensors")
    given = parser.parse_args(argv)
    settings = read_settings(given.settings)
    if settings.model is None:
        raise ConfigError(f"{given.settings}: model is missing; only a stage that starts from nothing is initialised")
    size = load_tokenizer(given.tokenizer).size
    asked = settings.model.vocab_size
    if asked is not None and asked < size:
        raise ConfigError(f"{given.settings}: model.vocab_size is {asked}, the tokenizer has {size} ids; raise it")
    config = complete(settings.model.model_copy(update={"vocab_size": asked or size}))
    model = build(config)
    model.initialise(settings.seed)
    store.write_tensors(given.out, model.state_dict(), {"config": canonical(config.model_dump())})
    count = sum(value.numel() for value in model.parameters())
    log.info("%s: %s numbers, vocabulary of %d", given.out, f"{count:,}", config.vocab_size)


if __name__ == "__main__":
    run(main)
