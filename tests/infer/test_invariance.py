"""What comes out depends on weights, prompt, settings and numbers: not on rows, order, chunks or who is beside whom."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rwkvpipe.base.config import LoraConfig, RwkvConfig, SamplingConfig
from rwkvpipe.infer import prefix, reading
from rwkvpipe.infer.engine import Engine
from rwkvpipe.infer.row import Job
from rwkvpipe.model.family import build
from rwkvpipe.model.layers import State
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.weights import lora

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ate"]
PROMPTS = [" ".join(WORDS[: 1 + n % 8]) + "x" * (n * 7 % 23) for n in range(14)]
PRIME = 10_007


class Stub(nn.Module):
    """Logits that are a scrambled function of all ids so far, in whole numbers: exact whatever is beside a row."""

    def __init__(self, size: int = 257):
        super().__init__()
        self.config = RwkvConfig(n_layer=1, n_embd=1, head_size=1, vocab_size=size)
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokens = 0

    def features(self, ids, state=None, lengths=None):
        rows, width = ids.shape
        lengths = torch.full((rows,), width) if lengths is None else lengths
        place = torch.ones(rows, dtype=torch.float64) if state is None else state.wkv[0][:, 0, 0, 0]
        out = []
        for t in range(width):
            place = torch.where(t < lengths, (place * 31 + ids[:, t] + 7) % PRIME, place)
            out.append(place)
        self.tokens += int(lengths.sum())
        after = State([torch.zeros(rows, 1)], [place[:, None, None, None]], [torch.zeros(rows, 1)])
        return torch.stack(out, 1)[..., None], after

    def logits(self, features):
        ids = torch.arange(self.config.vocab_size, dtype=torch.float64)
        return ((features * 7919 + ids * ids * 271 + ids * 17) % 1009 / 250).float()

    def forward(self, ids, state=None, lengths=None):
        features, state = self.features(ids, state, lengths)
        return self.logits(features), state


def real(**sizes) -> nn.Module:
    found = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=257, **sizes))
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        found.initialise(1)
        for value in found.parameters():
            value.add_(torch.randn(value.shape, generator=stream) * 0.1)
    return found.eval()


def written(network, rows, sampling, order=None, samples=2, kind="fp32") -> dict:
    numbers = list(range(len(PROMPTS))) if order is None else order
    found = Engine(network, ByteTokenizer(1), rows, kind=kind).generate(
        [PROMPTS[n] for n in numbers], sampling, samples, numbers=numbers
    )
    return {(c.prompt, c.sample): (c.ids, c.text, c.finish) for c in found}


SETTINGS = [
    SamplingConfig(temperature=0.0, max_tokens=20, stop=("e",)),
    SamplingConfig(temperature=0.9, top_k=30, top_p=0.9, max_tokens=20, stop=("a", "qu"), seed=5),
    SamplingConfig(order="rwkv", top_p=0.7, max_tokens=16, presence=0.4, frequency=0.4, decay=0.9, stop=(), seed=1),
    SamplingConfig(choices=("yes", "no", "not at all"), temperature=2.0, stop=(), seed=2),
]


@cache
def one_by_one(setting: int) -> dict:
    return written(Stub(), 1, SETTINGS[setting])


@given(
    sampling=st.sampled_from(SETTINGS),
    rows=st.integers(1, 32),
    chunk=st.integers(1, 40),
    saved=st.sampled_from([1, 20, 10**9]),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=5, deadline=None)
def test_exact_logits_give_exact_texts_however_they_are_made(sampling, rows, chunk, saved, order):
    numbers = list(range(len(PROMPTS)))
    order.shuffle(numbers)
    plain = one_by_one(SETTINGS.index(sampling))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK", chunk)
        patch.setattr(prefix, "SAVED", saved)
        patch.setattr(prefix, "LEAST", 1)
        assert written(Stub(), rows, sampling, numbers) == plain


@pytest.mark.parametrize("family", [{"family": "rwkv5"}, {"family": "rwkv6"}, {"family": "rwkv7", "time_state": True}])
@pytest.mark.parametrize("sampling", SETTINGS[:2], ids=["greedy", "hf"])
def test_real_models_write_the_same_one_by_one_and_side_by_side(family, sampling, monkeypatch):
    network, order = real(**family), [3, 1, 6, 0, 5, 2, 4, 7]
    plain = written(network, 1, sampling, sorted(order), 1)
    assert written(network, 7, sampling, order, 1) == plain
    monkeypatch.setattr(reading, "CHUNK", 5)
    assert written(network, 32, sampling, order[::-1], 1) == plain


@pytest.mark.parametrize("chunk", [3, 256])
def test_log_likelihoods_agree_within_a_ten_thousandth(chunk, monkeypatch):
    network = real()
    pairs = [(PROMPTS[n], f" {end}") for n in range(12) for end in ("ok", "a longer end of it")]
    alone = [Engine(network, ByteTokenizer(1), 1).loglikelihood([pair])[0] for pair in pairs]
    monkeypatch.setattr(reading, "CHUNK", chunk)
    for rows in (1, 7, 32):
        assert Engine(network, ByteTokenizer(1), rows).loglikelihood(pairs) == pytest.approx(alone, abs=1e-4)


def test_rows_of_different_settings_do_not_touch_each_other():
    engine = Engine(Stub(), ByteTokenizer(1), 8)
    ids = [engine.begin(prompt) for prompt in PROMPTS[:8]]
    alone = {}
    for n in range(8):
        found = engine.generate([PROMPTS[n]], SETTINGS[n % 4], numbers=[n])
        alone[n] = [(one.ids, one.text, one.finish) for one in found]
    slots = engine.slots(8)
    done, waiting = [], list(range(8))
    while waiting or slots.busy:
        if waiting:  # one more at each step
            n = waiting.pop()
            done += slots.enter([Job(n, 0, ids[n], SETTINGS[n % 4], *engine.reader.read([ids[n]]), 0)])
        if slots.busy:
            done += slots.step()
    for row in done:
        one = row.completion()
        assert alone[one.prompt] == [(one.ids, one.text, one.finish)]


def test_a_row_given_up_leaves_the_others_as_they_are():
    engine = Engine(Stub(), ByteTokenizer(1), 3)
    ids, sampling = [engine.begin(prompt) for prompt in PROMPTS[:3]], SETTINGS[2]
    plain = {one.prompt: one.ids for one in engine.generate(PROMPTS[:3], sampling)}
    slots = engine.slots(3)
    logits, state = engine.reader.read(ids)
    slots.enter([Job(n, 0, ids[n], sampling, logits, state, n) for n in range(3)])
    slots.step()
    slots.drop(slots.rows[1])
    done = []
    while slots.busy:
        done += slots.step()
    assert {row.job.prompt: row.ids for row in done} == {0: plain[0], 2: plain[2]}
    assert slots.free == 3


def test_refilled_slots_take_at_most_a_tenth_more_steps_than_the_ideal():
    """Ragged lengths, 8 rows: the ideal is all tokens over the rows, or the longest text."""
    engine = Engine(Stub(), ByteTokenizer(1), 8)
    slots = []
    plain = engine.slots
    engine.slots = lambda *given: slots.append(plain(*given)) or slots[-1]
    sampling = SamplingConfig(max_tokens=120, stop=("a", "b", "c", "d"), seed=3)
    found = list(engine.generate([f"prompt {n}" for n in range(160)], sampling))
    lengths = [len(one.ids) - 1 for one in found]  # the first token comes from the prompt's logits
    assert max(lengths) > 5 * sum(lengths) / len(lengths) / 2  # ragged
    assert slots[0].steps <= 1.1 * max(sum(lengths) / 8, max(lengths))


def test_adapters_beside_the_matrices_write_what_merged_weights_write():
    config = LoraConfig(rank=4, alpha=64.0)
    plain, network = real(), real()
    lora.inject(network, config)
    stream = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.endswith("lora_B"):
                value.copy_(torch.randn(value.shape, generator=stream) * 0.02)
    merged = real()
    merged.load_state_dict(lora.merged(plain.state_dict(), lora.adapter(network), config))
    beside = written(network, 4, SETTINGS[0], samples=1)
    assert beside == written(merged, 3, SETTINGS[0], samples=1)
    assert beside != written(plain, 3, SETTINGS[0], samples=1)


FAMILIES = [{"family": "rwkv5"}, {"family": "rwkv6"}, {"family": "rwkv7", "time_state": True}]


@pytest.mark.parametrize("family", FAMILIES, ids=[one["family"] for one in FAMILIES])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_matrices_of_fewer_bits_write_the_same_for_any_rows_order_and_chunks(kind, family, monkeypatch):
    order, sampling = [3, 1, 0, 2], SETTINGS[0]
    plain = written(real(**family), 1, sampling, sorted(order), 1, kind=kind)
    assert written(real(**family), 3, sampling, order, 1, kind=kind) == plain
    monkeypatch.setattr(reading, "CHUNK", 7)
    assert written(real(**family), 32, sampling, order[::-1], 1, kind=kind) == plain
