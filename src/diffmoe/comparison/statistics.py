"""Means, spreads, and whether a difference between two arms that share their seeds is more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

CONFIDENCE = 0.95


class Summary(NamedTuple):
    """A figure over seeds."""

    mean: float
    std: float | None
    """With n - 1; None of a single value."""
    values: list[float]
    """Seed by seed."""


class Difference(NamedTuple):
    """Of one arm over another one, seed by seed."""

    mean: float
    ci95: tuple[float, float] | None
    """Of the mean, by Student's t with n - 1 degrees of freedom; None of a single seed."""
    p: float | None
    """Of the two-sided paired t-test against no difference; None of a single seed."""


def summary(values: Sequence[float]) -> Summary:
    """Raises `ValueError` where there are none."""
    if not values:
        raise ValueError("there are no values")
    return Summary(fmean(values), stdev(values) if len(values) > 1 else None, list(values))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """`a` less `b`, which have a value for each seed, in the same order.

    Where all seeds differ by the same, the interval is that difference, and p is 0, or 1 where it is 0.
    Raises `ValueError` where there are none, or not as many.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} values: there must be as many, and at least 1")
    differences = [first - second for first, second in zip(a, b, strict=True)]
    mean, count = fmean(differences), len(differences)
    if count < 2:
        return Difference(mean, None, None)
    error = stdev(differences) / math.sqrt(count)
    if error == 0:
        return Difference(mean, (mean, mean), float(mean == 0))
    from scipy.stats import t  # takes a second

    margin = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return Difference(mean, (mean - margin, mean + margin), 2 * float(t.sf(abs(mean) / error, count - 1)))
