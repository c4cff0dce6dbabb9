"""A packed corpus holds every document once, in whole files, and says what is in it."""

import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from rwkvpipe import pack, vocab
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.data.binidx import Binidx
from rwkvpipe.data.synthetic import generate
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


def test_each_document_lies_in_one_of_the_two_parts(tmp_path):
    lines = [f"document {number}" for number in range(200)]
    train, about = run(tmp_path, rows(tmp_path / "a.jsonl", *({"text": line} for line in lines)), valid=0.2)
    valid = Binidx(tmp_path / "out/valid")
    assert sorted(texts(train) + texts(valid)) == sorted(lines)
    assert 20 < len(valid.documents) < 60
    assert train.tokens(len(train) - 1, 1).tolist() == [0]
    assert about["vocab_size"] == 257 and about["documents"] == 200 and about["format"] == "text"
    assert about["tokens"] == len(train) + len(valid) and about["train"]["tokens"] == len(train)


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
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_kill_leaves_whole_files_and_the_next_run_gives_the_same_bytes(tmp_path):
    lines = ({"question": f"{number}?", "answer": "word " * (1 + number % 90)} for number in range(1500))
    path, out = rows(tmp_path / "a.jsonl", *lines), tmp_path / "out"
    spec = json.dumps({"path": "x", "tokenizer": "t", "format": "chat", "valid": 0.1})
    words = [str(path), "--spec", spec, "--tokenizer", "bytes", "--out", str(out)]

    def writing():
        """A process that packs, from the moment it writes."""
        process = subprocess.Popen([sys.executable, "-m", "rwkvpipe.pack", *words], stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(out.glob(".train.bin.*")):
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

    monkeypatch.setattr(pack.BinidxWriter, "_finish", full)
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
        " too, or use kind bytes"
    )
