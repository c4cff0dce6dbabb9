"""Random corpora: nothing is lost, whatever the processes, the units and the order of files."""

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkvpipe import pack
from rwkvpipe.data import table
from rwkvpipe.data.binidx import Binidx
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.load import save_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def packed(folder, out, *words, **spec):
    save_tokenizer(folder / "bytes", ByteTokenizer(1))
    asked = {"path": "x", "tokenizer": "t"} | spec
    pack.main([str(folder / "in"), *map(str, words), "--spec", json.dumps(asked), "--tokenizer", str(folder / "bytes"),
               "--out", str(folder / out)])  # fmt: skip
    return [Binidx(folder / out / part) for part in ("train", "valid")]


def write(folder, name, rows):
    (folder / "in").mkdir(exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=len(rows) % 2 == 0) + "\n" for row in rows)
    (folder / "in" / name).write_text(data, encoding="utf-8")


def said(pair):
    """Documents as (text, what of it is learned)."""
    found = []
    for start, end in pair.documents.tolist():
        ids = pair.tokens(start, end - start)
        marks = pair.mask(start, end - start) if pair.masked else [1] * len(ids)
        found.append((ByteTokenizer(1).decode(ids), ByteTokenizer(1).decode(ids[[bool(mark) for mark in marks]])))
    return found


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    texts=st.lists(TEXT.filter(bool), min_size=8, max_size=25, unique=True),
    more=st.lists(TEXT.filter(bool), max_size=9),
    unit=st.integers(20, 400),
)
def test_texts_come_back_whole_and_none_moves_when_others_come(tmp_path_factory, monkeypatch, texts, more, unit):
    folder = tmp_path_factory.mktemp("corpus")
    monkeypatch.setattr(table, "UNIT", unit)
    write(folder, "b.jsonl", [{"text": text} for text in ["in train, always", *texts]])
    parts = packed(folder, "one", valid=0.4) if _divides(texts) else packed(folder, "one")
    before = [{text for text, _ in said(part)} for part in parts]
    assert sorted(text for part in parts for text, _ in said(part)) == sorted(["in train, always", *texts])
    write(folder, "a.jsonl", [{"text": text} for text in [*more, "another"]])
    after = packed(folder, "two", valid=0.4) if _divides(texts) else packed(folder, "two")
    for was, now in zip(before, after, strict=True):
        assert was <= {text for text, _ in said(now)}


def _divides(texts):
    """Whether a share of 0.4 leaves something on both sides."""
    from rwkvpipe.data.document import Document

    held = [Document(text=text).fraction < 0.4 for text in [*texts, "in train, always"]]
    return any(held) and not all(held)


def row(stream, format, number):
    words = [f"{number}", *("".join(stream.choices("abc \n\u00e9\u4e2d", k=stream.randint(1, 40))) for _ in range(3))]
    words = [word.strip() or "x" for word in words]
    if format == "text":
        return {"text": " ".join(words)}
    if format == "chat" and stream.random() < 0.5:
        turns = [{"role": role, "content": word} for role, word in zip(("user", "assistant") * 2, words, strict=True)]
        return {"messages": turns}
    return {"question": words[0], "answer": words[1]}


@pytest.mark.parametrize("format", ["text", "chat", "seq2seq"])
def test_processes_and_units_decide_no_byte_of_a_random_corpus(tmp_path, monkeypatch, format):
    stream, made = random.Random(format), []
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path, name, [row(stream, format, number) for number in range(stream.randint(40, 90))])
    for workers in (1, 1, stream.choice((2, 3))):
        monkeypatch.setattr(table, "UNIT", stream.randint(300, 3000))
        packed(tmp_path, "out", "--workers", workers, format=format, valid=0.3)
        made.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert made[0] == made[1] == made[2] and len(made[0]) == (5 if format == "text" else 7)
