"""Pairs of sources and targets are packed from rows of any kind, and come out as an encoder and a decoder read them."""

import json
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rwkvpipe import pack
from rwkvpipe.base.config import CorpusConfig, TrainConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.strict import check
from rwkvpipe.data.batches import Mix
from rwkvpipe.data.binidx import Binidx
from rwkvpipe.data.pairing import Pairing, divided, two_sides
from rwkvpipe.data.seq2seq import pair_batches
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.load import save_tokenizer

ALONE = SimpleNamespace(index=0, count=1)


def spec(**given):
    return CorpusConfig(path="x", tokenizer="t", format="seq2seq", **given)


def sides(row, **given):
    """Source and target as texts; the end of texts is a dollar."""
    tokenizer = ByteTokenizer(1)
    ids, marks = Pairing(spec(**given))(two_sides(row, {}, "f:1", spec(**given)).messages, tokenizer)
    found = ["", ""]
    for number, mark in zip(ids, marks, strict=True):
        found[mark] += tokenizer.decode([number]) if number else "$"
    assert sorted(marks) == marks
    return tuple(found)


@pytest.mark.parametrize(
    "row",
    [
        {"source": "ab", "target": "c"},
        {"prompt": "ab", "completion": "c"},
        {"question": "ab", "answer": "c"},
        {"instruction": "ab", "output": "c"},
        {"query": "ab", "response": "c"},
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]},
        {"encoder_ids": [98, 99, 0], "decoder_input_ids": [2, 100], "labels": [100, 0]},
        {"encoder_ids": [98, 99, 0], "decoder_input_ids": [2, 100, 0], "labels": [100, 0, -100]},
        {"encoder_ids": [98, 99, 0], "targets": [100, 0]},
    ],
)
def test_rows_of_every_kind_have_two_sides(row):
    assert sides(row) == ("ab$", "c$")


def test_of_a_talk_the_last_turn_is_the_target():
    user, reply = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
    source = "User: Hi\n\nAssistant: Ho\n\nUser: Hi\n\nAssistant:$"
    assert sides({"messages": [user, reply, user, reply]}) == (source, "Ho$")


def test_a_text_is_divided_at_its_own_place_or_copied():
    text = "x" * 40 + "y" * 60
    source, target = sides({"text": text}, pairing="split")
    assert source[:-1] + target[:-1] == text and 25 <= len(source) - 1 <= 75
    assert (source, target) == sides({"text": text}, pairing="split")
    assert len({divided(f"{n}", 1000) // 100 for n in range(200)}) >= 5
    assert sides({"text": "ab"}, pairing="copy") == ("ab$", "ab$")


def test_a_long_text_is_cut_into_windows_that_stay_in_one_part(tmp_path):
    rows = [{"text": f"{n:02}" + "".join(map(chr, range(65, 65 + n)))} for n in range(40)]
    packed(tmp_path, rows, pairing="split", cut=8, valid=0.4)
    found = {}
    for part in ("train", "valid"):
        data = Binidx(tmp_path / "out" / part)
        for start, end in data.documents.tolist():
            ids, marks = np.asarray(data.tokens(start, end - start)), data.mask(start, end - start)
            said = bytes((ids[ids > 0] - 1).tolist()).decode()
            assert len(said) <= 8 and 0 < marks.sum() < len(marks) and (ids == 0).sum() == 2
            found.setdefault(part, []).append(said)
    for row in rows:
        windows = [row["text"][n : n + 8] for n in range(0, len(row["text"]), 8)]
        windows = [window for window in windows if len(window) > 1 or len(windows) == 1]
        begun = [found[part].index(windows[0]) for part in found if windows[0] in found[part]]
        parts = [part for part in found if windows[0] in found[part]]
        assert len(parts) == 1 and found[parts[0]][begun[0] : begun[0] + len(windows)] == windows
    assert set(found) == {"train", "valid"}
    copied = packed(tmp_path, [{"text": "abcde"}], "copied", pairing="copy", cut=4)
    assert [end - start for start, end in copied.documents.tolist()] == [10, 4]


@pytest.mark.parametrize(
    ("row", "given", "problem"),
    [
        ({"text": "ab"}, {}, "a source without a target"),
        ({"messages": [{"role": "user", "content": "ab"}]}, {}, "a source without a target"),
        ({"source": "a", "target": "b"}, {"pairing": "split"}, "no `messages`, `question`"),
        ({"question": "a", "answer": "b"}, {"pairing": "copy"}, "pairing copy divides texts"),
        ({"encoder_ids": [1], "decoder_input_ids": [2, 7], "labels": [8, 0]}, {}, "is not `labels` behind a first id"),
        ({"encoder_ids": [1], "labels": [-100]}, {}, "`labels` has nothing to learn"),
        ({"encoder_ids": [], "labels": [1]}, {}, "`encoder_ids` must be a list of whole numbers"),
        ({"source": "a", "target": " "}, {}, "`target` is empty"),
    ],
)
def test_a_row_that_is_no_pair_is_named(row, given, problem):
    with pytest.raises(DataError, match=f"^f:1: .*{problem}"):
        sides(row, **given)


def packed(folder, rows, name="out", **given):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tokenizer(folder / "bytes", ByteTokenizer(1))
    pack.main([str(folder / f"{name}.jsonl"), "--spec", spec(**given).model_dump_json(), "--tokenizer",
               str(folder / "bytes"), "--out", str(folder / name)])  # fmt: skip
    return Binidx(folder / f"{name}/train")


def config(**changes):
    return TrainConfig(**({"steps": 1, "ctx_len": 8, "batch": 2, "seed": 3, "order": "sequential"} | changes))


def test_a_decoder_reads_what_it_is_to_write_one_place_later(tmp_path):
    data = packed(tmp_path, [{"source": "ab", "target": "cde"}, {"source": "a", "target": "c"}])
    assert json.loads((tmp_path / "out/corpus.json").read_text())["begin"] == 0
    batch = next(pair_batches(data, config(), ALONE, first_step=0, begin=5))
    assert batch.source.tolist() == [[98, 99, 0], [98, 0, 0]] and batch.source_lengths.tolist() == [3, 2]
    assert batch.inputs.tolist() == [[5, 100, 101, 102], [5, 100, 0, 0]]
    assert batch.targets.tolist() == [[100, 101, 102, 0], [100, 0, -1, -1]] and batch.lengths.tolist() == [4, 2]


def test_long_sides_are_cut_and_a_source_keeps_its_end(tmp_path):
    data = packed(tmp_path, [{"source": "abcdef", "target": "ghijkl"}] * 2)
    batch = next(pair_batches(data, config(ctx_len=3), ALONE, first_step=0, begin=0))
    assert batch.source.tolist() == [[98, 99, 0]] * 2 and batch.targets.tolist() == [[104, 105, 106]] * 2


def test_pairs_are_mixed_shared_and_resumed_as_rows_are(tmp_path):
    one = packed(tmp_path, [{"source": f"a{n}", "target": "x"} for n in range(30)])
    two = packed(tmp_path, [{"source": f"b{n}", "target": "y"} for n in range(30)], "two")
    mix, settings = Mix((one, two), (3, 1)), config(batch=8, order="shuffled")
    whole = list(islice(pair_batches(mix, settings, ALONE, first_step=0, begin=0), 10))
    assert abs(sum(int((batch.source[:, 0] == 98).sum()) for batch in whole) - 60) <= 2
    later = next(pair_batches(mix, settings, ALONE, first_step=7, begin=0))
    assert torch.equal(later.source, whole[7].source)
    for index in range(2):
        part = next(pair_batches(mix, settings, SimpleNamespace(index=index, count=2), first_step=7, begin=0))
        assert torch.equal(part.source[:, :2], whole[7].source[index::2, :2])


def test_what_cannot_be_pairs_is_refused(tmp_path):
    data = packed(tmp_path, [{"source": "ab", "target": "cde"}])
    with pytest.raises(ConfigError, match="pairs come shuffled or sequential"):
        pair_batches(data, config(order="magic"), ALONE, first_step=0, begin=0)
    with pytest.raises(DataError, match="1 pairs are fewer than the 2 that a step takes"):
        pair_batches(data, config(), ALONE, first_step=0, begin=0)
    with pytest.raises(DataError, match="out.jsonl:1: a text of one token cannot be divided"):
        packed(tmp_path, [{"text": "a"}], pairing="split")
    with pytest.raises(ConfigError, match="pairing belongs to format seq2seq"):
        check(CorpusConfig, {"path": "x", "tokenizer": "t", "pairing": "split"}, "c")
    with pytest.raises(ConfigError, match="cut belongs to format array, and, from 2 on, to pairing split and copy"):
        check(CorpusConfig, {"path": "x", "tokenizer": "t", "format": "seq2seq", "cut": 8}, "c")


def test_made_questions_are_pairs(tmp_path):
    made = {"synthetic": "counting.questions", "count": 3, "tokenizer": "t", "format": "seq2seq"}
    save_tokenizer(tmp_path / "bytes", ByteTokenizer(1))
    words = ["--tokenizer", str(tmp_path / "bytes"), "--out", str(tmp_path / "out")]
    pack.main(["--spec", json.dumps(made), *words])
    batch = next(pair_batches(Binidx(tmp_path / "out/train"), config(ctx_len=99), ALONE, first_step=0, begin=0))
    assert ByteTokenizer(1).decode(batch.source[0].tolist()).startswith("What comes after")
