"""Pairs are joined as bytes: the same files as one pack would make, whatever interrupts it."""

import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkvpipe.base.errors import DataError
from rwkvpipe.base.files import write_json
from rwkvpipe.data import joining
from rwkvpipe.data.binidx import Binidx, BinidxWriter
from rwkvpipe.data.joining import join
from rwkvpipe.data.spread import Spread

DOCUMENTS = [[[5, 6, 7], [], [1]], [[9, 65535] * 40, [2]], [[]], [[3, 4]]]


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch):
    """A disk takes its time to flush, and a process that dies loses nothing by it."""
    monkeypatch.setattr(os, "fsync", lambda *_: None)


def write(prefix, documents, dtype=np.uint16, masked=False):
    with BinidxWriter(prefix, dtype, masked=bool(masked)) as writer:
        for ids in documents:
            marks = [(number + 1) % 2 for number in range(len(ids))]
            writer.add(ids, [mark * float(masked) for mark in marks] if masked else None)
    return str(prefix)


def parts(folder, documents=DOCUMENTS, **how):
    return [write(folder / f"part{number}", found, **how) for number, found in enumerate(documents)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def whole(folder, documents=DOCUMENTS, **how):
    """The bytes of one pair of all documents, by suffix."""
    prefix = write(folder / "whole", [ids for found in documents for ids in found], **how)
    found = {suffix: (folder / f"whole.{suffix}").read_bytes() for suffix in kinds(how.get("masked"))}
    for suffix in found:
        os.unlink(f"{prefix}.{suffix}")
    return found


def kinds(masked):
    return ("bin", "idx", "mask") if masked else ("bin", "idx")


@pytest.mark.parametrize("masked", [False, True, 0.5])
@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_joined_pairs_are_the_bytes_of_one_pack(tmp_path, monkeypatch, masked, move, append, block):
    monkeypatch.setattr(joining, "BLOCK", block)
    wanted, sources = whole(tmp_path, masked=masked), parts(tmp_path, masked=masked)
    before, out = contents(tmp_path), sources[0] if append else str(tmp_path / "all")
    made = join(sources, out, move=move)
    assert made.documents[-1].tolist() == [len(made) - 2, len(made)]
    left = contents(tmp_path)
    for suffix, data in wanted.items():
        assert left.pop(os.path.basename(f"{out}.{suffix}")) == data
    stays = {} if move else {name: data for name, data in before.items() if name not in contents_of(out, append)}
    assert left == stays


def contents_of(prefix, there):
    return [os.path.basename(f"{prefix}.{suffix}") for suffix in kinds(True)] if there else []


class Killed(BaseException):
    """Nothing in the program expects it."""


@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("append", [False, True])
def test_a_join_that_dies_anywhere_loses_nothing_and_goes_on(tmp_path, monkeypatch, move, append):
    monkeypatch.setattr(joining, "BLOCK", 64)
    monkeypatch.setattr(joining, "EVERY", 1)
    wanted, moments, done = whole(tmp_path, masked=True), 0, False
    calls = ("pwrite", "fsync", "replace", "rename", "ftruncate", "unlink")
    while not done:
        folder = tmp_path / f"at{moments}"
        folder.mkdir()
        sources = parts(folder, masked=True)
        out, left = sources[0] if append else str(folder / "all"), moments
        with monkeypatch.context() as patch:
            for name in calls:
                real = getattr(os, name)

                def dies(*given, real=real, **more):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise Killed
                    return real(*given, **more)

                patch.setattr(os, name, dies)
            try:
                join(sources, out, move=move)
                done = True
            except Killed:
                pass
        finished = not os.path.exists(joining._home(out) / "plan.json") and os.path.exists(f"{out}.idx") and not append
        if not done and not (finished and contents(folder).keys() <= {f"all.{k}" for k in kinds(True)}):
            if finished and not move:  # it was done but for a name of a folder
                for suffix in kinds(True):
                    os.unlink(f"{out}.{suffix}")
            join(sources, out, move=move)
        for suffix, data in wanted.items():
            assert Path(f"{out}.{suffix}").read_bytes() == data, (moments, suffix)
        assert not joining._home(out).exists() or not any(joining._home(out).iterdir())
        shutil.rmtree(folder)
        moments += random.choice((1, 2, 3, 4))
    assert moments > 25


def test_a_kill_at_any_time_loses_nothing(tmp_path):
    stream = np.random.default_rng(1)
    documents = [[stream.integers(0, 60000, 20_000) for _ in range(3)] for _ in range(3)]
    wanted, sources = whole(tmp_path, documents), parts(tmp_path, documents)
    program = "import os, sys; from rwkvpipe.data import joining; joining.BLOCK = 32; os.fsync = lambda *_: None;"
    program += "print('joining', flush=True); joining.join(sys.argv[1:4], sys.argv[4], move=True)"
    words = [sys.executable, "-c", program, *sources, str(tmp_path / "all")]
    for _ in range(3):
        process = subprocess.Popen(words, stdout=subprocess.PIPE)
        process.stdout.readline()
        threading.Event().wait(random.uniform(0, 0.05))
        process.kill()
        if process.wait() == 0:
            break
        process.stdout.close()
    if (tmp_path / ".all.join").exists() or not (tmp_path / "all.idx").exists():
        join(sources, tmp_path / "all", move=True)
    assert {suffix: (tmp_path / f"all.{suffix}").read_bytes() for suffix in wanted} == wanted
    assert not any(os.path.exists(f"{source}.bin") for source in sources)


def test_a_moved_join_holds_a_block_twice_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "BLOCK", 1 << 16)
    sources, most = parts(tmp_path, [[list(range(50_000))]] * 5), 0
    real = os.ftruncate

    def held():
        found = [path for path in tmp_path.rglob("*.bin")] + [path for path in tmp_path.rglob("bin")]
        return sum(path.stat().st_blocks * 512 for path in found)

    def measured(*given):
        nonlocal most
        most = max(most, held())
        real(*given)

    monkeypatch.setattr(os, "ftruncate", measured)
    before = held()
    join(sources, tmp_path / "all", move=True)
    assert before <= most <= before + (1 << 16) + 8 * 4096


def test_another_join_does_not_begin_where_one_is_unfinished(tmp_path, monkeypatch):
    sources = parts(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(joining, "_block", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            join(sources, tmp_path / "all")
    with pytest.raises(DataError, match=r"an unfinished join; end it first: python -m rwkvpipe.join .*part0 .* --out"):
        join(sources[:2], tmp_path / "all")
    join(sources, tmp_path / "all")


def test_what_does_not_go_together_is_refused_and_nothing_is_touched(tmp_path):
    sources = parts(tmp_path)
    wide = write(tmp_path / "wide", [[70000]], np.int32)
    masked = write(tmp_path / "masked", [[7, 8]], masked=True)
    weighed = write(tmp_path / "weighed", [[7, 8]], masked=0.5)
    os.symlink(f"{sources[0]}.bin", tmp_path / "link.bin")
    os.symlink(f"{sources[0]}.idx", tmp_path / "link.idx")
    for folder, tokenizer in (("x", "one"), ("y", "other")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "train", [[1]])
        write_json(tmp_path / folder / "corpus.json", {"tokenizer": tokenizer, "vocab_size": 9})
    before = contents_deep(tmp_path)
    for wrong, move, problem in (
        ([sources[0], wide], False, "tokens of int32, those of .*part0 are uint16"),
        ([sources[0], masked], False, "part0: has no .mask, .*masked has one"),
        ([weighed, masked], False, "/masked: its .mask holds 0 and 1, that of .*weighed weights"),
        ([sources[0], sources[0]], True, "stands twice"),
        ([sources[0], str(tmp_path / "out")], False, "pairs are appended to the first source"),
        ([sources[0], str(tmp_path / "none")], False, "none.idx: no such file"),
        ([str(tmp_path / "link")], True, "link.bin: is a link to what lies elsewhere"),
        ([str(tmp_path / "x/train"), str(tmp_path / "y/train")], False, "y/train: its corpus.json names another"),
    ):
        with pytest.raises(DataError, match=problem):
            join(wrong, tmp_path / "out", move=move)
    with pytest.raises(DataError, match="part1: there already; name it first to append to it"):
        join([sources[0], sources[2]], sources[1])
    assert contents_deep(tmp_path) == before


def contents_deep(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_documents_of_several_items_stay_whole(tmp_path, goldens):
    source = goldens / "rwkv/bin_u16"
    made = join([source, source], tmp_path / "twice")
    once = Binidx(source)
    assert len(made) == 2 * len(once) and len(made.sizes) == 2 * len(once.sizes)
    assert made.documents.tolist() == [*once.documents.tolist(), *(once.documents + len(once)).tolist()]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 99), max_size=7), max_size=6), st.data())
def test_what_lies_in_several_files_reads_as_one(found, data):
    spread = Spread([np.asarray(part, np.uint16) for part in found])
    flat = [number for part in found for number in part]
    assert len(spread) == len(flat)
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert spread[start:stop].tolist() == flat[start:stop]
