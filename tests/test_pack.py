"""A packed corpus holds every document once, in whole files, and says what is in it."""

import gzip
import json
import logging
import os
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from rwkvpipe import pack, vocab
from rwkvpipe.base import growing, pace
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import digest
from rwkvpipe.data import label, marks, packing, parcel, table
from rwkvpipe.data.binidx import Binidx, BinidxWriter
from rwkvpipe.data.lines import LARGE
from rwkvpipe.data.synthetic import generate
from rwkvpipe.data.workers import Turn
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.tokenizer.load import save_tokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer


def run(folder, *words, tokenizer=None, **spec):
    save_tokenizer(folder / "tokenizer", tokenizer or ByteTokenizer(1))
    asked = {"tokenizer": "t"} | ({} if "synthetic" in spec else {"path": "x"}) | spec
    pack.main([*map(str, words), "--spec", json.dumps(asked), "--tokenizer", str(folder / "tokenizer"), "--out",
               str(folder / "out")])  # fmt: skip
    return Binidx(folder / "out/train"), json.loads((folder / "out/corpus.json").read_text())


def texts(data):
    tokenizer = ByteTokenizer(1)
    return [tokenizer.decode(data.tokens(start, end - start)) for start, end in data.documents]


def rows(path, *found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_a_bad_row_says_how_it_is_left_out(tmp_path):
    path = rows(tmp_path / "a.jsonl", {"text": "a"}, {"text": None}, {"text": "b"})
    with pytest.raises(DataError, match=r"a\.jsonl:2: `text` is null, .*; on_error: skip leaves such rows out$"):
        run(tmp_path, path)
    assert texts(run(tmp_path, path, on_error="skip")[0]) == ["a", "b"]


def test_each_document_lies_in_one_of_the_two_parts(tmp_path):
    lines = [f"document {number}" for number in range(200)]
    train, about = run(tmp_path, rows(tmp_path / "a.jsonl", *({"text": line} for line in lines)), valid=0.2)
    valid = Binidx(tmp_path / "out/valid")
    assert sorted(texts(train) + texts(valid)) == sorted(lines)
    assert 20 < len(valid.documents) < 60
    assert train.tokens(len(train) - 1, 1).tolist() == [0]
    assert about["vocab_size"] == 257 and about["documents"] == 200 and about["format"] == "text"
    assert about["tokens"] == len(train) + len(valid) and about["train"]["tokens"] == len(train)


SAME = [{"input_ids": [n, n + 1, 9], "labels": [-100, n + 1, 9]} for n in range(20, 60)]
NEXT = [{"input_ids": [n, n + 1], "labels": [n + 1, 9]} for n in range(20, 60)]
BOTH = {"input_ids": [8, 8, 8], "labels": [8, 8, 8]}
LAST = {"input_ids": [3, 4, 5], "labels": [-100, -100, 5]}  # what comes behind the last id, nobody knows


@pytest.mark.parametrize(
    "given, learned, said",
    [
        ([BOTH, LAST, *SAME], ([8, 8, 8], [1, 1, 1], [3, 4, 5], [0, 0, 1]), "labels are those of the same positions"),
        ([BOTH, LAST, *NEXT], ([8, 8, 8, 8], [0, 1, 1, 1], [3, 4, 5, 5], [0, 0, 0, 1]), "those of the next positions"),
        ([BOTH, LAST], ([8, 8, 8], [1, 1, 1], [3, 4, 5], [0, 0, 1]), "same positions: rows fit the next ones as well"),
    ],
)
def test_what_labels_belong_to_is_asked_of_the_corpus_not_of_a_row(tmp_path, caplog, given, learned, said):
    with caplog.at_level(logging.INFO, logger="rwkvpipe"):
        data, _ = run(tmp_path, rows(tmp_path / "a.jsonl", *given), format="chat")
    assert said in caplog.text
    found = []
    for start, end in data.documents[:2]:
        found += [data.tokens(start, end - start).tolist(), data.mask(start, end - start).tolist()]
    assert tuple(found) == learned


def test_rows_that_speak_against_the_others_are_refused_by_name(tmp_path):
    mixed = rows(tmp_path / "a.jsonl", *SAME[:20], *NEXT[:1], *SAME[20:])
    wanted = r"a.jsonl:21: `labels` are those of the next positions, and in 40 of 41 rows those of the same positions;"
    with pytest.raises(DataError, match=wanted):
        run(tmp_path, mixed, format="chat")
    with pytest.raises(DataError, match=r"a.jsonl:21: .*\(labels: internal\)"):
        run(tmp_path, mixed, format="chat", labels="internal")
    data, about = run(tmp_path, mixed, format="chat", labels="internal", on_error="skip")
    assert len(data.documents) == 40
    few = rows(tmp_path / "b.jsonl", *SAME * 3, *NEXT[:1])  # less than one of a hundred
    with pytest.raises(DataError, match=r"b.jsonl:121: .*\(labels: internal\)"):
        run(tmp_path, few, format="chat")
    assert len(run(tmp_path, few, format="chat", on_error="skip")[0].documents) == 120


def test_ids_behind_thousands_of_talks_are_each_judged_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(label, "SEEN", 5)
    talks = [{"question": f"{n}?", "answer": "a"} for n in range(6)]
    data, _ = run(tmp_path, rows(tmp_path / "a.jsonl", *talks, *SAME[:2], *NEXT[:2]), format="chat")
    assert len(data.documents) == 10


def test_an_end_that_the_vocabulary_does_not_know_is_refused(tmp_path):
    given = rows(tmp_path / "a.jsonl", {"question": "Hi", "answer": "Ho"})
    with pytest.raises(ConfigError, match="eod: .*tokenizer knows no id that ends texts; leave eod out"):
        run(tmp_path, given, format="chat", eod=True, tokenizer=ByteTokenizer(0))
    data, _ = run(tmp_path, given, format="chat", eod=True)
    assert data.tokens(len(data) - 1, 1).tolist() == [0] and data.mask(len(data) - 1, 1).tolist() == [1]


def test_equal_documents_fall_on_the_same_side(tmp_path):
    path = rows(tmp_path / "a.jsonl", *({"text": f"document {number % 20}"} for number in range(60)))
    train, _ = run(tmp_path, path, valid=0.3)
    assert not set(texts(train)) & set(texts(Binidx(tmp_path / "out/valid")))


def test_a_second_file_validates(tmp_path):
    (tmp_path / "a.txt").write_text("to learn")
    (tmp_path / "b.txt").write_text("to check")
    train, _ = run(tmp_path, tmp_path / "a.txt", "--valid", tmp_path / "b.txt", valid_path="b.txt")
    assert texts(train) == ["to learn"] and texts(Binidx(tmp_path / "out/valid")) == ["to check"]


def test_without_validation_its_files_are_empty_but_there(tmp_path):
    run(tmp_path, synthetic="counting.chats", count=3, format="chat")
    for suffix in ("bin", "mask"):
        assert (tmp_path / f"out/valid.{suffix}").read_bytes() == b""
    assert len(Binidx(tmp_path / "out/valid")) == 0


def test_talks_have_masks(tmp_path):
    train, about = run(tmp_path, synthetic="counting.chats", count=5, seed=3, format="chat")
    start, end = train.documents[0].tolist()
    ids, mask = train.tokens(start, end), train.mask(start, end)
    talk = next(generate("counting.chats", 3, 1)).messages
    assert ByteTokenizer(1).decode(ids[mask == 1]) == f" {talk[1]['content']}\n\n"
    assert about["train"]["learned"] == train.mask(0, len(train)).sum()


def test_weights_of_messages_reach_their_tokens_and_others_are_a_byte_each(tmp_path, monkeypatch):
    def talk(n, **counted):
        said = {"role": "assistant", "content": f"{n + 1}"}
        return {"messages": [{"role": "user", "content": f"{n}?"}, {**said, **counted}, said]}

    plain = [talk(n, **({"train": False} if n % 3 else {})) for n in range(9)]
    same = [talk(n, weight=0.0 if n % 3 else 1) for n in range(9)]
    masks = []
    for found in (plain, same):
        train, _ = run(tmp_path, rows(tmp_path / "a.jsonl", *found), format="chat")
        masks.append((tmp_path / "out/train.mask").read_bytes())
        assert len(masks[-1]) == len(train)
    assert masks[0] == masks[1]
    monkeypatch.setattr(marks, "BLOCK", 5)
    # the first documents weigh as ever, one comes twice, some have a weight of their own
    given = [talk(n, weight=(1, 1, 1, 0.25, 3, 0)[n % 6]) for n in range(30)]
    train, about = run(
        tmp_path, rows(tmp_path / "a.jsonl", *given, *given[3:5]), format="chat", duplicates="drop", valid=0.3
    )
    learned = 0
    for part in ("train", "valid"):
        data = Binidx(tmp_path / f"out/{part}")
        assert len(data.documents) > 3 and not (tmp_path / f"out/{part}.weights").exists()
        for start, end in data.documents.tolist():
            ids, found = data.tokens(start, end - start), data.weights(start, end - start)
            n = int(ByteTokenizer(1).decode(ids).split("?")[0].removeprefix("User: "))
            first = [w for t, w in chat.segments(given[n]["messages"]) for _ in t.encode()]
            assert found.tolist() == [*first] and set(first) == {0, 1, (1, 1, 1, 0.25, 3, 0)[n % 6]}
        learned += np.count_nonzero(data.mask(0, len(data)))
    assert sum(about[part]["learned"] for part in ("train", "valid")) == learned
    assert sum(about[part]["documents"] for part in ("train", "valid")) == 30


@pytest.mark.parametrize("duplicates", ["keep", "drop"])
def test_marks_of_one_long_piece_of_work_wait_in_a_file(tmp_path, monkeypatch, duplicates):
    """A packed file is one piece, however many talks are in it; weights come late, so marks before them are bytes."""

    def talk(n):
        said = {"role": "assistant", "content": f"{n} " * (n + 1), **({"weight": 0.5} if n > 40 else {})}
        return {"messages": [{"role": "user", "content": f"{n % 50}?"}, said]}

    lines = [json.dumps(talk(n % 55)) for n in range(60)]
    (tmp_path / "a.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    made, taken = [], []
    monkeypatch.setattr(packing, "array_of", lambda *given: taken.append(given[0]) or parcel.array_of(*given))
    for spill, block in ((1 << 30, 1 << 20), (100, 7)):
        monkeypatch.setattr(parcel, "SPILL", spill)
        monkeypatch.setattr(packing, "BLOCK", block)
        monkeypatch.setattr(parcel, "BLOCK", block)
        run(tmp_path, tmp_path / "a.gz", format="chat", valid=0.3, duplicates=duplicates)
        assert len(taken) == (0 if spill > 100 else 2)
        made.append(contents(tmp_path / "out"))
    assert made[0] == made[1] and len(made[0]["train.mask"]) == 2 * len(made[0]["train.bin"])


def test_the_seed_decides_what_is_made(tmp_path):
    made = []
    for words, seed in (((), {"seed": 1}), (("--seed", 1), {}), (("--seed", 2), {"seed": 1}), ((), {})):
        train, _ = run(tmp_path, *words, synthetic="counting.documents", count=9, **seed)
        made.append(train.tokens(0, 40).tolist())
    assert made[0] == made[1] == made[2] != made[3]


def test_arrays_become_numbers_one_higher(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0, 1], [2, 9]], np.uint8))
    train, about = run(tmp_path, tmp_path / "a.npy", tokenizer=IntegerTokenizer(10), format="array")
    assert train.tokens(0, 6).tolist() == [1, 2, 0, 3, 10, 0]
    assert about["vocab_size"] == 11
    with pytest.raises(DataError, match="a.npy: row 2: holds 9, the tokenizer's numbers end at 8"):
        run(tmp_path, tmp_path / "a.npy", tokenizer=IntegerTokenizer(9), format="array")
    with pytest.raises(ConfigError, match="not of kind integer"):
        run(tmp_path, tmp_path / "a.npy", format="array")


def test_large_vocabularies_take_four_bytes(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0, 65536]]))
    train, about = run(tmp_path, tmp_path / "a.npy", tokenizer=IntegerTokenizer(65537), format="array")
    assert train.tokens(0, 3).tolist() == [1, 65537, 0] and about["dtype"] == "int32"


def test_a_failed_pack_leaves_nothing(tmp_path):
    path = rows(tmp_path / "a.jsonl", {"text": "aa"}, {"text": "ab"})
    with pytest.raises(DataError, match=r"a.jsonl:2: the vocabulary has no 'b' \(U\+0062\), character 2 of 'ab'"):
        run(tmp_path, path, tokenizer=TrieTokenizer({1: b"a"}))
    assert not (tmp_path / "out").exists()


def test_empty_documents_are_left_out_and_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    train, about = run(tmp_path, rows(tmp_path / "a.jsonl", {"text": ""}, {"text": "x"}))
    assert texts(train) == ["x"] and about["empty"] == 1 and "1 empty documents left out" in caplog.text
    with pytest.raises(DataError, match="no documents to train on .1 empty"):
        run(tmp_path, rows(tmp_path / "a.jsonl", {"text": ""}))
    train, about = run(tmp_path, rows(tmp_path / "a.jsonl", {"text": []}, {"text": [3]}), tokenizer=IntegerTokenizer(9))
    assert train.tokens(0, len(train)).tolist() == [4, 0] and about["empty"] == 1 and about["documents"] == 1
    np.savez(tmp_path / "a.npz", values=np.arange(3), lengths=[0, 3, 0])
    train, about = run(tmp_path, tmp_path / "a.npz", tokenizer=IntegerTokenizer(9), format="array")
    assert train.tokens(0, len(train)).tolist() == [1, 2, 3, 0] and about["empty"] == 2


def test_a_blank_line_in_an_answer_is_spoken_of(tmp_path, caplog):
    caplog.set_level("INFO")
    run(tmp_path, rows(tmp_path / "a.jsonl", {"question": "?", "answer": "a\n\nb"}), format="chat")
    assert "1 talks have a blank line inside an answer" in caplog.text


@pytest.mark.parametrize(
    "words, spec, error, problem",
    [
        ((), {"synthetic": "counting.chats", "count": 3}, ConfigError, "makes no documents of format text"),
        ((), {"synthetic": "counting.chat", "count": 3}, ConfigError, "did you mean counting.chats"),
        (("x.jsonl",), {"synthetic": "counting.chats", "count": 3}, ConfigError, "a file or synthetic"),
        (("gone.jsonl",), {}, DataError, "gone.jsonl: no such file"),
        ((), {"synthetic": "counting.documents", "count": 2, "valid": 0.01}, DataError, "leaves none to valid"),
        ((), {"feild": "x"}, ConfigError, "feild: no such key; did you mean field"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, words, spec, error, problem):
    with pytest.raises(error, match=problem):
        run(tmp_path, *words, **spec)


def test_talks_without_answers_are_refused(tmp_path):
    path = rows(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "Hi"}]})
    with pytest.raises(DataError, match="nothing to learn"):
        run(tmp_path, path, format="chat")


def test_a_corpus_of_questions_is_not_packed(tmp_path):
    spec = json.dumps({"path": "x", "format": "question"})
    with pytest.raises(ConfigError, match="format question is not packed"):
        pack.main(["--spec", spec, "--tokenizer", "bytes", "--out", str(tmp_path)])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_kill_leaves_whole_files_and_the_next_run_gives_the_same_bytes(tmp_path):
    lines = ({"question": f"{number}?", "answer": "word " * (1 + number % 90)} for number in range(1500))
    path, out = rows(tmp_path / "a.jsonl", *lines), tmp_path / "out"
    spec = json.dumps({"path": "x", "tokenizer": "t", "format": "chat", "valid": 0.1})
    words = [str(path), "--spec", spec, "--tokenizer", "bytes", "--out", str(out)]

    def writing():
        """A process that packs, from the moment it writes."""
        process = subprocess.Popen([sys.executable, "-m", "rwkvpipe.pack", *words], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / ".pack").exists():
            time.sleep(0.002)
        return process

    out.mkdir()
    process, begun = writing(), time.monotonic()
    assert process.wait() == 0
    seconds, whole = time.monotonic() - begun, contents(out)
    assert len(whole) == 7
    for share in (random.uniform(0, 0.4), random.uniform(0.4, 0.8), random.uniform(0.8, 1.0)):
        process = writing()
        time.sleep(seconds * share)
        process.kill()
        process.wait()
        left = contents(out)
        assert {name: whole[name] for name in left if not name.startswith(".")} == {
            name: data for name, data in left.items() if not name.startswith(".")
        }
        pack.main(words)
        assert contents(out) == whole


def test_a_pack_that_fails_at_its_end_is_no_pack(tmp_path, monkeypatch):
    run(tmp_path, rows(tmp_path / "a.jsonl", {"text": "x"}))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "write_index", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path, rows(tmp_path / "a.jsonl", {"text": "other"}))
    assert not (tmp_path / "out/corpus.json").exists() and not list((tmp_path / "out").glob(".*"))


def test_bytes_do_not_depend_on_the_order_of_sets(tmp_path):
    talks = ({"question": f"{chr(200 + n)} {n}?", "answer": chr(300 + n)} for n in range(40))
    path = rows(tmp_path / "a.jsonl", *talks)
    program = "import sys; from rwkvpipe import pack, vocab; a, b = sys.argv[1:3]; "
    program += "vocab.main([a, '--spec', sys.argv[3], '--out', b]); "
    program += "pack.main([a, '--spec', sys.argv[4], '--tokenizer', b, '--out', b])"
    learned = json.dumps({"kind": "trie", "corpora": ["a"]})
    packed = json.dumps({"path": "a", "tokenizer": "t", "format": "chat", "valid": 0.2})
    for seed in ("1", "2"):
        words = [sys.executable, "-c", program, str(path), str(tmp_path / seed), learned, packed]
        subprocess.run(words, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    assert contents(tmp_path / "1") == contents(tmp_path / "2") and len(contents(tmp_path / "1")) == 9


def test_masks_lie_on_the_answers_tokens_whatever_the_vocabulary(tmp_path):
    words = [*(bytes([number]) for number in range(128)), b"\n\n", b": ", b" y", b"es", b"?\n\n", b".\n"]
    turns = ("system", "be kind"), ("user", "so?\n\n\nok?"), ("assistant", "yes."), ("user", "no?"), ("assistant", ".")
    talk = [{"role": role, "content": content} for role, content in turns]
    tokenizer = TrieTokenizer(dict(enumerate(words, 1)))
    path = rows(tmp_path / "a.jsonl", {"messages": talk}, {"question": "a?", "answer": "es"})
    train, _ = run(tmp_path, path, tokenizer=tokenizer, format="chat")
    said = []
    for start, end in train.documents.tolist():
        ids, mask = train.tokens(start, end - start), train.mask(start, end - start)
        said.append(tokenizer.decode(ids[mask == 1]))
    assert said == [" yes.\n\n .\n\n", " es\n\n"]
    assert tokenizer.decode(train.tokens(0, train.documents[0, 1])) == (
        "System: be kind\n\nUser: so?\nok?\n\nAssistant: yes.\n\nUser: no?\n\nAssistant: .\n\n"
    )


def test_a_character_outside_a_learned_vocabulary_is_named_with_line_and_remedy(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    vocab.main([str(tmp_path / "a.txt"), "--spec", '{"kind": "trie", "corpora": ["a"]}', "--out", str(tmp_path / "v")])
    path = rows(tmp_path / "b.jsonl", {"question": "a", "answer": "b"}, {"question": "a", "answer": "cab é"})
    spec = json.dumps({"path": "x", "tokenizer": "t", "format": "chat"})
    with pytest.raises(DataError) as caught:
        pack.main([str(path), "--spec", spec, "--tokenizer", str(tmp_path / "v"), "--out", str(tmp_path / "out")])
    assert str(caught.value) == (
        f"{path}:2: the vocabulary has no 'é' (U+00E9), character 6 of ' cab é'; learn the vocabulary from this text"
        " too, or use kind bytes; on_error: skip leaves such rows out"
    )


TEXTS = [f"line {n} " + "wörd " * (n % 23) for n in range(3000)]


def lines(folder, name="many.jsonl", texts=TEXTS):
    return rows(folder / name, *({"text": text} for text in texts))


@pytest.mark.parametrize("kind", ["lines", "parquet", "arrow"])
def test_bytes_do_not_depend_on_the_number_of_workers_or_the_size_of_units(tmp_path, kind, monkeypatch):
    path = lines(tmp_path)
    if kind != "lines":
        import pyarrow as pa
        from pyarrow import parquet

        content, path = pa.Table.from_pylist([{"text": text} for text in TEXTS]), tmp_path / kind
        if kind == "parquet":
            parquet.write_table(content, path, row_group_size=400)
        else:
            with pa.ipc.new_file(str(path), content.schema) as sink:
                sink.write_table(content, max_chunksize=400)
    made = []
    for workers, size in ((1, 1 << 22), (1, 5000), (2, 20000), (3, 7000)):
        monkeypatch.setattr(table, "UNIT", size)
        run(tmp_path, path, "--workers", workers, valid=0.1)
        made.append(contents(tmp_path / "out"))
    assert made[0] == made[1] == made[2] == made[3] and len(made[0]) == 5
    said = json.loads(made[0]["corpus.json"])
    assert said["inputs"][0]["sha256"] == digest(path) and said["bytes"] == sum(len(t.encode()) for t in TEXTS)


def test_the_first_bad_row_of_the_file_is_named_whoever_finds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "UNIT", 3000)
    path = lines(tmp_path)
    broken = path.read_text().splitlines()
    for number in (700, 1400, 2900):
        broken[number] = '{"text": 1}'
    path.write_text("\n".join(broken))
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"many.jsonl:701: `text` is int 1"):
            run(tmp_path, path, "--workers", workers)
        assert not (tmp_path / "out").exists()


def test_large_lines_are_held_by_one_process_at_a_time_and_a_bad_one_stops_nobody_else(tmp_path):
    path = tmp_path / "large.jsonl"
    texts = [letter * (LARGE + 100_000) for letter in "abcd"]
    path.write_text("".join(json.dumps({"text" if text[0] != "b" else "words": text}) + "\n" for text in texts))
    with pytest.raises(DataError, match=r"large.jsonl:2: "):
        run(tmp_path, path, "--workers", 2)
    train, about = run(tmp_path, path, "--workers", 2, on_error="skip")
    assert about["skipped"] == 1
    for letter, (start, end) in zip("acd", train.documents, strict=True):
        ids = train.tokens(start, end - start)
        assert len(ids) == LARGE + 100_001 and (ids[:-1] == ord(letter) + 1).all() and ids[-1] == 0


def test_a_turn_is_waited_for_and_left_by_whoever_has_it():
    first, second = Turn(), Turn()
    first.take()
    first.lock = second.lock = threading.Lock()  # alone before, nobody waited
    first.take()
    first.take()
    second.leave()  # not its own
    waiting = threading.Thread(target=second.take)
    waiting.start()
    assert first.lock.locked() and not second.had
    first.leave()
    waiting.join()
    assert second.had and not first.had
    second.leave()
    assert not second.lock.locked()


def test_bad_rows_are_skipped_counted_and_listed(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(table, "UNIT", 40)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text"\n\n{"text": "b"}\n{"text": null}\n{"text": "\xff"}\n{"text": "aab"}\n')
    train, about = run(tmp_path, path, tokenizer=TrieTokenizer({1: b"a"}), on_error="skip")
    assert train.tokens(0, len(train)).tolist() == [1, 0] and about["skipped"] == 5
    listed = [json.loads(line)["error"] for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [error.split(": ")[0] for error in listed] == [f"{path}:{n}" for n in (2, 4, 5, 6, 7)]
    assert "5 rows left out, listed in skipped.jsonl" in caplog.text
    run(tmp_path, rows(tmp_path / "b.jsonl", {"text": "a"}, {"text": "b"}), on_error="skip")
    assert not (tmp_path / "out/skipped.jsonl").exists()


def test_equal_documents_are_counted_and_dropped_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "UNIT", 60)
    path = rows(tmp_path / "a.jsonl", *({"text": text} for text in "abacabbd"))
    train, about = run(tmp_path, path)
    assert texts(train) == list("abacabbd") and about["duplicates"] == 4 and about["duplicates_dropped"] == 0
    train, about = run(tmp_path, path, "--workers", 2, duplicates="drop")
    assert texts(train) == list("abcd") and about["duplicates_dropped"] == 4 and about["documents"] == 4
    other = rows(tmp_path / "b.jsonl", {"text": "a"}, {"text": "z"})
    run(tmp_path, path, "--valid", other, valid_path="b", duplicates="drop")
    assert texts(Binidx(tmp_path / "out/valid")) == ["z"]


def test_a_corpus_says_what_it_is(tmp_path):
    _, about = run(tmp_path, rows(tmp_path / "a.jsonl", *({"text": "ä" * n} for n in (1, 2, 2, 30))))
    assert about["tokens"] == 74 and about["bytes"] == 70 and about["bytes_per_token"] == 0.9459
    assert [(b["from"], b["to"], b["documents"]) for b in about["lengths"] if b["documents"]] == [
        (2, 3, 1), (4, 7, 2), (32, 63, 1)
    ]  # fmt: skip
    assert about["longest"][0] == {"tokens": 61, "origin": f"{tmp_path}/a.jsonl:4"} and len(about["longest"]) == 4


def test_a_limit_takes_the_first_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "UNIT", 100)
    train, about = run(tmp_path, lines(tmp_path), limit=25)
    assert texts(train) == TEXTS[:25] and about["documents"] == 25


def test_adding_files_moves_no_document_across(tmp_path):
    (tmp_path / "in").mkdir()
    lines(tmp_path, "in/b.jsonl")
    run(tmp_path, tmp_path / "in", valid=0.1)
    before = {part: set(texts(Binidx(tmp_path / f"out/{part}"))) for part in ("train", "valid")}
    lines(tmp_path, "in/a.jsonl", [f"new {n}" for n in range(500)])
    run(tmp_path, tmp_path / "in", valid=0.1)
    for part, there in before.items():
        assert there < set(texts(Binidx(tmp_path / f"out/{part}")))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["text", "chat"])
def test_a_killed_pack_goes_on_where_it_was(tmp_path, monkeypatch, caplog, format):
    caplog.set_level("INFO")
    monkeypatch.setattr(table, "UNIT", 5000)
    monkeypatch.setattr(growing, "EVERY", 0.0)
    path = lines(tmp_path)
    settings = {"valid": 0.1, "duplicates": "drop", "on_error": "skip", "format": format}
    if format == "chat":  # half of which weigh as ever
        said = [{"role": "assistant", "content": f"{n}" * 40, "weight": max(1, n % 200 - 100) / 4} for n in range(900)]
        rows(path, *({"messages": [turn]} for turn in said))
    path.write_text(path.read_text() + path.read_text() + "bad\n")
    run(tmp_path, path, **settings)
    whole = contents(tmp_path / "out")
    add = packing.Packing.add

    for moment, workers in ((1, 1), (7, 1), (30, 2)) if format == "text" else ((12, 1),):
        left = iter(range(moment))

        def dies(self, parcel, left=left):
            if next(left, None) is None:
                self.files.append("train.bin", b"half a piece")
                raise KeyboardInterrupt
            add(self, parcel)

        with monkeypatch.context() as patch:
            patch.setattr(packing.Packing, "add", dies)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path, path, **settings)
        caplog.clear()
        run(tmp_path, path, "--workers", workers, **settings)
        assert f"going on after {moment} pieces" in caplog.text
        assert contents(tmp_path / "out") == whole


def test_a_file_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    path = lines(tmp_path)
    add = packing.Packing.add

    def meddling(self, parcel):
        path.write_text('{"text": "other"}')
        add(self, parcel)

    monkeypatch.setattr(packing.Packing, "add", meddling)
    with pytest.raises(DataError, match="many.jsonl: changed while it was packed"):
        run(tmp_path, path)


def test_one_line_without_end_takes_linear_time_and_is_whole(tmp_path):
    for text in ("a" * 1_500_000, "QUJD" * 300_000, "\u4e2d" * 400_000):
        train, _ = run(tmp_path, rows(tmp_path / "a.jsonl", {"text": text}, {"text": "end"}))
        assert texts(train) == [text, "end"]


def test_a_long_text_says_how_far_it_is(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(pace, "EVERY", -1.0)
    (tmp_path / "a.txt").write_text("word " * 1_500_000)
    run(tmp_path, tmp_path / "a.txt")
    for what in ("its digest: 1 of 8 MB, ", "read: 1 of 8 MB, "):
        assert f"a.txt: {what}" in caplog.text


def test_a_pair_is_used_where_it_lies(tmp_path):
    run(tmp_path, lines(tmp_path), valid=0.1)
    (tmp_path / "out").rename(tmp_path / "given.v1")
    given = tmp_path / "given.v1"
    train, about = run(tmp_path, given / "train.bin", "--valid", given / "valid", valid_path="x", format="binidx")
    assert (tmp_path / "out/train.bin").is_symlink() and (tmp_path / "out/valid.idx").is_symlink()
    assert sorted(texts(train) + texts(Binidx(tmp_path / "out/valid"))) == sorted(TEXTS)
    told = json.loads((given / "corpus.json").read_text())
    assert all(about[key] == told[key] for key in ("documents", "tokens", "train", "valid", "lengths"))
    run(tmp_path, given / "valid", format="binidx")
    assert len(Binidx(tmp_path / "out/valid")) == 0
    run(tmp_path, lines(tmp_path, "few.jsonl", ["one"]))  # what replaces links leaves the pair alone
    assert len(Binidx(given / "train")) == told["train"]["tokens"]
    with pytest.raises(DataError, match="none.idx: no such file"):
        run(tmp_path, tmp_path / "none", format="binidx")
    with pytest.raises(ConfigError, match="used as it is: valid, duplicates cannot be"):
        run(tmp_path, given / "train", format="binidx", valid=0.1, duplicates="drop")


def test_an_id_of_a_given_pair_that_no_token_owns_is_named(tmp_path):
    for name, dtype, ids, wrong in (
        ("small", np.uint16, [1, 0, 5, 3], "token 4 is the id 3"),
        ("large", np.int32, [1, 5, 70000, 6], "token 4 is the id 6"),
        ("below", np.int32, [1, -1], "token 2 is the id -1"),
    ):
        with BinidxWriter(tmp_path / name, dtype) as writer:
            writer.add(ids)
        trie = TrieTokenizer({1: b"a", 5: b"b", 70000: b"c"} if dtype == np.int32 else {1: b"a", 5: b"b"})
        with pytest.raises(DataError, match=f"{name}.bin: {wrong}, which stands for nothing in the vocabulary"):
            run(tmp_path, tmp_path / name, tokenizer=trie, format="binidx")
    assert not (tmp_path / "out/corpus.json").exists()


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (bytes([1, 0, 1]), "has 3 bytes, but 4 tokens"),
        (bytes([1, 0, 7, 1]), "token 3 has the byte 7; a byte is 0 or 1, and other weights are fp32 numbers"),
        (np.array([1, 0.5, -1, 0], "<f4").tobytes(), "holds what is no number from 0 up near token 0"),
        (np.array([1, 0.5, np.nan, 0], "<f4").tobytes(), "holds what is no number from 0 up near token 0"),
    ],
)
def test_marks_of_a_given_pair_that_are_none_are_refused_before_anything_is_written(tmp_path, mask, says):
    with BinidxWriter(tmp_path / "pair", np.uint16) as writer:
        writer.add([1, 0, 5, 1])
    (tmp_path / "pair.mask").write_bytes(mask)
    trie = TrieTokenizer({1: b"a", 5: b"b"})
    with pytest.raises(DataError, match=f"pair.mask: {says}"):
        run(tmp_path, tmp_path / "pair", tokenizer=trie, format="binidx")
    assert not list((tmp_path / "out").glob("*"))


def pairs(folder, masked=False):
    """Two packed corpora of talks or texts, and their texts."""
    spec = {"format": "chat"} if masked else {}
    for number in range(2):
        run(folder, synthetic=f"counting.{'chats' if masked else 'documents'}", count=5, seed=number, **spec)
        (folder / "out").rename(folder / f"given{number}")
    return [texts(Binidx(folder / f"given{number}/train")) for number in range(2)]


@pytest.mark.parametrize("masked", [False, True])
def test_several_pairs_are_read_where_they_lie_or_copied_into_one(tmp_path, masked):
    given = [part for parts in pairs(tmp_path, masked) for part in parts]
    both = [tmp_path / "given0/train", tmp_path / "given1/train.bin"]
    train, about = run(tmp_path, *both, format="binidx", path=[str(path) for path in both])
    assert texts(train) == given and about["documents"] == 10 and about["tokens"] == len(train)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "corpus.json", "train.idx", "train.parts", "valid.idx", "valid.parts"
    ]  # fmt: skip
    assert len(Binidx(tmp_path / "out/valid")) == 0 and train.masked == masked
    marks = train.mask(0, len(train)).tolist() if masked else None
    run(tmp_path, tmp_path / "given*/train.idx", "--valid", both[0], format="binidx", valid_path="x")
    assert texts(Binidx(tmp_path / "out/train")) == given and len(Binidx(tmp_path / "out/valid")) > 0
    copied, _ = run(tmp_path, *both, format="binidx", path=["a", "b"], join="copy")
    assert not (tmp_path / "out/train.bin").is_symlink() and not (tmp_path / "out/train.parts").exists()
    assert texts(copied) == given and (not masked or copied.mask(0, len(copied)).tolist() == marks)
    linked, _ = run(tmp_path, both[0], format="binidx")
    assert texts(linked) == given[:5] and (tmp_path / "out/train.mask").is_symlink() == masked
    run(tmp_path, tmp_path / "given0", format="binidx")  # a folder's pairs: train and an empty valid
    assert texts(Binidx(tmp_path / "out/train")) == given[:5]


def test_a_pair_that_changes_after_it_was_joined_is_named(tmp_path):
    pairs(tmp_path)
    both = [tmp_path / "given0/train", tmp_path / "given1/train"]
    run(tmp_path, *both, format="binidx", path=["a", "b"])
    for suffix in ("bin", "idx"):
        (tmp_path / f"given0/train.{suffix}").write_bytes((tmp_path / f"given1/valid.{suffix}").read_bytes())
    with pytest.raises(DataError, match="train.parts: its pairs are others than when they were joined"):
        Binidx(tmp_path / "out/train")
    with pytest.raises(ConfigError, match="one path, please: a folder or a glob means many"):
        run(tmp_path, *both)
