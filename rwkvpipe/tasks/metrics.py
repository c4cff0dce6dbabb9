"""Numbers from grades, with 95 % intervals."""

import math
from collections.abc import Sequence

from rwkvpipe.base.errors import DataError

Z = 1.959963984540054  # 97.5 % of the normal distribution lie below


def finite(values: Sequence[object]) -> bool:
    """Whether all are numbers that can be reckoned with."""
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 for value in values
    )


def mean_with_interval(grades: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval: Wilson's where all grades are 0 or 1, else the normal one.

    One grade that is neither 0 nor 1 has no spread: its interval has no width. Raises DataError for none at all.
    """
    n = len(grades)
    if not n:
        raise DataError("nothing was graded: there are no questions")
    mean = math.fsum(grades) / n
    if all(grade in (0, 1) for grade in grades):
        # E. B. Wilson 1927, Probable inference, the law of succession, and statistical inference
        middle = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
        return mean, min(max(0.0, middle - half), mean), max(min(1.0, middle + half), mean)
    spread = math.sqrt(math.fsum((grade - mean) ** 2 for grade in grades) / (n - 1)) if n > 1 else 0.0
    half = Z * spread / math.sqrt(n)
    return mean, mean - half, mean + half


def ratio_with_interval(amounts: Sequence[float], sizes: Sequence[float]) -> tuple[float, float, float]:
    """Sum of amounts over sum of sizes, and the ends of its 95 % interval (linearised, over the pairs).

    One pair has no spread: its interval has no width. Raises DataError when there is nothing to divide by.
    """
    total = math.fsum(sizes)
    if not total > 0:
        raise DataError("nothing was measured: the texts are empty, or hold one token each; give longer ones")
    ratio, n = math.fsum(amounts) / total, len(sizes)
    rest = math.fsum((amount - ratio * size) ** 2 for amount, size in zip(amounts, sizes, strict=True))
    half = Z * math.sqrt(rest * n / (n - 1)) / total if n > 1 else 0.0
    return ratio, ratio - half, ratio + half
