"""Intervals are where the textbooks put them."""

import pytest

from rwkvpipe.base.errors import DataError
from rwkvpipe.tasks.metrics import mean_with_interval, ratio_with_interval


def test_wilsons_interval():
    assert mean_with_interval([1] * 81 + [0] * 182) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=1e-4)  # Newcombe
    assert mean_with_interval([1.0] * 10) == pytest.approx((1, 0.7225, 1), abs=1e-4)
    assert mean_with_interval([0.0] * 10) == pytest.approx((0, 0, 0.2775), abs=1e-4)


def test_the_mean_lies_in_its_interval():
    for n in (1, 2, 7, 1000):
        for right in range(0, n + 1, max(1, n // 7)):
            mean, low, high = mean_with_interval([1] * right + [0] * (n - right))
            assert 0 <= low <= mean <= high <= 1


def test_grades_in_between_have_the_normal_interval():
    assert mean_with_interval([0.0, 0.5, 1.0]) == pytest.approx((0.5, 0.5 - 0.5658, 0.5 + 0.5658), abs=1e-4)
    assert mean_with_interval([0.3]) == (0.3, 0.3, 0.3)


def test_ratios_weigh_by_size():
    assert ratio_with_interval([2.0, 6.0], [1.0, 3.0]) == (2.0, 2.0, 2.0)
    ratio, low, high = ratio_with_interval([1.0, 6.0, 2.0], [1.0, 3.0, 2.0])
    assert ratio == 1.5 and low < ratio < high


def test_nothing_has_no_mean():
    with pytest.raises(DataError, match="no questions"):
        mean_with_interval([])
    with pytest.raises(DataError, match="empty"):
        ratio_with_interval([], [])
