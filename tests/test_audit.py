"""The audit's statistics, against exact sums and against attackers whose epsilon is known."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import numpy as np
import pytest

from fedvlm.errors import FedVLMError
from fedvlm.privacy import audit
from fedvlm.privacy.audit import SHARES, area, chance, find, found_at, lower_bound


def pmf(count, tries, p):
    return math.comb(tries, count) * p**count * (1 - p) ** (tries - count)


@pytest.mark.parametrize(("right", "guesses", "bound"), [(100, 100, 3.47), (190, 200, 2.39)])
def test_the_bounds_of_a_thousand_canaries_are_those_of_the_paper(right, guesses, bound):
    assert lower_bound(right, guesses, 1000, 1e-5) == pytest.approx(bound, abs=0.01)


def test_three_quarters_of_200_guesses_prove_little():
    assert lower_bound(150, 200, 1000) == pytest.approx(0.82, abs=0.005)
    assert lower_bound(100, 200, 1000) == 0


def test_without_delta_the_chance_is_the_exact_binomial_tail():
    p = Fraction(3, 4)  # a coin for epsilon = log 3
    exact = sum(pmf(k, 40, p) for k in range(33, 41))
    assert chance(33, 40, 500, math.log(3), 0.0) == pytest.approx(float(exact), rel=1e-12)


def test_delta_adds_the_largest_mean_slope_below_the_number_of_right_guesses():
    p, delta = 0.75, 1e-4
    tail = sum(pmf(k, 40, p) for k in range(33, 41))
    slopes = [sum(pmf(k, 40, p) for k in range(33 - i, 33)) / i for i in range(1, 34)]
    expected = tail + 2 * 500 * delta * max(slopes)
    assert chance(33, 40, 500, math.log(3), delta) == pytest.approx(expected, rel=1e-9)
    assert lower_bound(33, 40, 500, delta) < lower_bound(33, 40, 500)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_best_attacker_of_randomized_response_is_rarely_above_its_epsilon(epsilon):
    """Each guess of this attacker is right with the largest probability, so the tail is exact."""
    p, guesses = 1 / (1 + math.exp(-epsilon)), 60
    least = next(k for k in range(guesses + 1) if lower_bound(k, guesses, 500) > epsilon)
    wrong = sum(pmf(k, guesses, p) for k in range(least, guesses + 1))
    assert 0.01 < wrong <= 0.05, "valid at 95 %, and not far from it"


def test_several_numbers_of_guesses_share_the_error():
    scores, trained = np.arange(100.0), np.arange(100) >= 50
    found = find(scores, trained)
    assert [one.guesses for one in found.tried] == [2 * int(100 * share) for share in SHARES]
    assert all(one.right == one.guesses for one in found.tried)
    assert found.best == found.tried[-1]
    assert found.best.epsilon == lower_bound(80, 80, 100, 0.0, 1 - 0.05 / len(SHARES))
    assert found.best.epsilon < lower_bound(80, 80, 100)


def test_guesses_are_in_for_high_scores_and_out_for_low_ones():
    scores, trained = np.arange(40.0), np.arange(40) >= 20
    assert find(-scores, trained).best.right == 0
    assert find(-scores, trained).best.epsilon == 0
    assert find(-scores, trained).auc == 0


def test_scores_without_information_prove_nothing():
    coins = np.random.default_rng(0).random(500) < 0.5
    found = find(np.zeros(500), coins)
    assert (found.best.epsilon, found.auc, found.tpr) == (0, 0.5, 0)
    assert found.best.guesses == 400, "with equal bounds, the one of most guesses is named"


def test_auc_counts_pairs_and_ties_by_half():
    inside, outside = [3.0, 2.0, 2.0], [2.0, 1.0]
    trained = np.array([True] * 3 + [False] * 2)
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    assert area(np.array(inside + outside), trained) == pytest.approx(np.mean(pairs))
    assert area(np.arange(3.0), np.array([True] * 3)) == 0.5


def test_tpr_lets_one_false_positive_in_a_hundred_pass():
    outside = np.arange(200.0)  # two may pass: above 197
    inside = np.array([196.5, 197.0, 197.5, 250.0])
    scores, trained = np.concatenate([outside, inside]), np.arange(204) >= 200
    assert found_at(scores, trained) == 0.5
    assert found_at(np.array([0.0, 1.0, 2.0]), np.array([False, True, True])) == 1.0


def test_a_score_is_what_the_line_through_the_base_losses_leaves():
    base = np.array([1.0, 2.0, 3.0, 4.0, 50.0])
    assert audit.scores(base, 0.9 * base + 2) == pytest.approx(np.zeros(5))
    learnt = np.array([0.1, 5.0, 0.1, 5.0, 0.1])  # the first, the third and the last by heart
    order = np.argsort(audit.scores(base, learnt))
    assert set(order[-3:]) == {0, 2, 4}
    assert audit.scores(np.ones(2), np.array([1.0, 3.0])) == pytest.approx([1, -1])


def test_too_few_canaries_and_diverged_losses_are_refused():
    with pytest.raises(FedVLMError, match="two canaries or more, got 1"):
        find([1.0], [True])
    with pytest.raises(FedVLMError, match="the loss of a canary is nan"):
        find([1.0, math.nan], [True, False])


def test_a_missing_scipy_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(FedVLMError, match=r"pip install 'fedvlm\[privacy\]'"):
        lower_bound(1, 2, 3)
