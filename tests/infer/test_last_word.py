"""LAMBADA's numbers: log-likelihoods of last words, and whether they would have been written."""

import json
import math

import pytest
import torch

from rwkvpipe.base.config import RwkvConfig, SamplingConfig
from rwkvpipe.infer.engine import Engine
from rwkvpipe.model.layers import State
from rwkvpipe.tasks.metrics import mean_with_interval

SIZE = 20_000  # so many ids that a chance of e^-9 may be the largest
WORD, RIVAL = 7, 8


class Table(torch.nn.Module):
    """The next id's logits are those that the last id has."""

    def __init__(self, rows: list[list]):
        super().__init__()
        self.config = RwkvConfig(n_layer=1, n_embd=1, head_size=1, vocab_size=SIZE)
        logits = torch.zeros(len(rows), SIZE)
        for row, (likelihood, greedy) in zip(logits, rows, strict=True):
            left = -math.expm1(likelihood)  # what the other ids share, or one of them has nearly alone
            row.fill_(math.log((left if greedy else 1e-6 * left) / (SIZE - (1 if greedy else 2))))
            row[RIVAL] = row[0] if greedy else math.log(left * (1 - 1e-6))
            row[WORD] = likelihood
        self.values = torch.nn.Parameter(logits)

    def features(self, ids, state=None, lengths=None):
        zeros = [torch.zeros(len(ids), 1)]
        return ids[..., None].float(), State(zeros, [torch.zeros(len(ids), 1, 1, 1)], zeros)

    def logits(self, features):
        return self.values.detach()[features[..., 0].long() % len(self.values)]

    def forward(self, ids, state=None, lengths=None):
        features, state = self.features(ids, state, lengths)
        return self.logits(features), state


class Numbers:
    """Ids that are written as numbers."""

    size, eos = SIZE, None
    encode = staticmethod(lambda text: [int(word) for word in text.split()])
    decode_bytes = staticmethod(lambda ids: " ".join(map(str, ids)).encode())
    owns = staticmethod(lambda number: True)


def test_perplexities_and_hits_are_the_reference_numbers(goldens):
    lines = (goldens / "eval" / "perplexity_goldens.jsonl").read_text().splitlines()
    cases = [case for case in map(json.loads, lines) if case["type"] == "lambada"]
    assert cases
    for case in cases:
        rows = case["loglikelihood_and_greedy"]
        engine, contexts = Engine(Table(rows), Numbers(), 4), [str(n) for n in range(len(rows))]
        found = engine.loglikelihood([(context, str(WORD)) for context in contexts])
        assert found == pytest.approx([likelihood for likelihood, _ in rows], abs=1e-4)
        written = {one.prompt: one for one in engine.generate(contexts, SamplingConfig(temperature=0.0, max_tokens=1))}
        hits = [written[n].ids == [WORD] for n in range(len(rows))]
        assert hits == [greedy for _, greedy in rows]
        for n, (likelihood, greedy) in enumerate(rows):
            assert not greedy or written[n].logprobs == pytest.approx([likelihood], abs=1e-4)
        assert math.exp(-mean_with_interval(found)[0]) == pytest.approx(case["perplexity"], rel=1e-4)
        assert mean_with_interval([float(hit) for hit in hits])[0] == pytest.approx(case["acc"])
