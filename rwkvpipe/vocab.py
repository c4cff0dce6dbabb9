"""Make a tokenizer: bytes, whole numbers, a vocabulary file's, or the characters of corpora.

python -m rwkvpipe.vocab --spec '{"kind":"trie","corpora":["c"]}' --synthetic counting.chats:42:1000 --out tokenizer
"""

import logging
from collections.abc import Iterable
from pathlib import Path

from rwkvpipe.base.config import TokenizerConfig
from rwkvpipe.base.errors import ConfigError, DataError, Parser, run
from rwkvpipe.base.strict import check_json
from rwkvpipe.data.corpus import texts
from rwkvpipe.data.synthetic import generate
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.chat import ROLES, TURN_END
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.tokenizer.load import Tokenizer, save_tokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer, read_vocab

log = logging.getLogger("rwkvpipe")
TALK = "".join(f"{name}: {TURN_END}" for name in ROLES.values())  # what turns are made of besides their words


def parse_made(made: str) -> tuple[str, int, int]:
    """name, seed and count of `name:seed:count`. Raises ConfigError."""
    name, _, numbers = made.partition(":")
    seed, _, count = numbers.partition(":")
    if not (name and seed.isdecimal() and count.isdecimal()):
        raise ConfigError(f"--synthetic: {made!r} is not name:seed:count, such as counting.chats:42:1000")
    return name, int(seed), int(count)


def learned(files: Iterable[str], made: Iterable[str]) -> TrieTokenizer:
    """A vocabulary of all characters that occur, ordered by code point, with those that turns of talk are made of.

    Of JSON rows every text counts, whatever its column is called. Raises DataError when there is no text.
    """
    characters: set[str] = set()
    for file in files:
        for text in texts(file):
            characters.update(text)
    for name, seed, count in map(parse_made, made):
        for document in generate(name, seed, count):
            for text in document.words():
                characters.update(text)
    if not characters:
        raise DataError("no character in the corpora to make a vocabulary of; give some text")
    characters.update(TALK)
    words = (character.encode("utf-8") for character in sorted(characters))
    return TrieTokenizer(dict(enumerate(words, 1)))


def make(spec: TokenizerConfig, files: list[str], made: list[str]) -> Tokenizer:
    """The tokenizer that the settings ask for. Raises ConfigError when the files do not suit them."""
    if spec.kind != "trie":
        if files or made:
            raise ConfigError(f"--spec: kind {spec.kind} learns from no corpus; give no files, or kind trie")
        return ByteTokenizer(spec.offset) if spec.kind == "bytes" else IntegerTokenizer(spec.size)
    if spec.path is None:
        if not files and not made:
            raise ConfigError("--spec: corpora are named, but neither a file nor --synthetic is given")
        return learned(files, made)
    if made or len(files) > 1:
        raise ConfigError("--spec: path names one vocabulary file; give that file and nothing else")
    return TrieTokenizer(read_vocab(files[0] if files else spec.path))


def main(argv: list[str] | None = None) -> None:
    """Write the tokenizer's folder."""
    parser = Parser(prog="rwkvpipe.vocab", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="the vocabulary file, or corpora whose characters are taken")
    parser.add_argument("--spec", required=True, help="the tokenizer's settings as JSON")
    parser.add_argument("--synthetic", action="append", default=[], metavar="NAME:SEED:COUNT", help="a made corpus")
    parser.add_argument("--out", required=True, type=Path, help="folder of the tokenizer")
    given = parser.parse_args(argv)
    tokenizer = make(check_json(TokenizerConfig, given.spec, "--spec"), given.files, given.synthetic)
    save_tokenizer(given.out, tokenizer)
    log.info("%s: %d ids", given.out, tokenizer.size)


if __name__ == "__main__":
    run(main)
