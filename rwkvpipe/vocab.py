"""Make a tokenizer: bytes, whole numbers, RWKV World, a file's, your own class, or one learned from corpora.

python -m rwkvpipe.vocab --spec '{"kind":"trie","corpora":["c"]}' --synthetic counting.chats:42:1000 --out tokenizer
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from rwkvpipe.base.config import TokenizerConfig
from rwkvpipe.base.errors import ConfigError, DataError, Parser, run
from rwkvpipe.base.files import write_text
from rwkvpipe.base.sources import files_of
from rwkvpipe.base.strict import check_json
from rwkvpipe.data.corpus import largest, texts
from rwkvpipe.data.kind import kind_of
from rwkvpipe.data.synthetic import generate
from rwkvpipe.tokenizer.bpe import BpeTokenizer, learn
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.chat import ROLES, TURN_END
from rwkvpipe.tokenizer.integer import MOST, IntegerTokenizer
from rwkvpipe.tokenizer.load import MERGES, Tokenizer, save_tokenizer
from rwkvpipe.tokenizer.own import OwnTokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer
from rwkvpipe.tokenizer.world import load_vocabulary, load_world

log = logging.getLogger("rwkvpipe")
PIECE = 1 << 16  # characters of a text that are taken or left
PIECES = re.compile(rf"(?s).{{1,{PIECE}}}")
LONGEST = 128  # characters of a run without spaces
NO_WORD = re.compile(rf"[!-~]{{{LONGEST},}}")
TALK = "".join(f"{name}: {TURN_END}" for name in ROLES.values())  # what turns are made of besides their words


def parse_made(made: str) -> tuple[str, int, int]:
    """name, seed and count of `name:seed:count`. Raises ConfigError."""
    name, _, numbers = made.partition(":")
    seed, _, count = numbers.partition(":")
    if not (name and seed.isdecimal() and count.isdecimal()):
        raise ConfigError(f"--synthetic: {made!r} is not name:seed:count, such as counting.chats:42:1000")
    return name, int(seed), int(count)


def corpora(files: Iterable[str], made: Iterable[str]) -> Iterator[str]:
    """Every text that a model may read because of these; of JSON rows all, whatever their columns are called."""
    for file in chain.from_iterable(map(files_of, files)):
        yield from texts(file)
    for name, seed, count in map(parse_made, made):
        for document in generate(name, seed, count):
            yield from document.words()


def characters(found: Iterable[str]) -> TrieTokenizer:
    """A vocabulary of all characters that occur, ordered by code point, with those that turns of talk are made of.

    Raises DataError when there is no text.
    """
    seen: set[str] = set()
    for text in found:
        seen.update(text)
    if not seen:
        raise DataError("no character in the corpora to make a vocabulary of; give some text")
    seen.update(TALK)
    words = (character.encode("utf-8") for character in sorted(seen))
    return TrieTokenizer(dict(enumerate(words, 1)))


def sampled(found: Iterable[str], size: float, most: int) -> Iterator[str]:
    """Of texts of about `size` bytes `most`, taken evenly from all of them; the same each time.

    A run of letters that no word has, such as encoded pictures, is cut short.
    """
    share, seen, taken = most / max(size, 1), 0, 0
    for text in found:
        pieces = [text] if share >= 1 and len(text) <= PIECE else re.findall(PIECES, text)
        for piece in pieces:
            width = len(piece.encode("utf-8"))
            if taken + width > most:
                return
            if taken <= share * seen:
                taken += width
                yield NO_WORD.sub(lambda run: run[0][:LONGEST], piece)
            seen += width


def size_of(files: Iterable[str]) -> float:
    """About how many bytes of text are in files."""
    found = list(chain.from_iterable(map(files_of, files)))
    return sum(os.path.getsize(file) * (4 if kind_of(file)[1] else 1) for file in found)


def pairs(found: Iterable[str], spec: TokenizerConfig, out: Path) -> BpeTokenizer:
    """Byte pair encoding learned from texts. Raises DataError when there is none, or vocab_size is too small."""
    write_text(out / MERGES, learn(found, spec.vocab_size))
    return BpeTokenizer(out / MERGES)


def make(spec: TokenizerConfig, files: list[str], made: list[str], out: Path) -> Tokenizer:
    """The tokenizer that the settings ask for. Raises ConfigError when the files do not suit them."""
    if spec.corpora and not files and not made:
        raise ConfigError("--spec: corpora are named, but neither a file nor --synthetic is given")
    if spec.kind == "integer" and spec.corpora and not made:
        top, where = max((largest(file), file) for path in files for file in files_of(path))
        if top >= MOST:
            raise DataError(f"{where}: a number of {top:,}; they may go up to {MOST - 1:,}; number them from 0")
        return IntegerTokenizer(top + 1)
    if spec.corpora and spec.kind != "integer":
        found = corpora(files, made)
        if spec.kind == "trie":
            return characters(found)
        return pairs(sampled(found, size_of(files), spec.sample * 1_000_000), spec, out)
    if spec.kind == "own":  # a file is the class's own, named so that an edit of it is seen
        return OwnTokenizer(spec.import_path, spec.options)
    if spec.kind in ("bytes", "integer"):
        if files or made:
            raise ConfigError(
                f"--spec: kind {spec.kind} learns from no such corpus; give no files, or kind trie or bpe"
            )
        return ByteTokenizer(spec.offset) if spec.kind == "bytes" else IntegerTokenizer(spec.size)
    if made or len(files) > 1:
        raise ConfigError("--spec: path names one vocabulary file; give that file and nothing else")
    file = files[0] if files else spec.path
    if spec.kind == "bpe":
        return BpeTokenizer(file, spec.end)
    return load_world(file) if spec.kind == "world" else load_vocabulary(file)


def main(argv: list[str] | None = None) -> None:
    """Write the tokenizer's folder."""
    parser = Parser(prog="rwkvpipe.vocab", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="the vocabulary file, or corpora to learn from")
    parser.add_argument("--spec", required=True, help="the tokenizer's settings as JSON")
    parser.add_argument("--synthetic", action="append", default=[], metavar="NAME:SEED:COUNT", help="a made corpus")
    parser.add_argument("--out", required=True, type=Path, help="folder of the tokenizer")
    given = parser.parse_args(argv)
    tokenizer = make(check_json(TokenizerConfig, given.spec, "--spec"), given.files, given.synthetic, given.out)
    save_tokenizer(given.out, tokenizer)
    log.info("%s: %d ids", given.out, tokenizer.size)


if __name__ == "__main__":
    run(main)
