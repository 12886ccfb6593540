"""The paired bootstrap of the personalization benchmark."""

from __future__ import annotations

import math
import random
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from _personalization import bootstrap


def slow(apart: list[float]) -> tuple[float, float, float]:
    """Standard error and ends of the interval, one resample after another, by the definition."""
    draw = random.Random(7)
    means = sorted(statistics.fmean(draw.choices(apart, k=len(apart))) for _ in range(4000))
    return statistics.pstdev(means), means[100], means[-101]


def pairs(values) -> dict[tuple[int, str], float]:
    return {(k // 6, f"site-{k % 6}"): float(value) for k, value in enumerate(values)}


def test_the_difference_agrees_with_a_slow_bootstrap():
    draw = np.random.default_rng(0)
    ours, theirs = draw.random(30), draw.random(30)
    found = bootstrap.difference(pairs(ours), pairs(theirs))
    error, low, high = slow(list(ours - theirs))
    assert found.value == pytest.approx((ours - theirs).mean())
    assert found.pairs == 30
    assert found.error == pytest.approx(error, rel=0.05)
    assert found.low == pytest.approx(low, abs=0.1 * error * 2)
    assert found.high == pytest.approx(high, abs=0.1 * error * 2)


def test_normal_differences_have_the_known_error_and_interval():
    apart = np.random.default_rng(1).normal(2.0, 3.0, size=400)
    found = bootstrap.difference(pairs(apart), pairs([0.0] * 400))
    error = apart.std() / math.sqrt(400)
    assert found.error == pytest.approx(error, rel=0.03)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.1 * error)


def test_an_interval_of_95_percent_holds_the_truth_about_that_often():
    draw = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = bootstrap.difference(pairs(draw.normal(0.1, 1, 60)), pairs([0.0] * 60))
        held += found.low <= 0.1 <= found.high
    assert 0.90 <= held / 200 <= 0.98


def test_every_resample_draws_as_many_pairs_as_there_are():
    times = bootstrap.times_drawn(5)
    assert times.shape == (10_000, 5)
    assert (times.sum(1) == 5).all()
    assert times.mean(0) == pytest.approx([1.0] * 5, abs=0.03)


def test_a_difference_that_all_pairs_share_has_no_error():
    found = bootstrap.difference(pairs([0.3, 0.5, 0.9]), pairs([0.2, 0.4, 0.8]))
    assert (found.error, found.low, found.high) == pytest.approx((0, 0.1, 0.1), abs=1e-12)


def test_only_common_pairs_count():
    ours, theirs = {(0, "a"): 0.5, (1, "a"): 0.9}, {(0, "a"): 0.25, (0, "b"): 0.9}
    found = bootstrap.difference(ours, theirs)
    assert (found.value, found.error, found.pairs) == (0.25, 0.0, 1)
    assert bootstrap.ratio(ours, theirs).value == 2.0
    with pytest.raises(ValueError, match="without a common pair"):
        bootstrap.difference(ours, {(7, "a"): 0.5})


def test_the_ratio_is_of_the_means_and_its_interval_is_paired():
    theirs = np.random.default_rng(3).uniform(0.2, 0.6, 30)
    found = bootstrap.ratio(pairs(1.5 * theirs), pairs(theirs))
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    noisy = bootstrap.ratio(pairs(theirs[::-1]), pairs(theirs))
    assert noisy.value == pytest.approx(1.0)
    assert noisy.low < 1.0 < noisy.high


def test_a_ratio_over_nothing_is_infinite_and_not_an_error():
    found = bootstrap.ratio(pairs([0.5, 0.5]), pairs([0.0, 0.0]))
    assert (found.value, found.low, found.high) == (math.inf, math.inf, math.inf)
    assert math.isnan(bootstrap.ratio(pairs([0.0]), pairs([0.0])).value)
    some = bootstrap.ratio(pairs([0.0, 0.5]), pairs([0.0, 0.25]))
    assert (some.value, some.low, some.high) == (2.0, 2.0, 2.0), "resamples of 0 / 0 do not count"


def test_few_pairs_show_nothing_even_if_they_agree():
    few = bootstrap.difference(pairs([0.3] * 5), pairs([0.2] * 5))
    enough = bootstrap.difference(pairs([0.3] * 6), pairs([0.2] * 6))
    assert (few.above(), enough.above(), enough.above(0.2)) == (False, True, False)
