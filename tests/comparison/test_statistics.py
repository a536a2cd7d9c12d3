"""Means, intervals and p by hand."""

from __future__ import annotations

import math

import pytest

from diffmoe.comparison.statistics import paired_difference, summary


def test_a_summary_by_hand() -> None:
    # Deviations from 4: -2, 0, 2; their squares over n - 1 = 2 are 4.
    assert summary([2.0, 4.0, 6.0]) == (4.0, 2.0, [2.0, 4.0, 6.0])
    assert summary([0.5]) == (0.5, None, [0.5])
    with pytest.raises(ValueError, match="no values"):
        summary([])


def test_a_difference_by_hand() -> None:
    found = paired_difference([3.0, 5.0, 9.0], [2.0, 3.0, 6.0])
    # Differences 1, 2, 3: mean 2, deviation 1, error 1 / sqrt(3), t = 2 sqrt(3). With 2 degrees of freedom Student's
    # distribution has a closed form: P(|T| < t) = t / sqrt(t² + 2), so p = 1 - sqrt(12 / 14), and the 97.5% quantile is
    # 0.95 sqrt(2 / (1 - 0.95²)).
    margin = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)
    assert found.mean == pytest.approx(2)
    assert found.ci95 == pytest.approx((2 - margin, 2 + margin))
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))


def test_the_pairs_count_not_the_spread_of_the_arms() -> None:
    a, b = [0.1, 0.5, 0.9, 0.3], [0.09, 0.485, 0.88, 0.29]
    assert paired_difference(a, b).p < 0.02 < 0.2 < paired_difference(a, b[1:] + b[:1]).p  # pyright: ignore


def test_turned_around_it_is_the_opposite() -> None:
    a, b = [0.91, 0.94, 0.92, 0.97], [0.9, 0.95, 0.9, 0.93]
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert one.p == pytest.approx(other.p)
    assert one.mean == pytest.approx(-other.mean)
    assert one.ci95 == pytest.approx(tuple(-end for end in reversed(other.ci95 or ())))


def test_where_there_is_nothing_to_estimate() -> None:
    assert paired_difference([0.5], [0.25]) == (0.25, None, None)
    assert paired_difference([1.0, 2.0], [1.0, 2.0]) == (0.0, (0.0, 0.0), 1.0)
    assert paired_difference([1.5, 2.5], [1.0, 2.0]) == (0.5, (0.5, 0.5), 0.0)
    for a, b in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="as many"):
            paired_difference(a, b)
