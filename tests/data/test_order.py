"""Orders are functions of a number and a seed: permutations, and shares that come out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpipe.data import order
from rwkvpipe.data.order import Shares, place, scrambled, shuffled

WEIGHTS = st.lists(st.floats(0.05, 9.0, allow_subnormal=False), min_size=2, max_size=5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 700), st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=4))
def test_a_computed_permutation_holds_every_number_once(count, keys):
    index = scrambled(count, keys)
    assert sorted(map(index, range(count))) == list(range(count))


def test_a_pass_too_large_for_memory_is_computed_and_sees_everything_once(monkeypatch):
    monkeypatch.setattr(order, "TABLE", 100)
    index = shuffled(1000, seed=3)
    passes = [[index(number) for number in range(first, first + 1000)] for first in (0, 1000)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(1000)) and passes[0] != passes[1]
    assert passes[0] != [shuffled(1000, seed=4)(number) for number in range(1000)]
    # neighbours end up far from each other, as in any order by lot
    assert 250 < np.abs(np.diff(passes[0])).mean() < 420


def test_a_hundred_thousand_million_rows_need_no_memory():
    index = shuffled(10**11, seed=1)
    found = [index(number) for number in range(2000)]
    assert len(set(found)) == 2000 and 0.47 < np.mean(found) / 10**11 < 0.53


def test_the_magic_order_is_exact_beyond_what_64_bits_hold():
    prime, visit = 81082817, 10**17
    factor = int(prime * ((5**0.5 - 1) / 2))
    assert place(0, visit - 1, prime) == (factor * visit**3) % prime


@settings(max_examples=15, deadline=None)
@given(WEIGHTS, st.integers(0, 2**32))
def test_rows_are_numbered_within_each_corpus_and_shared_by_weight(weights, seed):
    shares, seen = Shares(weights, seed), [0] * len(weights)
    for number in range(600):
        corpus, within = shares.pick(number)
        assert within == seen[corpus]
        seen[corpus] += 1
        if number % 97 == 0:
            wanted = np.array(weights) / sum(weights) * (number + 1)
            assert np.abs(np.array(seen) - wanted).max() < 3 + len(weights)


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (1, 999), (1e-3, 1.0), (2, 1)])
def test_shares_come_out_over_many_blocks(monkeypatch, weights):
    monkeypatch.setattr(order, "BLOCK", 4096)
    shares, seen = Shares(weights, 5), np.zeros(len(weights), int)
    for number in range(3 * 4096 + 17):
        corpus, within = shares.pick(number)
        assert within == seen[corpus]
        seen[corpus] += 1
        if (number + 1) % 4096 == 0:
            assert np.abs(seen - np.array(weights) / sum(weights) * (number + 1)).max() <= 1


def test_any_row_is_found_without_those_before_it():
    weights = (3, 1, 0.5)
    one, other = Shares(weights, 9), Shares(weights, 9)
    rows = [0, 5, 2**16 - 1, 2**16, 10**6, 10**12]
    assert [one.pick(row) for row in rows] == [other.pick(row) for row in reversed(rows)][::-1]
    corpus, within = one.pick(10**12)
    assert within == pytest.approx(10**12 * weights[corpus] / 4.5, abs=3 * 2**16)


def test_the_seed_decides_where_rows_of_a_corpus_come():
    found = [[Shares((1, 1), seed).pick(number)[0] for number in range(100)] for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert Shares((4,), 1).pick(10**9) == (0, 10**9)
