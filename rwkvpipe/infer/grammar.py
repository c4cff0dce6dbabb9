"""Texts that follow a regular expression or a JSON schema: which ids may come next, by the library llguidance."""

import json
from functools import lru_cache
from typing import Any

import numpy as np

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.infer.words import Words

JSON = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}  # one form, which cannot go on


class _Vocabulary:
    """A vocabulary as the library asks for it; one id more than there are ends texts where no id of its own does."""

    def __init__(self, words: Words):
        self.words, self.bos_token_id = words, None
        self.eos_token_id = words.size if words.eos is None else words.eos
        self.special_token_ids = [self.eos_token_id]
        self.tokens = [b"\xff[%d]" % number for number in range(words.size + 1)]  # what no text has
        for data, numbers in words.by_bytes.items():
            for number in numbers:
                self.tokens[number] = data

    def __call__(self, data: bytes | str) -> list[int]:
        return list(self.words.tokenizer.encode(data))


def _library() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise ConfigError(
            "sampling: regex and json_schema need llguidance: python -m pip install '.[grammar]' in the checkout"
        ) from None
    return llguidance


@lru_cache(maxsize=4)
def _tokenizer(words: Words) -> Any:
    if not words.plain:
        raise ConfigError("sampling: regex and json_schema need a tokenizer of bytes, tries or BPE")
    library = _library()
    return library.LLTokenizer(library.TokenizerWrapper(_Vocabulary(words)))


@lru_cache(maxsize=64)
def _compiled(regex: str | None, schema: str | None, words: Words) -> str:
    """A grammar in the library's own form. Raises ConfigError for one that it does not take."""
    matcher, named = _library().LLMatcher, "regex" if regex is not None else "json_schema"
    try:
        found = matcher.grammar_from_json_schema(schema, JSON) if regex is None else matcher.grammar_from_regex(regex)
    except ValueError as error:  # a schema that is too deep for it, or has numbers that JSON has not
        raise ConfigError(f"sampling.{named}: {' '.join(str(error).split())}") from None
    if said := matcher.validate_grammar(found, _tokenizer(words)):
        raise ConfigError(f"sampling.{named}: {' '.join(said.split())}")
    return found


class Grammar:
    """Where one text is in its grammar."""

    def __init__(self, sampling: SamplingConfig, words: Words):
        schema = None if sampling.json_schema is None else json.dumps(sampling.json_schema)
        text = _compiled(sampling.regex, schema, words)
        self.words, self._matcher = words, _library().LLMatcher(_tokenizer(words), text, log_level=0)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            said = " ".join(self._matcher.get_error().partition("<state>")[0].split())
            raise ConfigError(f"sampling: what the text must follow went too far: {said[:300]}")

    @property
    def ids(self) -> np.ndarray:
        """Ids that may come next; where the text is whole, the one that ends documents, too."""
        mask = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        self._check()
        found = np.flatnonzero(mask[: self.words.size])
        return found[self.words.owned[found]]

    def take(self, number: int) -> None:
        """Go on by one id."""
        self._matcher.consume_token(number)
        self._check()

    @property
    def over(self) -> bool:
        """Whether the text is whole and none goes on; without an id that ends documents, the shortest one wins."""
        return self._matcher.is_stopped() or (self.words.eos is None and self._matcher.is_accepting())
