"""Let a model write on after prompts: into a file, or, as it is written, into the terminal; or talk with it.

python -m rwkvpipe.launch 0 generate --model m.pth --tokenizer bytes --prompt 'Once upon a time' --temperature 0.8
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from rwkvpipe.base.config import SamplesConfig, SamplingConfig
from rwkvpipe.base.errors import ConfigError, DataError, Parser, PipeError, new_file, run
from rwkvpipe.base.partial import Partial, mark
from rwkvpipe.base.strict import check, check_json
from rwkvpipe.infer.engine import Engine, load_vocabulary
from rwkvpipe.infer.layout import TEMPLATE, Layout, find_layout
from rwkvpipe.infer.prompts import read_prompts
from rwkvpipe.kernel.panels import KINDS
from rwkvpipe.tokenizer.chat import MODES
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.train import dist
from rwkvpipe.weights import store
from rwkvpipe.weights.speaker import load_speaker

log = logging.getLogger("rwkvpipe")
ROWS = 16  # prompts at a time
LONGEST = 1024  # tokens of a turn in a talk


def parser() -> Parser:
    """The command line."""
    found = Parser(prog="rwkvpipe.generate", description=__doc__.splitlines()[0])
    found.add_argument("--model", required=True, help="the weights that write")
    found.add_argument("--tokenizer", required=True, help="their vocabulary: a folder, or `bytes`")
    found.add_argument("--adapter", help="an adapter, or initial states, put beside the weights")
    found.add_argument("--spec", help="prompts and sampling as JSON")
    found.add_argument("--prompt", action="append", default=[], help="or a text to go on from; may come several times")
    found.add_argument("--prompts", help="or a file of them: JSONL with prompt or messages, or a text, one a line")
    found.add_argument("--chat", action="store_true", help="or talk: a line is a turn, /new begins anew, Ctrl-D ends")
    found.add_argument("--weights", choices=KINDS, default="fp32", help="what matrices are kept in")
    found.add_argument("--mode", choices=sorted(MODES), default="plain", help="in talks: how answers begin")
    found.add_argument("--template", help=TEMPLATE)
    found.add_argument("--temperature", type=float, help="without --spec; 0 is the likeliest token")
    found.add_argument("--max-tokens", type=int, help="without --spec: longest continuation")
    found.add_argument("--seed", type=int, help="without --spec: of all that is drawn by lot")
    found.add_argument("--out", type=new_file, help="samples.jsonl; nothing for the terminal")
    return found


def read_spec(given: argparse.Namespace, layout: Layout) -> tuple[list[str], SamplingConfig]:
    """Prompts (none for a talk) and how they go on: of the settings, or of the command line. Raises ConfigError."""
    chosen = {name: getattr(given, name) for name in ("temperature", "max_tokens", "seed")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if sum(map(bool, (given.spec is not None, given.prompt, given.prompts, given.chat))) != 1:
        raise ConfigError("give one of --spec and --prompt, --prompts or --chat")
    if given.chat and given.out:
        raise ConfigError("--out: a talk goes to the terminal")
    if given.spec is not None:
        if chosen:
            raise ConfigError("--temperature, --max-tokens and --seed belong to --prompt; with --spec say it there")
        spec = check_json(SamplesConfig, given.spec, "--spec")
        return list(spec.prompts) or read_prompts(spec.path, layout), spec.sampling
    if given.chat:
        chosen = {"max_tokens": LONGEST, "stop": layout.stops()} | chosen
    sampling = check(SamplingConfig, chosen, "the command line")
    check(SamplesConfig, {"prompts": given.prompt or ["a"]}, "the command line")
    return read_prompts(given.prompts, layout) if given.prompts else given.prompt, sampling


def tell(engine: Engine, prompts: list[str], sampling: SamplingConfig) -> None:
    """Print each prompt and what the model goes on with, piece by piece."""
    for number, text in enumerate(prompts):
        pieces = engine.stream(text, sampling, number)
        first = next(pieces)  # a prompt that cannot be read is not printed either
        # two numbers side by side would read as one
        apart = " " if isinstance(engine.tokenizer, IntegerTokenizer) and text[-1:].isdigit() else ""
        sys.stdout.write("\n" * bool(number) + text + apart + first)
        _flow(pieces)


def _flow(pieces: Iterator[str]) -> str:
    """Print pieces as they come, then end the line."""
    told = []
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        told.append(piece)
    sys.stdout.write("\n")
    return "".join(told)


def write(engine: Engine, given: argparse.Namespace, prompts: list[str], sampling: SamplingConfig) -> int:
    """Write samples.jsonl; goes on where a stopped run was. Returns how many texts are in it."""
    beside = [] if given.adapter is None else [Path(given.adapter)]
    decides = [sampling.model_dump(mode="json"), prompts, given.weights, store.mark(given.model)]
    partial = Partial(given.out, mark(decides, given.tokenizer, beside))
    partial.open(len(prompts))
    left = [n for n in range(len(prompts)) if n + 1 not in partial.answers]
    if len(left) < len(prompts):
        log.info("going on: %d of %d are written", len(prompts) - len(left), len(prompts))
    try:
        for found in engine.generate([prompts[n] for n in left], sampling, numbers=left):
            partial.add({"row": found.prompt + 1, "prompt": prompts[found.prompt], "text": found.text})
    except PipeError:
        partial.leave()
        raise
    return partial.finish(("prompt", "text"))


def talk(engine: Engine, sampling: SamplingConfig, layout: Layout) -> None:
    """Answer line after line; of a talk that goes on only what is new is read."""
    messages: list[dict] = []
    kept, turn = engine.states(), 0
    for words in _lines():
        if words == "/new":
            messages = []
            continue
        asked = [*messages, {"role": "user", "content": words}]
        try:
            said = _flow(_unspaced(engine.stream(layout.text(asked), sampling, turn, kept)))
        except DataError as error:  # letters that the vocabulary lacks: the talk goes on without that line
            log.warning("%s", error)
            continue
        messages = [*asked, {"role": "assistant", "content": said}]
        turn += 1


def _unspaced(pieces: Iterator[str]) -> Iterator[str]:
    """Pieces without the space that stands between a turn's name and its words."""
    for piece in pieces:
        if piece:
            yield piece.removeprefix(" ")
            break
    yield from pieces


def _lines() -> Iterator[str]:
    """What is typed, line by line; what is no UTF-8 becomes U+FFFD."""
    source = sys.stdin.buffer
    while True:
        if sys.stdin.isatty():
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = source.readline()
        if not line:
            return
        if words := line.decode("utf-8", "replace").strip():
            yield words


def main(argv: list[str] | None = None) -> None:
    """Write samples.jsonl (prompt and text), or print both; the same seed gives the same texts."""
    given = parser().parse_args(argv)
    layout = find_layout(given.mode, given.template, given.model, given.tokenizer)
    prompts, sampling = read_spec(given, layout)
    rows = min(ROWS, len(prompts)) if given.out else 1
    model = load_speaker(given.model, given.adapter, dist.start().device)
    tokenizer = load_vocabulary(given.tokenizer, model.config.vocab_size, given.model)
    engine = Engine(model, tokenizer, rows, kind=given.weights, special=layout.special())
    for number, prompt in enumerate(prompts, 1):
        try:
            engine.begin(prompt)
        except DataError as error:
            raise DataError(f"prompt {number}: {error}") from None
    if given.chat:
        talk(engine, sampling, layout)
        return
    if given.out is None:
        tell(engine, prompts, sampling)
        return
    log.info("%s: %d texts", given.out, write(engine, given, prompts, sampling))


if __name__ == "__main__":
    run(main)
