"""Let a model write on after prompts: into a file, or, as it is written, into the terminal.

python -m rwkvpipe.launch 0 generate --model m.pth --tokenizer bytes --prompt 'Once upon a time' --temperature 0.8
"""

import argparse
import logging
import sys

from rwkvpipe.base.config import SamplesConfig, SamplingConfig
from rwkvpipe.base.errors import ConfigError, Parser, new_file, run
from rwkvpipe.base.files import write_jsonl
from rwkvpipe.base.strict import check, check_json
from rwkvpipe.infer.engine import Engine, load_vocabulary
from rwkvpipe.train import dist
from rwkvpipe.weights import store

log = logging.getLogger("rwkvpipe")
ROWS = 16  # prompts at a time


def read_spec(given: argparse.Namespace) -> SamplesConfig:
    """What is asked for: the settings, or the prompts and choices of the command line. Raises ConfigError."""
    chosen = {name: getattr(given, name) for name in ("temperature", "max_tokens", "seed")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if (given.spec is None) == (not given.prompt):
        raise ConfigError("give one of --spec and --prompt")
    if given.spec is not None:
        if chosen:
            raise ConfigError("--temperature, --max-tokens and --seed belong to --prompt; with --spec say it there")
        return check_json(SamplesConfig, given.spec, "--spec")
    return SamplesConfig(prompts=tuple(given.prompt), sampling=check(SamplingConfig, chosen, "the command line"))


def tell(engine: Engine, spec: SamplesConfig) -> None:
    """Print each prompt and what the model goes on with, piece by piece."""
    for number, prompt in enumerate(spec.prompts):
        pieces = engine.stream(prompt, spec.sampling, number)
        first = next(pieces)  # a prompt that cannot be read is not printed either
        sys.stdout.write("\n" * bool(number) + prompt + first)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


def main(argv: list[str] | None = None) -> None:
    """Write samples.jsonl (prompt and text), or print both; the same seed gives the same texts."""
    parser = Parser(prog="rwkvpipe.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the weights that write")
    parser.add_argument("--tokenizer", required=True, help="their vocabulary: a folder, or `bytes`")
    parser.add_argument("--spec", help="prompts and sampling as JSON")
    parser.add_argument("--prompt", action="append", default=[], help="or a text to go on from; may come several times")
    parser.add_argument("--temperature", type=float, help="with --prompt; 0 is the likeliest token")
    parser.add_argument("--max-tokens", type=int, help="with --prompt: longest continuation")
    parser.add_argument("--seed", type=int, help="with --prompt: of all that is drawn by lot")
    parser.add_argument("--out", type=new_file, help="samples.jsonl; nothing for the terminal")
    given = parser.parse_args(argv)
    spec = read_spec(given)
    rows = min(ROWS, len(spec.prompts)) if given.out else 1
    model = store.load_model(given.model, dist.start().device)
    engine = Engine(model, load_vocabulary(given.tokenizer, model.config.vocab_size, given.model), rows)
    if given.out is None:
        tell(engine, spec)
        return
    texts = {found.prompt: found.text for found in engine.generate(spec.prompts, spec.sampling)}
    count = write_jsonl(given.out, ({"prompt": prompt, "text": texts[n]} for n, prompt in enumerate(spec.prompts)))
    log.info("%s: %d texts", given.out, count)


if __name__ == "__main__":
    run(main)
