"""Bins hold everything once, no more than they may, and nearly as much as they can."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkvpipe.data.bins import best_fit


def bins(sizes, room):
    members, ends = best_fit(np.array(sizes, dtype=np.int64), room)
    return [some.tolist() for some in np.split(members, ends[:-1])] if len(ends) else []


@given(st.integers(1, 40), st.data())
def test_each_thing_is_in_one_bin_and_no_bin_is_overfull(room, data):
    sizes = data.draw(st.lists(st.integers(1, room), max_size=60))
    found = bins(sizes, room)
    assert sorted(thing for some in found for thing in some) == list(range(len(sizes)))
    assert all(0 < sum(sizes[thing] for thing in some) <= room and some == sorted(some) for some in found)
    # best fit leaves at most one bin half empty, so it never takes twice as many as there must be
    assert sum(2 * sum(sizes[thing] for thing in some) <= room for some in found) <= 1


def test_a_thing_goes_where_it_leaves_the_least():
    assert bins([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert bins([], 10) == []
    assert bins([10, 1], 10) == [[0], [1]]


def test_what_fits_no_bin_is_refused():
    with pytest.raises(ValueError, match="11 is larger"):
        best_fit(np.array([3, 11]), 10)
