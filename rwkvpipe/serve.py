"""Serve a model to programs that speak OpenAI's interface, on this machine.

python -m rwkvpipe.launch 0 serve --model m.pth --tokenizer bytes --port 8000
"""

import logging
from pathlib import Path

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.base.errors import ConfigError, Parser, run
from rwkvpipe.base.strict import check_json
from rwkvpipe.infer.engine import Engine, load_vocabulary
from rwkvpipe.infer.layout import TEMPLATE, find_layout
from rwkvpipe.kernel.panels import KINDS
from rwkvpipe.tokenizer.chat import MODES
from rwkvpipe.train import dist
from rwkvpipe.weights.speaker import load_speaker

log = logging.getLogger("rwkvpipe")

DEFAULTS = '{"max_tokens": 1024}'


def parser() -> Parser:
    """The command line."""
    found = Parser(prog="rwkvpipe.serve", description=__doc__.splitlines()[0])
    found.add_argument("--model", required=True, help="the weights that write")
    found.add_argument("--tokenizer", required=True, help="their vocabulary: a folder, or `bytes`")
    found.add_argument("--adapter", help="an adapter, or initial states, put beside the weights")
    found.add_argument("--name", help="what clients call the model; left out, the name of its file or folder")
    found.add_argument("--sampling", default=DEFAULTS, help="JSON: what requests leave open, and the most max_tokens")
    found.add_argument("--weights", choices=KINDS, default="fp32", help="what matrices are kept in")
    found.add_argument("--mode", choices=sorted(MODES), default="plain", help="how answers in a talk begin")
    found.add_argument("--template", help=TEMPLATE)
    found.add_argument("--rows", type=int, default=16, help="texts written side by side; decides memory, no text")
    found.add_argument("--waiting", type=int, default=256, help="texts that may wait; more are told to come again")
    found.add_argument("--host", default="127.0.0.1", help="the address to listen at; others than this reach out")
    found.add_argument("--port", type=int, default=8000, help="0 is any that is free")
    return found


def called(model: str) -> str:
    """What a model is called whose file is this: its own name, or that of its folder where files all have one."""
    path = Path(model).resolve()
    return path.parent.name if path.stem == "model" else path.stem


def main(argv: list[str] | None = None) -> None:
    """Answer until stopped by Ctrl-C or SIGTERM."""
    given = parser().parse_args(argv)
    if given.rows < 1 or given.waiting < 0:
        raise ConfigError("--rows is 1 at least, --waiting 0 at least")
    if not 0 <= given.port < 65536:
        raise ConfigError(f"--port: {given.port} is no port; 0 to 65535")
    try:
        from rwkvpipe.web.app import serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs {error.name}: python -m pip install '.[serve]' in the checkout") from None
    from rwkvpipe.web.asked import House
    from rwkvpipe.web.desk import Desk

    sampling = check_json(SamplingConfig, given.sampling, "--sampling")
    layout = find_layout(given.mode, given.template, given.model, given.tokenizer)
    if "stop" not in sampling.model_fields_set:
        sampling = sampling.model_copy(update={"stop": layout.stops()})
    model = load_speaker(given.model, given.adapter, dist.start().device)
    tokenizer = load_vocabulary(given.tokenizer, model.config.vocab_size, given.model)
    engine = Engine(model, tokenizer, given.rows, kind=given.weights, special=layout.special())
    engine.check(sampling)
    house = House(engine, given.name or called(given.model), sampling, layout)
    serve(house, Desk(engine, given.waiting), given.host, given.port)
    log.info("stopped")


if __name__ == "__main__":
    run(main)
