"""The sampler keeps the ids, at the probabilities, that independent samplers do."""

import json

import pytest
import torch

from rwkvpipe.base.config import SamplingConfig
from rwkvpipe.infer.row import stream
from rwkvpipe.infer.sampling import nucleus, penalise, probabilities, sample

NAMES = ("order", "temperature", "top_k", "top_p", "repetition_penalty")


def config(case: dict) -> SamplingConfig:
    given = {name: case[name] for name in NAMES if name in case}
    if "logit_bias" in case:
        given["bias"] = {int(i): value for i, value in case["logit_bias"].items()}
    return SamplingConfig(**given, ban=tuple(case.get("ban", ())))


def counts(ids: list[int], size: int) -> torch.Tensor:
    return torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=size)[None]


def test_reference_samplers_agree(goldens):
    for number, case in enumerate(json.loads((goldens / "tune" / "sampling.json").read_text())):
        logits = torch.tensor([case["logits"]])
        logits[logits <= -1e9] = -torch.inf
        found = probabilities(logits, config(case), counts(case.get("prev", []), logits.shape[-1]))[0]
        assert found.nonzero()[:, 0].tolist() == case["kept"], number
        assert torch.allclose(found, torch.tensor(case["probs"], dtype=torch.float64), atol=1e-5, rtol=0), number


def test_rows_are_cut_each_for_itself():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    together = nucleus(logits, 7, 0.8)
    for row in range(6):
        assert torch.equal(nucleus(logits[row : row + 1], 7, 0.8)[0], together[row])


def test_a_token_seen_five_times_is_penalised_once():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    found = penalise(logits, torch.tensor([[5, 1, 0]]), SamplingConfig(repetition_penalty=2.0))
    assert found.tolist() == [[1.0, -4.0, 1.0]]


def test_presence_counts_once_and_frequency_each_time():
    found = penalise(torch.zeros(1, 3), torch.tensor([[3, 1, 0]]), SamplingConfig(presence=1.0, frequency=0.5))
    assert found.tolist() == [[-2.5, -1.5, 0.0]]


def test_the_prompt_counts_for_the_repetition_penalty_alone():
    settings = SamplingConfig(repetition_penalty=2.0, presence=1.0)
    seen = torch.tensor([[True, True, False]])
    assert penalise(torch.ones(1, 3), torch.tensor([[1, 0, 0]]), settings, seen=seen).tolist() == [[-0.5, 0.5, 1.0]]


def test_the_likeliest_is_found_after_penalties_bias_and_bans():
    settings = SamplingConfig(temperature=0.0, bias={1: 5.0}, ban=(2,))
    assert sample(torch.tensor([[1.0, 0.0, 9.0]]), settings, None, []).tolist() == [1]


def test_bias_and_bans_of_ids_that_the_model_lacks_are_harmless():
    settings = SamplingConfig(temperature=0.0, bias={99: 5.0}, ban=(77,))
    assert sample(torch.tensor([[1.0, 2.0]]), settings, None, []).tolist() == [1]


@pytest.mark.parametrize("order", ["hf", "rwkv"])
def test_more_ids_asked_for_than_there_are_is_all(order):
    settings = SamplingConfig(order=order, top_k=50)
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(probabilities(logits, settings), logits.double().softmax(-1))


def test_frequencies_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, -1.0, -torch.inf]]).expand(4000, -1)
    drawn = torch.rand(4000, generator=stream(3, 0, 0), dtype=torch.float64)
    found = torch.bincount(sample(logits, SamplingConfig(), None, drawn), minlength=4) / 4000
    assert torch.allclose(found, logits[0].softmax(-1), atol=0.03)
    assert found[3] == 0


def test_ids_without_a_chance_never_come_even_at_the_ends():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, SamplingConfig(), None, ends).tolist() == [1, 1]


def test_a_row_draws_from_its_own_stream():
    logits = torch.zeros(3, 50)
    together = sample(logits, SamplingConfig(), None, [stream(0, n, 0) for n in range(3)])
    alone = [sample(logits[:1], SamplingConfig(), None, [stream(0, n, 0)]).item() for n in range(3)]
    assert together.tolist() == alone
    assert len({stream(0, 1, 0).initial_seed(), stream(0, 0, 1).initial_seed(), stream(1, 0, 0).initial_seed()}) == 3


def test_numbers_drawn_at_once_are_those_drawn_one_by_one():
    one, many = stream(0, 0, 0), stream(0, 0, 0)
    single = [torch.rand((), generator=one, dtype=torch.float64).item() for _ in range(40)]
    assert torch.rand(40, generator=many, dtype=torch.float64).tolist() == single


def test_spared_ids_keep_their_logits():
    settings = SamplingConfig(repetition_penalty=2.0, presence=1.0, frequency=0.5, spare=(0, 2, 99))
    found = penalise(torch.tensor([[2.0, 2.0, 2.0]]), torch.tensor([[3, 3, 0]]), settings)
    assert found.tolist() == [[2.0, -1.5, 2.0]]


CASES = [
    SamplingConfig(),
    SamplingConfig(temperature=0.6, top_k=7),
    SamplingConfig(temperature=1.4, top_p=0.8),
    SamplingConfig(order="rwkv", temperature=0.7, top_p=0.7),
    SamplingConfig(order="rwkv", temperature=1.3, top_k=5, top_p=0.9),
    SamplingConfig(presence=0.7, frequency=0.3, bias={3: 1.0}, ban=(1,)),
]


@pytest.mark.parametrize("settings", CASES, ids=range(len(CASES)))
def test_what_is_drawn_fits_the_exact_probabilities(settings):
    """Chi-squared at a chance of one in ten thousand of failing a right sampler; the draws are seeded."""
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(8)) * 1.5
    times = torch.tensor([[0, 2, 1, 0, 3, 0, 0, 1, 0, 0, 0, 5]])
    exact, draws = probabilities(logits, settings, times)[0], 20_000
    generators = [stream(11, n, 0) for n in range(draws // 50)]  # the first fifty numbers of many streams
    numbers = torch.cat([torch.rand(50, generator=one, dtype=torch.float64) for one in generators])
    found = torch.bincount(sample(logits.expand(draws, -1), settings, times.expand(draws, -1), numbers), minlength=12)
    assert not found[exact == 0].any()
    kept = exact > 0
    wanted = exact[kept] * draws
    squared = float(((found[kept] - wanted) ** 2 / wanted).sum())
    # Wilson and Hilferty's form of the chi-squared quantile, 3.719 deviations out
    free = int(kept.sum()) - 1
    assert free > 0
    assert squared < free * (1 - 2 / (9 * free) + 3.719 * (2 / (9 * free)) ** 0.5) ** 3
