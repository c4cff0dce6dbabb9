"""The native sampler chooses what the PyTorch one does, exactly; both choose by the chances of the plain formulas."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.infer.draw import Asked, choose, weights
from rwkvpipe.infer.lot import Lot
from rwkvpipe.infer.sampling import chances, penalise, sample
from rwkvpipe.kernel import build

needs_native = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")
NAMES = ("order", "temperature", "top_k", "top_p", "repetition_penalty")
PENALTIES = {
    "repetition_penalty": 1.3,
    "presence": 0.3,
    "frequency": 0.1,
    "bias": {1: 0.5, 9: -40.0},
    "ban": (2, 99999),
}
COSTS = [{}, PENALTIES, {**PENALTIES, "spare": (0, 4, 11)}, {"bias": {3: 100.0}}, {"repetition_penalty": 0.7}]


def drawn(rows, V, spread, seed, *, seen=True):
    """Logits with many equals and some of no chance, numbers, and what was written and seen."""
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, V, generator=stream) * spread
    logits[:, 7:90] = logits[:, 3:4]
    logits[:, 100:120] = -torch.inf
    logits[:, -1] = -0.0
    numbers = torch.rand(rows, generator=stream, dtype=torch.float64)
    counts = torch.randint(0, 4, (rows, V), generator=stream) * (torch.rand(rows, V, generator=stream) < 0.1) * 0.9
    beside = torch.rand(rows, V, generator=stream) < 0.1
    return Asked(logits, logits, None, numbers, counts, (counts > 0) | beside if seen else None)


def plain(row: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """Chances (V,) of logits (V,) by the formulas, in fp64; ids of equal values in their own order."""
    order = np.argsort(-row, kind="stable")
    values = row.astype(np.float64)
    heat = config.temperature if config.order == "hf" else 1.0
    found = np.exp((values - values.max()) / heat)
    if config.order == "hf" and 0 < config.top_k < len(row):
        found[values < values[order[config.top_k - 1]]] = 0
    found /= found.sum()
    mass = found[order].cumsum()
    if config.order == "hf":
        if config.top_p < 1:
            found[order[max(1, int((mass - found[order] < config.top_p).sum())) :]] = 0
        return found / found.sum()
    cut = found[order[min(int((mass < config.top_p).sum()), len(row) - 1)]]
    if 0 < config.top_k < len(row):
        found[order[config.top_k :]] = 0
    if config.top_p < 1:
        found[found < cut] = 0
        ties = found == cut
        if config.top_p > 0 and ties.any():
            found[ties] = max(0.0, cut + (config.top_p - found.sum()) / ties.sum())
    found = found ** (1 / config.temperature)
    return found / found.sum()


CONFIGS = st.builds(
    lambda order, temperature, top_k, top_p, cost: SamplingConfig(
        order=order, temperature=temperature, top_k=top_k, top_p=top_p, **cost
    ),
    order=st.sampled_from(["hf", "rwkv"]),
    temperature=st.sampled_from([0.01, 0.3, 1.0, 1.7, 50.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 5000]),
    top_p=st.sampled_from([0.0, 0.3021, 0.9017, 0.9987, 1.0]),  # whole numbers of equals would be a matter of rounding
    cost=st.sampled_from(COSTS),
)


@needs_native
@given(
    config=CONFIGS,
    V=st.sampled_from([3, 8, 63, 64, 65, 500, 3001]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    seed=st.integers(0, 99),
    seen=st.booleans(),
)
@settings(max_examples=150)
def test_native_weights_and_ids_are_those_of_pytorch_to_the_bit(config, V, spread, seed, seen):
    asked = drawn(3, V, spread, seed, seen=seen)
    wanted = chances(asked.logits, config, asked.counts, seen=asked.seen)
    assert torch.equal(weights(asked, config), wanted)
    ids, logprobs = choose(asked, config)
    assert torch.equal(ids, sample(asked.logits, config, asked.counts, asked.draws, seen=asked.seen))
    exact = (asked.logits.double() / config.temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert bool(((logprobs - exact).abs() <= 1e-5 + 2e-7 * exact.abs()).all())


@needs_native
@given(top_p=st.sampled_from([0.1, 0.25, 0.5, 0.7, 0.8]), equal=st.integers(1, 40), seed=st.integers(0, 9))
@settings(max_examples=20)
def test_equal_chances_that_reach_top_p_exactly_are_cut_alike(top_p, equal, seed):
    logits = torch.full((1, 100), -20.0)
    logits[0, torch.randperm(100, generator=torch.Generator().manual_seed(seed))[:equal]] = 1.0
    for order in ("hf", "rwkv"):
        config = SamplingConfig(order=order, top_p=top_p, temperature=0.8)
        assert torch.equal(weights(Asked(logits, logits), config), chances(logits, config))


@needs_native
@pytest.mark.parametrize("top_p", [1 - 2**-53, 1 - 1e-12, 1 - 1e-9])
@pytest.mark.parametrize("order", ["hf", "rwkv"])
@pytest.mark.parametrize("top_k", [0, 990])
def test_a_share_of_almost_all_reaches_ids_that_hardly_weigh_anything(order, top_k, top_p):
    mixed = torch.randperm(1001, generator=torch.Generator().manual_seed(0))
    logits = torch.cat((torch.zeros(1, 1), torch.linspace(-20, -30, 1000)[None]), 1)[:, mixed]
    for temperature in (0.9, 1.0):
        config = SamplingConfig(order=order, top_p=top_p, top_k=top_k, temperature=temperature)
        asked = Asked(logits, logits, draws=torch.tensor([0.5]))
        assert torch.equal(weights(asked, config), chances(logits, config))
        assert choose(asked, config)[0].tolist() == [int(logits.argmax())]


@pytest.mark.parametrize(
    "form", [pytest.param(weights, marks=needs_native), lambda asked, config: chances(asked.logits, config)]
)
@given(config=CONFIGS, spread=st.sampled_from([0.5, 3.0]), seed=st.integers(0, 10))
@settings(max_examples=40)
def test_chances_are_those_of_the_formulas(form, config, spread, seed):
    config = config.model_copy(update={"repetition_penalty": 1.0, "presence": 0, "frequency": 0, "bias": {}, "ban": ()})
    asked = drawn(1, 300, spread, seed)
    found = form(Asked(asked.logits, asked.logits), config)[0].double()
    wanted = torch.from_numpy(plain(asked.logits[0].numpy(), config))
    assert torch.equal((found > 0)[wanted > 1e-11], torch.ones(int((wanted > 1e-11).sum()), dtype=torch.bool))
    assert not found[wanted == 0].any()
    torch.testing.assert_close(found / found.sum(), wanted, atol=1e-7, rtol=0)


@needs_native
def test_native_chances_are_the_reference_samplers(goldens):
    for place, case in enumerate(json.loads((goldens / "tune" / "sampling.json").read_text())):
        logits = torch.tensor([case["logits"]])
        logits[logits <= -1e9] = -torch.inf
        bias = {int(i): value for i, value in case.get("logit_bias", {}).items()}
        given = {name: case[name] for name in NAMES if name in case}
        config = SamplingConfig(**given, bias=bias, ban=tuple(case.get("ban", ())))
        counts = torch.bincount(torch.tensor(case.get("prev", []), dtype=torch.long), minlength=logits.shape[-1])
        asked = Asked(logits, logits, None, None, counts[None].float())
        if config.temperature == 0:
            assert choose(asked, config)[0].tolist() == case["kept"], place
            continue
        found = weights(asked, config)[0].double()
        assert found.nonzero()[:, 0].tolist() == case["kept"], place
        wanted = torch.tensor(case["probs"], dtype=torch.float64)
        assert torch.allclose(found / found.sum(), wanted, atol=1e-5, rtol=0), place


@needs_native
def test_a_large_vocabulary_is_drawn_from_as_in_pytorch():
    asked = drawn(2, 65_536, 4.0, 1)
    for config in (
        SamplingConfig(),
        SamplingConfig(top_p=0.85, **PENALTIES),
        SamplingConfig(top_k=50, temperature=0.7),
        SamplingConfig(order="rwkv", top_k=900, top_p=0.7, temperature=1.5),
    ):
        assert torch.equal(weights(asked, config), chances(asked.logits, config, asked.counts, seen=asked.seen))


@needs_native
def test_any_number_of_threads_and_any_rows_beside_give_the_same_bits(at_any_thread_count):
    asked = drawn(7, 700, 3.0, 5)
    for config in (SamplingConfig(top_p=0.9, **PENALTIES), SamplingConfig(order="rwkv", top_k=30, temperature=0.7)):
        at_any_thread_count(lambda config=config: choose(asked, config))
        whole = choose(asked, config)
        for row in range(7):
            fields = ("logits", "plain", "draws", "counts", "seen")
            alone = choose(Asked(**{name: getattr(asked, name)[row : row + 1] for name in fields}), config)
            assert all(torch.equal(one, other[row : row + 1]) for one, other in zip(alone, whole, strict=True))


@needs_native
def test_what_is_drawn_follows_the_weights():
    """Chi-squared of 20,000 draws over 500 ids, at a chance of one in ten thousand of failing a right sampler."""
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(3)) * 1.5
    config, count = SamplingConfig(top_p=0.9, temperature=0.9), 20_000
    exact = torch.from_numpy(plain(logits[0].numpy(), config))
    numbers = torch.tensor([value for n in range(count // 50) for value in Lot(5, n, 0).draw(50)], dtype=torch.float64)
    rows = logits.expand(count, -1)
    found = torch.bincount(choose(Asked(rows, rows, None, numbers), config)[0], minlength=500)
    kept = exact > 0
    wanted = exact[kept] * count
    squared, free = float(((found[kept] - wanted) ** 2 / wanted).sum()), int(kept.sum()) - 1
    assert not found[~kept].any()
    assert squared < free * (1 - 2 / (9 * free) + 3.719 * (2 / (9 * free)) ** 0.5) ** 3


@pytest.mark.parametrize("natively", [pytest.param(True, marks=needs_native), False])
def test_barred_ids_never_come_and_count_for_log_probabilities(natively, monkeypatch):
    if not natively:
        monkeypatch.setattr(build, "native", lambda *tensors: None)
    logits = torch.tensor([[5.0, 1.0, 2.0], [9.0, 3.0, 0.0]])
    barred = torch.tensor([0])
    ids, logprobs = choose(Asked(logits, logits, barred), SamplingConfig(temperature=0.0))
    assert ids.tolist() == [2, 1]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[[0, 1], [2, 1]])
    limited = logits.clone()
    limited[:, 2] = -torch.inf
    ids, logprobs = choose(Asked(limited, logits, barred, torch.tensor([0.0, 0.999])), SamplingConfig(temperature=0.5))
    assert ids.tolist() == [1, 1]
    torch.testing.assert_close(logprobs, (2 * logits).log_softmax(-1)[:, 1])


@needs_native
def test_what_native_code_reads_has_its_type_and_its_shape():
    """Numbers in fp32 were once read as if they were fp64: half of them from memory that belongs to others."""
    asked, config = drawn(6, 90, 2.0, 3), SamplingConfig(temperature=0.9, **PENALTIES)
    single = asked.draws.float()
    other = Asked(asked.logits, asked.plain.double(), None, single, asked.counts.double(), asked.seen.float())
    same = Asked(asked.logits, asked.plain, None, single.double(), asked.counts, asked.seen)
    assert all(torch.equal(one, two) for one, two in zip(choose(other, config), choose(same, config), strict=True))
    for name, wrong in (("draws", single[:5]), ("counts", asked.counts[:, :80]), ("plain", asked.plain[:1])):
        with pytest.raises(ValueError, match=name):
            replace(asked, **{name: wrong})


@pytest.mark.parametrize("natively", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(temperature=0.0), SamplingConfig(top_p=0.5)])
def test_logits_that_are_no_numbers_have_log_probabilities_that_are_none(natively, broken, config, monkeypatch):
    if not natively:
        monkeypatch.setattr(build, "native", lambda *tensors: None)
    logits = torch.zeros(2, 70)
    logits[1, 66] = broken
    ids, logprobs = choose(Asked(logits, logits, None, torch.tensor([0.5, 0.5], dtype=torch.float64)), config)
    assert bool(logprobs[0].isfinite()) and not bool(logprobs[1].isfinite())
    assert bool(((ids >= 0) & (ids < 70)).all())


@pytest.mark.parametrize("natively", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e30, 1e300])
def test_any_temperature_above_0_gives_an_id_and_a_number(natively, temperature, monkeypatch):
    if not natively:
        monkeypatch.setattr(build, "native", lambda *tensors: None)
    asked = drawn(2, 90, 3.0, 1)
    ids, logprobs = choose(
        Asked(asked.logits, asked.logits, None, asked.draws), SamplingConfig(temperature=temperature)
    )
    assert logprobs.isfinite().all()
    assert temperature > 1 or torch.equal(ids, asked.logits.argmax(-1))


@needs_native
@example(V=64)
@example(V=17)
@given(V=st.integers(1, 200))
@settings(max_examples=10)
def test_nothing_beside_the_results_is_written(V):
    logits, guard = torch.randn(3, V, generator=torch.Generator().manual_seed(V)), 8
    whole = torch.full((2 * guard + 3 * V,), -7)
    told = whole[guard:-guard].view(3, V)
    for config in (SamplingConfig(), SamplingConfig(top_p=0.7), SamplingConfig(top_k=5)):
        numbers = torch.tensor([1.0, config.top_p, 1.0, 0.0, 0.0], dtype=torch.float64)
        lists = (torch.empty(0, dtype=torch.long), torch.empty(0), numbers, torch.rand(3, dtype=torch.float64))
        ids, logprobs = torch.full((3 + 2 * guard,), -7), torch.full((3 + 2 * guard,), torch.nan)
        results = (ids[guard:-guard], logprobs[guard:-guard], told)
        build.call("sample_rows", (3, V, config.top_k, 0, 0, 0, 0, 0), logits, logits, None, None, *lists, *results)
        assert torch.equal(told, chances(logits, config))
        for room in (whole, ids):
            assert (room[:guard] == -7).all() and (room[-guard:] == -7).all()
        assert logprobs[:guard].isnan().all() and logprobs[-guard:].isnan().all() and results[1].isfinite().all()


def test_penalties_are_those_of_the_plain_rule():
    asked = drawn(2, 40, 3.0, 2)
    found = penalise(asked.logits, asked.counts, SamplingConfig(**PENALTIES, spare=(4,)), seen=asked.seen)
    for row in range(2):
        for n in range(40):
            wanted, seen = float(asked.logits[row, n]), bool(asked.seen[row, n])
            times = float(asked.counts[row, n])
            if seen and n != 4:
                wanted = (wanted / 1.3 if wanted > 0 else wanted * 1.3) - 0.3 * (times > 0) - 0.1 * times
            wanted += PENALTIES["bias"].get(n, 0.0)
            assert float(found[row, n]) == (-float("inf") if n == 2 else pytest.approx(wanted, abs=1e-5))
