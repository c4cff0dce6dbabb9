"""Bits per byte are those of the formulas."""

import json
import math

import pytest

from rwkvpipe.base.config import BenchmarkConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.tasks.bits import Bits


class Reader:
    """An engine to which each token costs a nat."""

    class tokenizer:
        encode = staticmethod(lambda text: list(text.encode()))
        decode_bytes = staticmethod(bytes)

    def windows(self, texts, ctx_len):
        cut = [[ids[n : n + ctx_len] for n in range(0, len(ids), ctx_len)] for ids in texts]
        return [[(float(len(part)), part) for part in parts] for parts in cut]


def test_reference_numbers_agree(goldens):
    lines = (goldens / "eval" / "perplexity_goldens.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["type"] == "rolling"]
    assert rows
    for row in rows:
        marked = [Bits().mark({"text": ""}, {"windows": [[-d["loglikelihood"], 1, d["bytes"]]]}) for d in row["docs"]]
        assert Bits().summary(marked)["score"] == pytest.approx(row["bits_per_byte"], rel=1e-9)


def test_texts_are_measured_by_windows():
    spec = BenchmarkConfig(task="bits", path="x", ctx_len=4)
    questions = [{"text": "abcdefghij"}, {"text": ""}, {"text": "\u00e9"}]
    found = dict(Bits().ask(Reader(), questions, spec))
    assert found[0] == {"windows": [[4.0, 4, 4], [4.0, 4, 4], [2.0, 2, 2]]} and found[1] == {"windows": []}
    marked = [Bits().mark(question, found[number]) for number, question in enumerate(questions)]
    assert [row["bits"] for row in marked] == [pytest.approx(1 / math.log(2)), None, pytest.approx(1 / math.log(2))]
    summary = Bits().summary(marked)
    assert summary["score"] == pytest.approx(1 / math.log(2)) == pytest.approx(summary["per_token"])
    assert (summary["n"], summary["texts"], summary["tokens"], summary["bytes"]) == (4, 3, 12, 12)


def test_what_is_done_is_not_given_again():
    spec = BenchmarkConfig(task="bits", path="x")
    assert [n for n, _ in Bits().ask(Reader(), [{"text": "a"}, {"text": "b"}], spec, {0})] == [1]


def test_empty_texts_have_no_bits():
    with pytest.raises(DataError, match="empty"):
        Bits().summary([Bits().mark({"text": ""}, {"windows": []})])
    with pytest.raises(DataError, match="`text`"):
        Bits().check({"question": "?"})
