"""Byte pair encoding: learned here, or read from the tokenizer.json of another model (library tokenizers)."""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import parse_json, read_json, write_text
from rwkvpipe.base.vocabulary import LEAST
from rwkvpipe.tokenizer.byte import unknown, utf8
from rwkvpipe.tokenizer.pieces import Pieces, fits
from rwkvpipe.tokenizer.quick import Gigatoken

log = logging.getLogger("rwkvpipe")

END = "<|endoftext|>"  # id 0 of what is learned here
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")  # what others call it
WINDOW = 1 << 16  # characters of a long text that are encoded at once
WORDS = 4  # words before the end of a window whose borders the text behind it may move
WORD = 1 << 18  # characters of a word, which is encoded at once; a longer one is cut
STEADY = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Replace", "Sequence"}  # normalizers that know no beginning
SPLITS = {"ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "Sequence"}


def _letters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


LETTERS = _letters()


def learn(texts: Iterable[str], vocab_size: int) -> str:
    """The JSON of a byte-level BPE with at most `vocab_size` ids: id 0 ends a document, then come the bytes.

    Equal texts give equal JSON. Raises DataError when there is no text, or no room for every byte.
    """
    if vocab_size < LEAST:
        raise DataError(f"vocab_size: {vocab_size} is too small; the bytes and the end of a document alone are {LEAST}")
    import tokenizers  # only now: workers that need none hold less

    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=sorted(LETTERS), show_progress=False
    )
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += bool(text)
            yield text

    found.train_from_iterator(counted(), trainer)
    if not seen:
        raise DataError("no text in the corpora to learn a vocabulary from; give some")
    if found.get_vocab_size() < vocab_size:
        log.info("the texts hold %d ids' worth of pairs, fewer than vocab_size %d", found.get_vocab_size(), vocab_size)
    return found.to_str(pretty=True) + "\n"


def _kinds(part: Any) -> set[str]:
    """The types that a part of tokenizer.json is made of."""
    if isinstance(part, dict):
        return {str(part.get("type"))}.union(*map(_kinds, part.values()))
    return set().union(*map(_kinds, part)) if isinstance(part, list) else set()


def _cuttable(described: dict) -> bool:
    """Whether words of a text are told apart whatever stands before them, so that it may be encoded from any on."""
    before, words = described.get("normalizer"), described.get("pre_tokenizer")
    if not words or '"add_prefix_space": true' in json.dumps(words):
        return False
    regex = {"String", "Regex", "None"}  # kinds of what is looked for, and of parts without one
    return _kinds(before) <= STEADY | regex and _kinds(words) <= SPLITS | regex


class BpeTokenizer:
    """A tokenizer.json with a BPE model. `end` is the token that ends a document, the likeliest name if left out.

    Text that looks like a special token is text: it never becomes that token's id. A byte-level vocabulary takes any
    bytes and gives them back. Raises DataError for a file that is no such tokenizer.
    """

    def __init__(self, path: str | Path, end: str | None = None):
        self.path = Path(path)
        self.json = self.path.read_text(encoding="utf-8", errors="replace")
        described = parse_json(self.json, path)
        model = described.get("model") if isinstance(described, dict) else None
        kind = model.get("type", "BPE" if "merges" in model else None) if isinstance(model, dict) else None
        if kind != "BPE":
            raise DataError(f"{path}: a model of type {kind}, BPE is needed; give a tokenizer.json with merges")
        import tokenizers  # only now: workers that need none hold less

        try:
            # what it would put before and behind texts is left out, and so what it does to the places of words
            self._inner = tokenizers.Tokenizer.from_str(json.dumps(described | {"post_processor": None}))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path}: the library tokenizers cannot read it ({error}); mend it") from None
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        self.byte_level = "ByteLevel" in _kinds(described.get("decoder"))
        if not self.byte_level:
            log.info("%s: not a byte-level vocabulary; text it does not know may not come back as it was", path)
        self.vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.size = max(self.vocabulary.values(), default=0) + 1
        self.end = self._end(end)
        self.eos = None if self.end is None else self.vocabulary[self.end]
        self.cuttable = _cuttable(described)
        self._described = described
        self._quick: Gigatoken | None = None
        by_heart = fits(described) and len(self._single) == len(LETTERS)
        self._pieces = Pieces(self._batch) if by_heart else None

    @property
    def engine(self) -> str:
        """The name of what encodes."""
        return self._quick.name if self._quick else "tokenizers"

    def use_gigatoken(self) -> None:
        """Encode by gigatoken from now on: the same ids, sooner. Raises ConfigError where that cannot be had."""
        if not self.byte_level or len(self._single) < len(LETTERS):
            raise ConfigError(f"--bpe-engine gigatoken: {self.path} is not a vocabulary of all bytes; leave it out")
        self._quick = Gigatoken(self._described, self.path, self._slowly)

    def _end(self, wanted: str | None) -> str | None:
        if wanted is None:
            beside = self.path.with_name("tokenizer_config.json")
            described = read_json(beside) if beside.is_file() else {}
            told = described.get("eos_token") if isinstance(described, dict) else None
            told = told.get("content") if isinstance(told, dict) else told
            found = [word for word in (told, *ENDS) if isinstance(word, str) and word in self.vocabulary]
            return found[0] if found else None
        if wanted not in self.vocabulary:
            raise DataError(f"end: {self.path} has no token {wanted!r}; give one that it has")
        return wanted

    @cached_property
    def _words(self) -> dict[int, bytes]:
        """Bytes of each id of a byte-level vocabulary."""
        added = self._inner.get_added_tokens_decoder()
        found = {number: token.content.encode("utf-8") for number, token in added.items()}
        for word, number in self.vocabulary.items():
            if number not in found:
                bytes_of = [LETTERS.get(letter) for letter in word]
                found[number] = word.encode("utf-8") if None in bytes_of else bytes(bytes_of)  # type: ignore[arg-type]
        return found

    @cached_property
    def _single(self) -> dict[int, int]:
        """Id of each byte."""
        return {byte: self.vocabulary[letter] for letter, byte in LETTERS.items() if letter in self.vocabulary}

    @cached_property
    def _silent(self) -> int | None:
        """The id of what the vocabulary does not know."""
        return self.vocabulary.get(self._inner.model.unk_token)

    def _slowly(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def _batch(self, texts: list[str]) -> Iterator[list[int]]:
        # processes share the cores: the library's own threads would be too many
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return (one.ids for one in self._inner.encode_batch_fast(texts, add_special_tokens=False))

    def _text(self, text: str) -> list[int]:
        return self._known(self._quick.encode(text) if self._quick else self._slowly(text), text)

    def _known(self, ids: list[int], text: str) -> list[int]:
        if self._silent is not None and self._silent in ids:
            raise DataError(f"{self.path}: the vocabulary knows only a part of {text[:30]!r}; use another")
        return ids

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text; of bytes, those that are no UTF-8 one by one. Raises DataError for what has no id."""
        if isinstance(text, str):
            utf8(text)
            return self._text(text)
        found, data = [], bytes(text)
        while data:
            try:
                return found + self._text(data.decode("utf-8"))
            except UnicodeDecodeError as error:
                found += self._text(data[: error.start].decode("utf-8"))
                for byte in data[error.start : error.end]:
                    if not self.byte_level or byte not in self._single:
                        raise DataError(f"the vocabulary of {self.path} has no byte 0x{byte:02x}; give UTF-8") from None
                    found.append(self._single[byte])
                data = data[error.end :]
        return found

    def stream(self, blocks: Iterable[bytes]) -> Iterator[list[int]]:
        """The same ids, list after list, of a text that comes as blocks of UTF-8.

        It is encoded in windows that end where a word does. A vocabulary without such places takes the text whole.
        """
        held, window = "", WINDOW
        for block in blocks:
            held += block.decode("utf-8")
            start = 0
            while self.cuttable and len(held) - start > window:
                ids, size = self._window(held[start : start + window], window >= WORD)
                window = WINDOW if size else 2 * window  # a word that long is tried again with more behind it
                start += size
                yield ids
            held = held[start:]
        yield self._text(held)

    def _window(self, text: str, whole: bool) -> tuple[list[int], int]:
        """Ids of words that a text begins with and whose borders are sure, and their characters.

        None at all where there are too few words; of a `whole` text all.
        """
        found = self._inner.encode(text, add_special_tokens=False)
        words, ids = found.word_ids, found.ids
        left = WORDS
        for place in range(len(ids) - 1, 0, -1):
            if words[place] != words[place - 1]:
                left -= 1
                start = found.offsets[place][0] if left <= 0 else 0
                if start and text[start].isascii():  # what a normalizer could not join to what is before it
                    return self._known(ids[:place], text), start
        return (self._known(ids, text), len(text)) if whole else ([], 0)

    def encode_all(self, data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts, bytes from starts[k] to ends[k] of `data`, each ended by `eos`; and how many of each (n,).

        -1 is a text that holds what the vocabulary does not know; its ids are left out.
        """
        if self._quick:
            return self._quickly(data, starts, ends)
        texts = [str(data[start:stop], "utf-8") for start, stop in zip(starts.tolist(), ends.tolist(), strict=True)]
        if self._pieces:
            each = list(self._pieces.encode_all(texts))
            sizes = np.array([len(one) // 4 for one in each], dtype=np.int64)
            return self._ended(np.frombuffer(b"".join(each), dtype=np.int32), sizes)
        found, sizes, last = [], [], [] if self.eos is None else [self.eos]
        for ids in self._batch(texts):
            known = self._silent is None or self._silent not in ids
            sizes.append(len(ids) + len(last) if known else -1)
            if known:
                found += ids
                found += last
        return np.array(found, dtype=np.int32), np.array(sizes, dtype=np.int64)

    def _quickly(self, data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`encode_all` by gigatoken; a vocabulary of bytes knows every text."""
        texts = [data[start:stop].tobytes() for start, stop in zip(starts.tolist(), ends.tolist(), strict=True)]
        return self._ended(*self._quick.encode_all(texts))

    def _ended(self, ids: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of texts of so many each, with the end behind each."""
        return (ids, sizes) if self.eos is None else (np.insert(ids, np.cumsum(sizes), self.eos), sizes + 1)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; the end of a document gives none. Raises DataError for an id without a token."""
        numbers = [number for number in map(int, ids) if number != self.eos]
        for number in numbers:
            if not self.owns(number):
                raise unknown(number, self.size)
        if self.byte_level:
            return b"".join(self._words[number] for number in numbers)
        return self._inner.decode(numbers, skip_special_tokens=False).encode("utf-8")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def owns(self, number: int) -> bool:
        """Whether an id has a token."""
        return number != self.eos and number >= 0 and self._inner.id_to_token(number) is not None

    def write(self, path: str | Path) -> None:
        """Write the tokenizer.json that it was read from."""
        write_text(path, self.json)
