"""Gigatoken gives the ids of the library tokenizers, or is refused."""

import json
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from rwkvpipe import pack
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.tokenizer.bpe import BpeTokenizer, learn
from rwkvpipe.tokenizer.load import load_engine, load_tokenizer, save_tokenizer
from rwkvpipe.tokenizer.quick import Gigatoken

pytest.importorskip("gigatoken", reason="the extra `bpe` is not installed")
TEXTS = ["the cat sat on the mat", "the dog sat on the log\n\n", "今天天气很好"] * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("bpe")
    (home / "bpe.json").write_text(learn(TEXTS, 280))
    save_tokenizer(home, BpeTokenizer(home / "bpe.json"))
    return home


@pytest.fixture(scope="module")
def both(folder):
    return load_tokenizer(folder), load_engine(folder, "gigatoken")


def test_each_engine_tells_its_name(both):
    assert [tokenizer.engine for tokenizer in both] == ["tokenizers", "gigatoken"]


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])) | st.sampled_from(TEXTS), max_size=6))
def test_any_texts_have_the_same_ids(both, texts):
    slow, quick = both
    data = [text.encode() for text in ("a", *texts, "x<|endoftext|>y")]
    ends = np.cumsum([len(text) for text in data])
    given = (np.frombuffer(b"".join(data), np.uint8), ends - [len(text) for text in data], ends)
    for mine, theirs in zip(quick.encode_all(*given), slow.encode_all(*given), strict=True):
        assert mine.tolist() == theirs.tolist()
    assert all(quick.encode(text) == slow.encode(text) for text in texts)


def test_a_pack_has_the_same_bytes_with_any_number_of_workers(folder, tmp_path):
    corpus = tmp_path / "text.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{n} {TEXTS[n % 3]}"}) + "\n" for n in range(300)))
    spec = json.dumps({"path": str(corpus), "tokenizer": "words", "valid": 0.2})
    made = []
    for engine, workers in (("tokenizers", 1), ("gigatoken", 1), ("gigatoken", 2)):
        out = tmp_path / f"{engine}{workers}"
        call = ["--spec", spec, "--tokenizer", str(folder), "--bpe-engine", engine, "--workers", str(workers)]
        pack.main([*call, "--out", str(out)])
        made.append([(out / name).read_bytes() for name in ("train.bin", "train.idx", "valid.bin", "corpus.json")])
    assert made[0] == made[1] == made[2]


def test_other_ids_than_the_library_are_refused(folder):
    described = json.loads((folder / "bpe.json").read_text())
    with pytest.raises(ConfigError, match="other ids than"):
        Gigatoken(described, folder / "bpe.json", lambda text: [1, 2, 3])
    engine = Gigatoken(described, folder / "bpe.json", load_tokenizer(folder).encode)
    engine._encode = lambda text: []
    with pytest.raises(ConfigError, match="other ids than"):
        engine.encode_all([b"a text", b"another"])


def test_a_vocabulary_that_is_not_of_bytes_is_refused(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="not a vocabulary of all bytes"):
        load_engine(tmp_path, "gigatoken")


def test_a_vocabulary_that_it_does_not_read_is_refused(folder, tmp_path):
    described = json.loads((folder / "bpe.json").read_text())
    described["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "x(?=y)|[^z]+?z"}, "behavior": "Isolated"}
    described["pre_tokenizer"] |= {"invert": False}
    described["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            described["pre_tokenizer"],
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="--bpe-engine gigatoken: it"):
        load_engine(tmp_path, "gigatoken")


def test_without_the_package_one_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(ConfigError, match=r"pip install 'rwkvpipe\[bpe\]'"):
        load_engine(folder, "gigatoken")


def test_vocabularies_of_other_kinds_are_left_as_they_are():
    assert load_engine("bytes", "gigatoken").encode("a") == [97]
