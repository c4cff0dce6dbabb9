"""The sampler keeps the ids, at the probabilities, that independent samplers do."""

import json

import pytest
import torch

from rwkvpipe.base.config import RwkvConfig, SamplingConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.infer.engine import Engine
from rwkvpipe.infer.lot import Lot, number
from rwkvpipe.infer.sampling import UNIT, chances, log2, penalise, probabilities, sample, weigh
from rwkvpipe.model.layers import State

KNOWN = [0.47594482043045283, 0.03295949805835907]
NAMES = ("order", "temperature", "top_k", "top_p", "repetition_penalty")


def config(case: dict) -> SamplingConfig:
    given = {name: case[name] for name in NAMES if name in case}
    if "logit_bias" in case:
        given["bias"] = {int(i): value for i, value in case["logit_bias"].items()}
    return SamplingConfig(**given, ban=tuple(case.get("ban", ())))


def counts(ids: list[int], size: int) -> torch.Tensor:
    return torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=size)[None]


def test_reference_samplers_agree(goldens):
    for place, case in enumerate(json.loads((goldens / "tune" / "sampling.json").read_text())):
        logits = torch.tensor([case["logits"]])
        logits[logits <= -1e9] = -torch.inf
        found = probabilities(logits, config(case), counts(case.get("prev", []), logits.shape[-1]))[0]
        assert found.nonzero()[:, 0].tolist() == case["kept"], place
        assert torch.allclose(found, torch.tensor(case["probs"], dtype=torch.float64), atol=1e-5, rtol=0), place


def test_rows_are_cut_each_for_itself():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    for order in ("hf", "rwkv"):
        settings = SamplingConfig(order=order, top_k=7, top_p=0.8, temperature=0.7)
        together = chances(logits, settings)
        for row in range(6):
            assert torch.equal(chances(logits[row : row + 1], settings)[0], together[row])


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
    assert sample(torch.tensor([[1.0, 0.0, 9.0]]), settings, None, None).tolist() == [1]


def test_bias_and_bans_of_ids_that_the_model_lacks_are_harmless():
    settings = SamplingConfig(temperature=0.0, bias={99: 5.0}, ban=(77,))
    assert sample(torch.tensor([[1.0, 2.0]]), settings, None, None).tolist() == [1]


@pytest.mark.parametrize("order", ["hf", "rwkv"])
def test_more_ids_asked_for_than_there_are_is_all(order):
    settings = SamplingConfig(order=order, top_k=50)
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(probabilities(logits, settings), logits.double().softmax(-1))


def test_frequencies_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, -1.0, -torch.inf]]).expand(4000, -1)
    drawn = torch.tensor(Lot(3, 0, 0).draw(4000), dtype=torch.float64)
    found = torch.bincount(sample(logits, SamplingConfig(), None, drawn), minlength=4) / 4000
    assert torch.allclose(found, logits[0].softmax(-1), atol=0.03)
    assert found[3] == 0


def test_ids_without_a_chance_never_come_even_at_the_ends():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, SamplingConfig(), None, ends).tolist() == [1, 1]


def test_numbers_of_texts_are_the_reference_numbers(goldens):
    for line in (goldens / "eval" / "seed_goldens.jsonl").read_text().splitlines():
        case = json.loads(line)
        assert number(case["sample"], case["repeat"], case["stage"]) == case["seed"]


@pytest.mark.parametrize("odd", [(2**31, 0, 1), (0, 2**24, 1), (0, 0, 256), (-1, 0, 1)])
def test_numbers_that_would_meet_another_texts_are_refused(odd):
    with pytest.raises(ConfigError, match="numbers of texts are 0 to"):
        number(*odd)


def test_each_text_has_a_stream_of_its_own():
    keys = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (2**32, 0, 0), (0, 2**24, 0), (2**62, 5, 5)]
    assert len({tuple(Lot(*key).draw(3)) for key in keys}) == len(keys)
    assert all(0 <= value < 1 for value in Lot(0, 0, 0).draw(1000))


def test_numbers_drawn_at_once_are_those_drawn_one_by_one():
    one = Lot(0, 0, 0)
    assert Lot(0, 0, 0).draw(40) == [one.draw(1)[0] for _ in range(40)]
    assert Lot(7, 3, 2).draw(2) == KNOWN  # on every machine


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
    SamplingConfig(repetition_penalty=1.4, temperature=0.8, top_k=6, top_p=0.9, bias={0: -1.0}, ban=(2, 8)),
    SamplingConfig(order="rwkv", repetition_penalty=1.4, presence=0.5, frequency=0.2, top_p=0.8, spare=(4,), ban=(7,)),
    SamplingConfig(order="rwkv", bias={5: 2.0, 6: -2.0}, temperature=2.0, top_k=4, ban=(9,)),
]


@pytest.mark.parametrize("settings", CASES, ids=range(len(CASES)))
def test_what_is_drawn_fits_the_exact_probabilities(settings):
    """Chi-squared at a chance of one in ten thousand of failing a right sampler; the draws are seeded."""
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(8)) * 1.5
    times = torch.tensor([[0, 2, 1, 0, 3, 0, 0, 1, 0, 0, 0, 5]])
    exact, draws = probabilities(logits, settings, times)[0], 20_000
    lots = [Lot(11, n, 0) for n in range(draws // 50)]  # the first fifty numbers of many streams
    numbers = torch.tensor([value for lot in lots for value in lot.draw(50)], dtype=torch.float64)
    found = torch.bincount(sample(logits.expand(draws, -1), settings, times.expand(draws, -1), numbers), minlength=12)
    assert fits(found, exact)


def fits(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether counts fit chances: Wilson and Hilferty's form of the chi-squared quantile, 3.719 deviations out."""
    kept = exact > 0
    wanted = exact[kept] * found.sum()
    squared = float(((found[kept] - wanted) ** 2 / wanted).sum())
    free = int(kept.sum()) - 1
    assert free > 0 and not found[~kept].any()
    return squared < free * (1 - 2 / (9 * free) + 3.719 * (2 / (9 * free)) ** 0.5) ** 3


class Constant(torch.nn.Module):
    """The same logits after anything."""

    def __init__(self, logits: list[float]):
        super().__init__()
        self.config = RwkvConfig(n_layer=1, n_embd=1, head_size=1, vocab_size=len(logits))
        self.values = torch.nn.Parameter(torch.tensor(logits))

    def features(self, ids, state=None, lengths=None):
        zeros = [torch.zeros(len(ids), 1)]
        return torch.zeros(*ids.shape, 1), State(zeros, [torch.zeros(len(ids), 1, 1, 1)], zeros)

    def logits(self, features):
        return self.values.detach().expand(*features.shape[:-1], -1)

    def forward(self, ids, state=None, lengths=None):
        features, state = self.features(ids, state, lengths)
        return self.logits(features), state


class Letters:
    """Ids 1 to 5 are letters; 0 belongs to nothing."""

    size, eos = 6, None
    encode = staticmethod(lambda text: ["_abcde".index(letter) for letter in text])
    decode_bytes = staticmethod(lambda ids: "".join("_abcde"[n] for n in ids).encode())
    owns = staticmethod(lambda number: number > 0)


ALL = {"repetition_penalty": 1.3, "presence": 0.4, "frequency": 0.6, "decay": 0.5, "bias": {5: 0.5}, "seed": 4}


@pytest.mark.parametrize(
    "settings",
    [
        SamplingConfig(max_tokens=3, stop=(), top_k=4, top_p=0.95, temperature=0.9, **ALL),
        SamplingConfig(max_tokens=3, stop=(), order="rwkv", top_p=0.9, temperature=1.2, ban=(2,), **ALL),
    ],
    ids=["hf", "rwkv"],
)
def test_texts_that_the_engine_writes_fit_the_exact_probabilities(settings):
    """Three letters: penalties of what was written, and of the prompt, in the whole engine, with slots refilled."""
    logits, prompt = [3.0, 0.2, 0.9, -0.3, 0.5, -0.6], "ca"
    exact: dict[str, float] = {"": 1.0}
    for _ in range(settings.max_tokens):
        longer = {}
        for text, chance in exact.items():
            times, seen = torch.zeros(1, 6), torch.zeros(1, 6, dtype=torch.bool)
            for n in Letters.encode(text):
                times *= settings.decay
                times[0, n] += 1
            seen[0, Letters.encode(prompt + text)] = True
            values = torch.tensor([logits])
            values[0, 0] = -torch.inf
            each = probabilities(values, settings, times, seen=seen)[0].tolist()
            longer |= {text + "_abcde"[n]: chance * each[n] for n in range(6) if each[n] > 0}
        exact = longer
    found = dict.fromkeys(exact, 0)
    for one in Engine(Constant(logits), Letters(), 64).generate([prompt], settings, 3000):
        found[one.text] += 1
    chances = torch.tensor(list(exact.values()), dtype=torch.float64)
    counts = torch.tensor(list(found.values()), dtype=torch.float64)
    rare = chances * 3000 < 5  # too few for the test: together
    assert fits(*(torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, chances)))


def test_weights_are_powers_of_2_to_nine_digits():
    powers = torch.linspace(-20, 0.7, 10_000, dtype=torch.float64)
    exact = (powers + UNIT).exp2()
    assert bool(((weigh(powers) - exact).abs() < 4e-9 * exact + 0.51).all())
    assert weigh(torch.tensor([-UNIT - 3.0, -torch.inf], dtype=torch.float64)).tolist() == [0, 0]
    numbers = torch.tensor([1, 2, 3, 1000, 2**40 - 1, 2**56 + 12345])
    assert float((log2(numbers) - numbers.double().log2()).abs().max()) < 1e-14
