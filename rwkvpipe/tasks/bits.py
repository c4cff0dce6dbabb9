"""Bits per byte: how well a model foresees texts. Each token is predicted from all before it in its document."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from rwkvpipe.base.config import BenchmarkConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.tasks.metrics import finite, ratio_with_interval

BLOCK = 64  # texts read before their numbers are handed out
SHOWN = 200  # characters of a text that are kept beside its grade


def _window(value: object) -> bool:
    """Whether it is [nats, tokens, bytes] of a window."""
    if not isinstance(value, list) or len(value) != 3:
        return False
    return finite(value) and all(isinstance(count, int) and count >= 0 for count in value[1:])


class Bits:
    """The row of a question has `text`; nothing is asked, so the prompt plays no part.

    A tokenizer without an id that ends documents leaves the first token of each text out, its bytes too. The
    interval takes windows of ctx_len tokens as drawn one by one from texts of this kind.
    """

    better = "lower"

    def __init__(self, prompt: str = ""):
        self.template = prompt

    def prompt(self, question: dict) -> str:
        """What the model reads: the text itself."""
        return question["text"]

    def check(self, question: dict) -> None:
        """Raise DataError, naming the column, for a row that cannot be measured."""
        if not isinstance(question.get("text"), str):
            raise DataError("no text under `text`")

    def ask(
        self, engine: Any, questions: Sequence[dict], spec: BenchmarkConfig, done: Collection[int] = ()
    ) -> Iterator[tuple[int, dict]]:
        """Let the engine read all texts but those done: (number, [nats, tokens, bytes] of each window).

        Blocks are cut without regard to `done`, as in `Choice.ask`.
        """
        order = sorted(range(len(questions)), key=lambda n: len(questions[n]["text"]))
        for block in (order[first : first + BLOCK] for first in range(0, len(order), BLOCK)):
            if all(n in done for n in block):
                continue
            texts = [engine.tokenizer.encode(questions[n]["text"]) for n in block]
            for n, windows in zip(block, engine.windows(texts, spec.ctx_len), strict=True):
                if not all(math.isfinite(nats) for nats, _ in windows):
                    raise DataError(f"text {n + 1}: the model's probabilities are no numbers; damaged weights?")
                if n not in done:
                    decode = engine.tokenizer.decode_bytes
                    yield n, {"windows": [[round(nats, 3), len(ids), len(decode(ids))] for nats, ids in windows]}

    def mark(self, question: dict, answer: dict) -> dict:
        """A text's beginning and its bits per byte (None where nothing was predicted)."""
        windows = answer.get("windows")
        if not isinstance(windows, list) or not all(map(_window, windows)):
            raise DataError("no `windows` that were read; no answer to a text of task bits: run bench again")
        nats, size = math.fsum(nats for nats, _, _ in windows), sum(size for _, _, size in windows)
        bits = nats / math.log(2) / size if size else None
        return {"text": question["text"][:SHOWN], "bytes": size, "bits": bits, "windows": windows}

    def summary(self, marked: Sequence[dict]) -> dict:
        """Bits per byte over all texts with its interval, which `n` windows give; bits per token beside it."""
        windows = [window for row in marked for window in row["windows"]]
        amounts, sizes = [nats / math.log(2) for nats, _, _ in windows], [size for _, _, size in windows]
        score, low, high = ratio_with_interval(amounts, sizes)
        tokens = sum(count for _, count, _ in windows)
        counts = {"n": len(windows), "texts": len(marked), "tokens": tokens, "bytes": sum(sizes)}
        return {"score": score, "low": low, "high": high, "per_token": math.fsum(amounts) / tokens, **counts}
