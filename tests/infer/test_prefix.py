"""What texts begin with alike is read once, and nothing comes out differently for it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rwkvpipe.base.config import RwkvConfig, SamplingConfig
from rwkvpipe.infer import prefix
from rwkvpipe.infer.engine import Engine
from rwkvpipe.infer.prefix import Header, States, common, headers
from rwkvpipe.model.family import build
from rwkvpipe.model.layers import State
from rwkvpipe.tokenizer.byte import ByteTokenizer

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    found = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=257))
    found.initialise(0)
    with torch.no_grad():
        for value in found.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return found.eval()


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_what_two_texts_have_in_common_leaves_each_a_token(first, second):
    found = common(first, second)
    assert first[:found] == second[:found]
    most = min(len(first), len(second)) - 1
    assert found == max(most, 0) or (found < most and first[found] != second[found]) or most <= 0 == found


@given(TEXTS, st.integers(1, 8))
def test_every_text_has_one_place_under_headers_it_begins_with(texts, saved):
    old = prefix.SAVED, prefix.LEAST
    prefix.SAVED, prefix.LEAST = saved, 1
    try:
        root = headers(texts)
    finally:
        prefix.SAVED, prefix.LEAST = old
    seen = []

    def walk(header: Header, above: list[int]) -> None:
        start = texts[header.example][: header.depth]
        assert start[: len(above)] == above
        assert len(header.rows) + len(header.below) >= 1
        for n in header.rows:
            assert texts[n][: header.depth] == start
            assert len(texts[n]) > header.depth
        seen.extend(header.rows)
        for child in header.below:
            assert child.depth > header.depth
            walk(child, start)

    walk(root, [])
    assert sorted(seen) == list(range(len(texts)))


def counted(network, monkeypatch) -> list[int]:
    read, plain = [], network.features

    def features(ids, state=None, lengths=None):
        read.append(ids.numel() if lengths is None else int(lengths.sum()))
        return plain(ids, state, lengths)

    monkeypatch.setattr(network, "features", features)
    return read


def test_a_header_of_many_questions_is_read_once(network, monkeypatch):
    header = "Question: how much is one and one? Answer: two. " * 4
    pairs = [(header + f"Question: {n}? Answer:", f" {option}") for n in range(20) for option in "ab"]
    engine = Engine(network, ByteTokenizer(1), 5)
    read = counted(network, monkeypatch)
    found = engine.loglikelihood(pairs)
    assert sum(read) < len(header) + 20 * 40
    monkeypatch.setattr(prefix, "SAVED", 10**9)
    read.clear()
    assert engine.loglikelihood(pairs) == pytest.approx(found, abs=1e-4)
    assert sum(read) > 20 * len(header)


def test_headers_within_headers_give_the_same_completions(network, monkeypatch):
    prompts = [f"{'a' * 90}{'bc'[n % 2] * 70}{n}" for n in range(8)] + ["a" * 90, "a" * 200, "zz", "zz"]
    sampling = SamplingConfig(temperature=0.9, max_tokens=10, stop=(), seed=2)
    shared = {(c.prompt, c.sample): c for c in Engine(network, ByteTokenizer(1), 3).generate(prompts, sampling, 2)}
    monkeypatch.setattr(prefix, "SAVED", 10**9)
    for one in Engine(network, ByteTokenizer(1), 3).generate(prompts, sampling, 2):
        assert shared[one.prompt, one.sample].ids == one.ids
    assert shared[10, 0].ids != shared[11, 0].ids  # equal prompts draw from streams of their own


def test_a_talk_that_goes_on_reads_only_what_is_new(network, monkeypatch):
    engine, kept = Engine(network, ByteTokenizer(1), 1), States()
    sampling = SamplingConfig(temperature=0.0, max_tokens=12, stop=())
    prompt = "Once there was a king. " * 5
    answer = "".join(engine.stream(prompt, sampling, kept=kept))
    longer = prompt + answer + " And then?"
    wanted = "".join(engine.stream(longer, sampling))
    read = counted(network, monkeypatch)
    assert "".join(engine.stream(longer, sampling, kept=kept)) == wanted
    if "\ufffd" not in answer:
        assert read[0] < 40


def test_what_is_in_common_with_known_texts_is_found():
    kept, state = States(), State([torch.zeros(1, 4)], [torch.zeros(1, 1, 4, 4)], [torch.zeros(1, 4)])
    kept.add(range(40), state)
    kept.add([*range(30), 7, 7], state)
    assert kept.alike([*range(35), 9]) == 35
    assert kept.alike(list(range(30))) == 29  # a token at least is left to read
    assert kept.alike([5, *range(1, 40)]) == 0


def test_the_oldest_states_go_first():
    def state() -> State:
        return State([torch.zeros(1, 4)], [torch.zeros(1, 1, 4, 4)], [torch.zeros(1, 4)])

    kept = States(3 * state().nbytes)
    for n in range(3):
        kept.add([n, 0], state())
    assert kept.find([0, 0, 5])[0] == 2  # now the newest
    kept.add([9, 0], state())
    assert list(kept) == [(2, 0), (0, 0), (9, 0)]
    assert kept.find([1, 0, 5]) == (0, None)
    assert kept.find([9, 0]) == (0, None)  # a token at least is left to read
    assert kept.size == 3 * state().nbytes
