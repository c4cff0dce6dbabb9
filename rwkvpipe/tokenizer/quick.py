"""Gigatoken: another engine for byte-level BPE, many times as fast as the library tokenizers, with the same ids."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rwkvpipe.base.errors import ConfigError

PROBE = 1 << 16  # bytes of the first texts that both engines encode
ODD = (
    "I'll, they'VE it's 1234567 3.14 \t\ttabs\r\n\r\n  two lines   end ",
    "e\u0301 \u00e9 \u00df\u0130 \u4e2d\u6587\u3000\u0e44\u0e17\u0e22 \U0001f468\u200d\U0001f469 \u00a0\u2028\x00\x7f",
    "def f(x):\n\tif x >= 0: return {'a': [x**2, ...]}  # <|endoftext|> </s>\n",
)

Encode = Callable[[str], list[int]]


class Gigatoken:
    """The engine of one tokenizer.json, as `described`; `encode` is the library's, which has the last word.

    Raises ConfigError where gigatoken is not installed, does not know the vocabulary, or gives other ids.
    """

    name = "gigatoken"

    def __init__(self, described: dict, path: Path, encode: Encode):
        try:
            import awkward
            import gigatoken
        except ImportError as error:
            raise ConfigError(f"--bpe-engine gigatoken: {error}; python -m pip install 'rwkvpipe[bpe]'") from None
        added = [token for token in described.get("added_tokens", ()) if not token.get("special")]
        # text that looks like a special token is text, and nothing stands before or behind
        plain = described | {"added_tokens": added, "post_processor": None}
        try:
            self._inner = gigatoken.Tokenizer.from_json(json.dumps(plain))
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise ConfigError(f"--bpe-engine gigatoken: it does not read {path} ({said}); leave it out") from None
        self._awkward, self._path, self._encode, self._unproved = awkward, path, encode, PROBE
        for text in (*ODD, *(f"a{token['content']}b" for token in added)):
            self._prove(text, self.encode(text))

    def _prove(self, text: str, ids: list[int]) -> None:
        if ids != self._encode(text):
            raise ConfigError(
                f"--bpe-engine gigatoken: it gives {text[:30]!r} other ids than {self._path} means; leave it out"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._inner.encode(text.encode("utf-8")).tolist()

    def encode_all(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts, one after the other, and how many each has (n,); the first ones are proved."""
        # processes share the cores: threads of its own would be too many
        found = self._inner.encode_batch(list(texts), parallel=False)
        ids = self._awkward.to_numpy(self._awkward.flatten(found)).astype(np.int32)
        sizes = self._awkward.to_numpy(self._awkward.num(found)).astype(np.int64)
        for text, end, size in zip(texts, np.cumsum(sizes).tolist(), sizes.tolist(), strict=True):
            if self._unproved <= 0:
                break
            if len(text) <= PROBE:
                self._prove(str(text, "utf-8"), ids[end - size : end].tolist())
            self._unproved -= len(text)
        return ids, sizes
