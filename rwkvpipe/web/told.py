"""What is told to a client, in the shapes of OpenAI's interface: whole answers, and pieces of a stream."""

import codecs
import secrets
import time
from collections.abc import Sequence
from typing import Any

from rwkvpipe.tokenizer.load import Tokenizer
from rwkvpipe.web.asked import Asked
from rwkvpipe.web.desk import Event, Token


class Choice:
    """One text as it comes: characters are told when they are whole."""

    def __init__(self, kind: str, index: int, tokenizer: Tokenizer):
        self.kind, self.index, self.tokenizer = kind, index, tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.tokens: list[Token] = []
        self.pieces: list[str] = []
        self.finish: str | None = None
        self.offset = 0

    def take(self, event: Event) -> str:
        """What an event adds to the text."""
        piece = self.decoder.decode(event.data, final=event.finish is not None)
        if self.kind == "chat" and not any(self.pieces):
            piece = piece.removeprefix(" ")  # a turn's name and its words are a space apart
        self.pieces.append(piece)
        self.tokens += event.tokens
        self.finish = event.finish
        return piece

    def logprobs(self, tokens: Sequence[Token], asked: Asked) -> dict | None:
        """Log-probabilities of these tokens; None where nobody asked."""
        if asked.top is None:
            return None
        if asked.kind == "chat":
            found = [
                self._entry(token.number, token.logprob)
                | {"top_logprobs": [self._entry(number, value) for number, value in token.likely]}
                for token in tokens
            ]
            return {"content": found, "refusal": None}
        words = [self._word(token.number) for token in tokens]
        offsets = []
        for word in words:
            offsets.append(self.offset)
            self.offset += len(word)
        return {
            "tokens": words,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._likely(token) for token in tokens],
            "text_offset": offsets,
        }

    def _likely(self, token: Token) -> dict[str, float | None]:
        """The likeliest words, the likelier of those that look alike, and the one that was chosen."""
        found: dict[str, float | None] = {}
        for number, value in token.likely:
            found.setdefault(self._word(number), value)
        return found | {self._word(token.number): token.logprob}

    def _word(self, number: int) -> str:
        return self.tokenizer.decode([number])

    def _entry(self, number: int, logprob: float | None) -> dict:
        return {
            "token": self._word(number),
            "logprob": logprob,
            "bytes": list(self.tokenizer.decode_bytes([number])),
        }


class Answer:
    """All that is told about one request."""

    def __init__(self, asked: Asked, name: str, tokenizer: Tokenizer):
        self.asked, self.name = asked, name
        self.choices = [Choice(asked.kind, n, tokenizer) for n in range(len(asked.prompts) * asked.samples)]
        self.id = f"{'chatcmpl' if asked.kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    @property
    def over(self) -> bool:
        """Whether every text has ended."""
        return all(choice.finish for choice in self.choices)

    def _head(self, what: str, choices: list[dict]) -> dict[str, Any]:
        head = {"id": self.id, "object": what, "created": self.created, "model": self.name}
        return head | {"choices": choices, "system_fingerprint": None}

    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        read = sum(map(len, self.asked.prompts))
        written = sum(len(choice.tokens) for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def whole(self) -> dict:
        """The answer, once it is over."""
        found = []
        for choice in self.choices:
            text = "".join(choice.pieces)
            said = {"text": text}
            if self.asked.kind == "chat":
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            logprobs = choice.logprobs(choice.tokens, self.asked)
            found.append({"index": choice.index, **said, "logprobs": logprobs, "finish_reason": choice.finish})
        what = "chat.completion" if self.asked.kind == "chat" else "text_completion"
        return self._head(what, found) | {"usage": self.usage()}

    def opening(self) -> list[dict]:
        """What a stream begins with: whose turn it is."""
        if self.asked.kind == "text":
            return []
        return [self._piece(choice, {"role": "assistant", "content": ""}, None, None) for choice in self.choices]

    def take(self, event: Event) -> list[dict]:
        """What a stream tells of an event."""
        choice = self.choices[event.index]
        piece = choice.take(event)
        logprobs = choice.logprobs(event.tokens, self.asked)
        if not piece and logprobs is None and event.finish is None:
            return []
        if self.asked.kind == "text":
            return [self._piece(choice, piece, logprobs, event.finish)]
        told = [self._piece(choice, {"content": piece}, logprobs, None)] if piece or logprobs else []
        return told + ([self._piece(choice, {}, None, event.finish)] if event.finish else [])

    def closing(self) -> list[dict]:
        """What a stream ends with, where the client asked what it used."""
        if not self.asked.usage:
            return []
        what = "chat.completion.chunk" if self.asked.kind == "chat" else "text_completion"
        return [self._head(what, []) | {"usage": self.usage()}]

    def _piece(self, choice: Choice, said: dict | str, logprobs: dict | None, finish: str | None) -> dict:
        found = {"index": choice.index, "logprobs": logprobs, "finish_reason": finish}
        if self.asked.kind == "chat":
            return self._head("chat.completion.chunk", [found | {"delta": said}])
        return self._head("text_completion", [found | {"text": said}])
