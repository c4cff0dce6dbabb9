"""A tokenizer's folder is made of its settings and of what the corpora hold."""

import json

import numpy as np
import pytest

from rwkvpipe import vocab
from rwkvpipe.base.config import TokenizerConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.data.synthetic import SYNTHETIC, generate
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.load import load_tokenizer
from rwkvpipe.tokenizer.trie import write_vocab


def run(folder, *words, **spec):
    # all defaults are filled in, as the workflow does it
    spec = TokenizerConfig(**spec).model_dump(mode="json")
    vocab.main([*map(str, words), "--spec", json.dumps(spec), "--out", str(folder / "out")])
    return load_tokenizer(folder / "out")


def test_bytes_and_numbers_need_no_file(tmp_path):
    assert run(tmp_path, kind="bytes", offset=0).size == 256
    assert run(tmp_path, kind="bytes").encode("a") == [98]
    assert run(tmp_path, kind="integer", size=10).encode("9") == [10]
    with pytest.raises(ConfigError, match="kind bytes learns from no such corpus"):
        run(tmp_path, "--synthetic", "counting.chats:1:2", kind="bytes")


def test_numbers_that_are_too_large_to_be_kept_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[3, 2**31 - 2]]))
    assert run(tmp_path, tmp_path / "a.npy", kind="integer", corpora=["a"]).size == 2**31
    np.save(tmp_path / "b.npy", np.array([[2**31 - 1]]))
    with pytest.raises(DataError, match="b.npy: a number of 2,147,483,647; they may go up to 2,147,483,646"):
        run(tmp_path, tmp_path / "a.npy", tmp_path / "b.npy", kind="integer", corpora=["a"])
    with pytest.raises(ValueError, match="size"):
        run(tmp_path, kind="integer", size=2**31)


def test_numbers_end_with_the_largest_of_the_corpora(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1, 41, 3], [0, 2, 7]]))
    (tmp_path / "b.jsonl").write_text('{"id": 900, "walk": [5, 40]}\n{"id": 901, "walk": [6], "steps": [[12], []]}\n')
    assert run(tmp_path, tmp_path / "a.npy", kind="integer", corpora=["a"]).size == 43
    assert run(tmp_path, tmp_path / "b.jsonl", kind="integer", corpora=["b"]).size == 42
    assert run(tmp_path, tmp_path / "a.npy", tmp_path / "b.jsonl", kind="integer", corpora=["a", "b"]).encode("41") == [
        42
    ]
    (tmp_path / "c.txt").write_text("41 words")
    (tmp_path / "d.jsonl").write_text('{"id": 900, "text": "7"}\n')
    for name in ("c.txt", "d.jsonl"):
        with pytest.raises(DataError, match=f"{name}: no row of whole numbers in it"):
            run(tmp_path, tmp_path / name, kind="integer", corpora=["c"])
    np.save(tmp_path / "e.npy", np.array([[1, -1]]))
    with pytest.raises(DataError, match="e.npy:.*holds -1"):
        run(tmp_path, tmp_path / "e.npy", kind="integer", corpora=["e"])


def test_characters_are_numbered_in_order(tmp_path):
    (tmp_path / "a.txt").write_text("zebra ö")
    tokenizer = run(tmp_path, tmp_path / "a.txt", kind="trie", corpora=["a"])
    words = [tokenizer.entries[number].decode() for number in range(1, tokenizer.size)]
    assert words == sorted(set("zebra ö" + "System: User: Assistant: \n"))
    again = (tmp_path / "out/vocab.txt").read_bytes()
    run(tmp_path, tmp_path / "a.txt", kind="trie", corpora=["a"])
    assert (tmp_path / "out/vocab.txt").read_bytes() == again


@pytest.mark.parametrize("family", sorted({name.partition(".")[0] for name in SYNTHETIC}))
def test_what_is_learned_from_made_corpora_writes_their_talks_and_other_exams(tmp_path, family):
    names = [name for name in SYNTHETIC if name.startswith(f"{family}.") and not name.endswith(".exam")]
    words = [word for name in names for word in ("--synthetic", f"{name}:1:300")]
    tokenizer = run(tmp_path, *words, kind="trie", corpora=["a"])
    for name in (*names, f"{family}.exam"):
        for document in generate(name, 2, 100):
            if document.text is not None:
                assert tokenizer.decode(tokenizer.encode(document.text)) == document.text
                continue
            ids, mask = chat.render(document.talk(), tokenizer)
            assert tokenizer.decode(ids) == chat.text(document.talk()) and len(mask) == len(ids)
            tokenizer.encode(chat.prompt(document.talk()[:1]) + "".join(f" {o}" for o in document.options or ()))


def test_every_row_can_be_encoded_whatever_its_columns(tmp_path):
    row = {"q": "Ä?", "choices": ["→", "x"], "gold": 1, "n": 34567}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "b.txt").write_text("Ω")
    tokenizer = run(tmp_path, tmp_path / "a.jsonl", tmp_path / "b.txt", kind="trie", corpora=["a", "b"])
    assert tokenizer.decode(tokenizer.encode("User: Ä? → 34567 Ω\n\n")) == "User: Ä? → 34567 Ω\n\n"


def test_a_vocabulary_file_is_taken_over(tmp_path):
    write_vocab(tmp_path / "words.txt", {1: b"one", 5: b"\xff"})
    tokenizer = run(tmp_path, tmp_path / "words.txt", kind="trie", path="words.txt")
    assert tokenizer.entries == {1: b"one", 5: b"\xff"} and tokenizer.size == 6
    (tmp_path / "words.txt").write_text("1 one 3\n")
    with pytest.raises(DataError, match="words.txt:1: "):
        run(tmp_path, tmp_path / "words.txt", kind="trie", path="words.txt")


@pytest.mark.parametrize("made", ["counting.chats", "counting.chats:1", "counting.chats:x:2", "counting.chats:1:-2"])
def test_made_corpora_are_named_with_seed_and_count(tmp_path, made):
    with pytest.raises(ConfigError, match="is not name:seed:count"):
        run(tmp_path, "--synthetic", made, kind="trie", corpora=["a"])


def test_what_does_not_fit_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="no character"):
        run(tmp_path, tmp_path / "a.txt", kind="trie", corpora=["a"])
    with pytest.raises(ConfigError, match="neither a file nor --synthetic"):
        run(tmp_path, kind="trie", corpora=["a"])
    with pytest.raises(ConfigError, match="one vocabulary file"):
        run(tmp_path, tmp_path / "a.txt", tmp_path / "a.txt", kind="trie", path="a.txt")
    with pytest.raises(ConfigError, match="did you mean counting.chats"):
        run(tmp_path, "--synthetic", "counting.chat:1:1", kind="trie", corpora=["a"])
    assert not (tmp_path / "out").exists()


def test_world_is_taken_from_the_package_or_a_file_and_checked(tmp_path):
    tokenizer = run(tmp_path, kind="world")
    assert tokenizer.size == 65536 and tokenizer.encode("Hello world") == [33155, 40213]
    write_vocab(tmp_path / "w.txt", tokenizer.entries)
    assert run(tmp_path, tmp_path / "w.txt", kind="world", path="w.txt").size == 65536
    write_vocab(tmp_path / "w.txt", {1: b"a"})
    with pytest.raises(DataError, match="not the RWKV World vocabulary"):
        run(tmp_path, tmp_path / "w.txt", kind="world", path="w.txt")


def test_pairs_are_learned_from_files_and_made_corpora(tmp_path):
    (tmp_path / "a.txt").write_text("abab abab abab " * 9)
    spec = {"kind": "bpe", "corpora": ["a"], "vocab_size": 300}
    tokenizer = run(tmp_path, tmp_path / "a.txt", "--synthetic", "counting.documents:1:50", **spec)
    assert tokenizer.size <= 300 and len(tokenizer.encode(" abab")) == 1
    first = (tmp_path / "out/bpe.json").read_bytes()
    run(tmp_path, tmp_path / "a.txt", "--synthetic", "counting.documents:1:50", **spec)
    assert (tmp_path / "out/bpe.json").read_bytes() == first
    again = run(tmp_path, tmp_path / "out/bpe.json", kind="bpe", path="bpe.json", end="<|endoftext|>")
    assert again.encode("abab") == tokenizer.encode("abab")


@pytest.mark.parametrize(
    "spec, problem",
    [
        ({"kind": "bpe"}, "kind bpe needs one of path and corpora"),
        ({"kind": "bpe", "corpora": ["a"]}, "vocab_size belongs to a bpe learned"),
        ({"kind": "bpe", "path": "a", "vocab_size": 300}, "vocab_size belongs to a bpe learned"),
        ({"kind": "trie", "path": "a", "vocab_size": 300}, "vocab_size belongs to kind bpe, this is trie"),
        ({"kind": "own"}, "needs import_path"),
        ({"kind": "world", "corpora": ["a"]}, "corpora belongs to kind trie or bpe"),
        ({"kind": "bytes", "options": {"a": 1}}, "options belongs to kind own"),
    ],
)
def test_keys_belong_to_their_kinds(tmp_path, spec, problem):
    with pytest.raises(ConfigError, match=problem):
        vocab.main(["--spec", json.dumps(spec), "--out", str(tmp_path / "out")])


def test_a_class_of_the_user_s_is_written_down_by_name(tmp_path, monkeypatch):
    code = "class Bits:\n    size, eos = 2, None\n    encode = staticmethod(lambda text: [int(c) for c in text])\n"
    (tmp_path / "own_bits.py").write_text(code + "    decode = staticmethod(lambda ids: ''.join(map(str, ids)))\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert run(tmp_path, kind="own", import_path="own_bits:Bits").encode("0110") == [0, 1, 1, 0]
    assert json.loads((tmp_path / "out/tokenizer.json").read_text())["import_path"] == "own_bits:Bits"


def test_pairs_are_learned_from_a_bounded_sample_taken_from_everywhere():
    found = [f"text {number} " * 50 for number in range(1000)] + ["long words " * 50_000, "QUJD" * 9000]
    size = sum(map(len, found))
    some = list(vocab.sampled(found, size, 200_000))
    assert 120_000 < sum(map(len, some)) <= 200_000 and some == list(vocab.sampled(found, size, 200_000))
    numbers = [int(text.split()[1]) for text in some if text.startswith("text")]
    assert numbers[0] < 20 and numbers[-1] > 980 and any("long words" in text for text in some)
    whole = list(vocab.sampled(found, size, 10 * size))
    assert "".join(whole[:1000]) == "".join(found[:1000]) and whole[-1] == "QUJD" * 32


def test_pairs_are_learned_from_folders_and_the_sample_is_a_setting(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / f"in/{name}.txt").write_text(f"{name}b{name}b " * 99)
    spec = {"kind": "bpe", "corpora": ["a"], "vocab_size": 300}
    tokenizer = run(tmp_path, tmp_path / "in", sample=1, **spec)
    assert len(tokenizer.encode(" abab")) == 1 and len(tokenizer.encode(" bbbb")) == 1
    with pytest.raises(ValueError, match="sample belongs to a bpe learned from corpora"):
        TokenizerConfig(kind="bpe", path="x", sample=3)
