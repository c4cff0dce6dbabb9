"""Byte pair encoding takes any bytes and gives them back; what others learned is read with their ids."""

import json
import random

import numpy as np
import pytest
import tokenizers

from rwkvpipe.base.errors import DataError
from rwkvpipe.tokenizer import bpe
from rwkvpipe.tokenizer.bpe import BpeTokenizer, learn
from rwkvpipe.tokenizer.load import load_tokenizer, save_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log\n\n", "今天天气很好"] * 5


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    path.write_text(learn(TEXTS, 280))
    return BpeTokenizer(path)


def test_what_is_learned_has_every_byte_and_an_end(learned):
    assert (learned.size, learned.eos, learned.end) == (280, 0, "<|endoftext|>")
    assert len(learned.encode("the cat")) < 7
    assert all(learned.owns(number) for number in range(1, 280)) and not learned.owns(0) and not learned.owns(280)


def test_any_bytes_come_back(learned):
    lots = random.Random(3)
    for _ in range(300):
        data = lots.randbytes(lots.randrange(40)) + lots.choice(TEXTS).encode()[lots.randrange(9) :]
        ids = learned.encode(data)
        assert learned.decode_bytes(ids) == data == b"".join(learned.decode_bytes([n]) for n in ids)
    assert learned.decode([*learned.encode("天"), 0][:-2]).endswith("\ufffd") or len(learned.encode("天")) == 1


def test_text_and_its_bytes_have_the_same_ids(learned):
    for text in (*TEXTS, "", " x\r\n\0"):
        assert learned.encode(text) == learned.encode(text.encode())


def test_text_that_looks_like_the_end_is_text(learned):
    ids = learned.encode("a<|endoftext|>b")
    assert 0 not in ids and learned.decode([*ids, 0]) == "a<|endoftext|>b"


def test_learning_again_gives_the_same_file(learned):
    assert learn(TEXTS, 280) == learned.json


def test_a_foreign_id_and_half_a_pair_are_refused(learned):
    with pytest.raises(DataError, match="id 280 stands for nothing in a vocabulary of 280"):
        learned.decode([5, 280])
    with pytest.raises(DataError, match="surrogate"):
        learned.encode("\ud800")


def test_too_few_ids_and_no_text_are_refused():
    with pytest.raises(DataError, match="vocab_size: 256 is too small"):
        learn(TEXTS, 256)
    with pytest.raises(DataError, match="no text"):
        learn(["", ""], 300)


def test_it_is_saved_and_loaded(tmp_path, learned):
    save_tokenizer(tmp_path, learned)
    again = load_tokenizer(tmp_path)
    assert (again.size, again.eos, again.encode(TEXTS[0])) == (280, 0, learned.encode(TEXTS[0]))


def _foreign(folder, **described):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    inner.save(str(folder / "tokenizer.json"))
    if described:
        (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return inner


def test_a_hub_s_tokenizer_json_is_read_with_its_ids_and_its_end(tmp_path, caplog):
    inner = _foreign(tmp_path)
    found = load_tokenizer(tmp_path)
    assert found.encode("the cat") == inner.encode("the cat").ids
    assert found.end == "</s>" and found.eos == 1
    with pytest.raises(DataError, match="knows only a part of 'ZZZ'"):
        found.encode("ZZZ")
    assert load_tokenizer(tmp_path / "tokenizer.json").size == found.size


@pytest.mark.parametrize("told", ["<unk>", {"content": "<unk>"}])
def test_the_end_that_a_hub_s_folder_names_is_taken(tmp_path, told):
    _foreign(tmp_path, eos_token=told)
    assert load_tokenizer(tmp_path).end == "<unk>"
    assert BpeTokenizer(tmp_path / "tokenizer.json", "</s>").eos == 1
    with pytest.raises(DataError, match="end: .* has no token 'zz'"):
        BpeTokenizer(tmp_path / "tokenizer.json", "zz")


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"model": {"type": "Unigram"}}', "a model of type Unigram, BPE is needed"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}', "cannot read it"),
        ('{"model": 3}', "a model of type None"),
        ("{", "not JSON"),
    ],
)
def test_what_is_no_bpe_is_named(tmp_path, text, problem):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=problem):
        BpeTokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("beside", ["[1]", '"x"', '{"eos_token": ["a"]}', '{"eos_token": {"content": {}}}'])
def test_odd_settings_beside_a_tokenizer_name_no_end(tmp_path, beside):
    (tmp_path / "tokenizer.json").write_text(learn(["hello hello"], 260))
    (tmp_path / "tokenizer_config.json").write_text(beside)
    assert BpeTokenizer(tmp_path / "tokenizer.json").eos == 0


CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
CL100K += r"|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("form", ["ours", "others'", "without words"])
def test_a_text_that_comes_in_blocks_has_the_ids_of_the_whole(learned, tmp_path, monkeypatch, form):
    described = json.loads(learned.json)
    if form == "others'":
        split = {"type": "Split", "pattern": {"Regex": CL100K}, "behavior": "Isolated", "invert": False}
        level = described["pre_tokenizer"] | {"use_regex": False, "trim_offsets": True}
        described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
        described |= {"normalizer": {"type": "NFC"}, "post_processor": level}
    elif form == "without words":
        described["pre_tokenizer"] |= {"add_prefix_space": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = BpeTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.cuttable == (form != "without words")
    monkeypatch.setattr(bpe, "WINDOW", 150)
    monkeypatch.setattr(bpe, "WORD", 3000)
    lots = random.Random(7)
    signs = [" ", "  ", "\n", "\n\n", "a", "the", "'s", "天", "é", "e\u0301", "1", "2345", "!?", "\t", "\r\n", "😀"]
    for _ in range(40):
        kind = lots.randrange(3)
        text = " " * 400 + "x" * 900 + "\n" * 300 + "a b"
        if kind:
            text = "".join(lots.choices(signs, k=lots.randrange(900)))
        pieces, rest = [], text
        while rest:
            size = lots.randrange(1, 400)
            pieces.append(rest[:size].encode())
            rest = rest[size:]
        assert [number for ids in tokenizer.stream(pieces) for number in ids] == tokenizer.encode(text)


def test_a_word_without_end_is_cut_and_comes_back(learned, monkeypatch):
    monkeypatch.setattr(bpe, "WINDOW", 100)
    monkeypatch.setattr(bpe, "WORD", 400)
    text = "abc" * 1000
    assert learned.decode([n for ids in learned.stream([text.encode()]) for n in ids]) == text


def test_many_texts_have_the_ids_of_each_and_an_end(learned):
    texts = [text.encode() for text in (*TEXTS, "a<|endoftext|>b", " x\r\n\0")]
    ends = np.cumsum([len(text) for text in texts])
    starts = ends - [len(text) for text in texts]
    ids, sizes = learned.encode_all(np.frombuffer(b"".join(texts), np.uint8), starts, ends)
    assert ids.tolist() == sum(([*learned.encode(text), 0] for text in texts), []) and sizes.sum() == len(ids)
