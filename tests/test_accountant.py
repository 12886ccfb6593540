"""The accountant against dp-accounting's own, and the plan of a client."""

from __future__ import annotations

import pytest

from fedvlm.errors import ConfigError
from fedvlm.privacy import accountant
from fedvlm.privacy.accountant import Spend, epsilon, noise_for
from fedvlm.privacy.plan import planned
from fedvlm.settings.privacy import PrivacyConfig

CASES = [(32 / 500, 400, 1e-4), (256 / 2000, 400, 1e-5), (0.01, 100, 1e-6), (1.0, 120, 1e-3)]


def theirs(spends, delta):
    """Epsilon by dp-accounting's accountant of events, with its own finer interval."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    found = PLDAccountant(value_discretization_interval=1e-4)
    for spend in spends:
        event = PoissonSampledDpEvent(spend.rate, GaussianDpEvent(spend.noise))
        found.compose(event, spend.steps)
    return found.get_epsilon(delta)


@pytest.mark.parametrize(("rate", "steps", "delta"), CASES)
def test_the_noise_for_a_budget_has_that_epsilon_by_dp_accounting(rate, steps, delta):
    for budget in (1.0, 8.0):
        noise = noise_for(rate, steps, budget, delta)
        found = theirs([Spend(rate, noise, steps)], delta)
        assert budget * 0.99 <= found <= budget * 1.0001
        assert epsilon([Spend(rate, noise, steps)], delta) <= budget
        assert epsilon([Spend(rate, noise * 0.999, steps)], delta) > budget


def test_different_spends_compose():
    spends = [Spend(0.05, 1.2, 100), Spend(0.2, 3.0, 40), Spend(0.05, 1.2, 50)]
    whole = epsilon(spends, 1e-5)
    assert whole == pytest.approx(theirs(spends, 1e-5), rel=0.01)
    assert whole > epsilon(spends[:2], 1e-5) > epsilon(spends[:1], 1e-5) > epsilon([], 1e-5) == 0


@pytest.mark.parametrize(
    ("rate", "steps", "delta", "budget", "noise"),
    [
        (0.064, 400, 1e-4, 3, 1.77),
        (0.016, 400, 1e-5, 8, 0.60),
        (0.128, 400, 1e-5, 1, 9.65),
        (0.01, 100, 1e-5, 3, 0.65),
    ],
)
def test_the_noise_is_the_one_measured_before(rate, steps, delta, budget, noise):
    assert noise_for(rate, steps, budget, delta) == pytest.approx(noise, abs=0.006)


def settings(**given):
    return PrivacyConfig(unit="row", epsilon=3, delta=1e-3, **given)


def test_a_plan_takes_its_noise_from_the_budget():
    plan = planned(settings(), units=100, batch=20, steps=50)
    assert plan.rate == 0.2
    assert plan.epsilon(50) == pytest.approx(3, rel=1e-3)
    assert plan.fits(50)
    assert not plan.fits(51)
    assert plan.loudness(400) == pytest.approx(plan.noise)


def test_a_batch_takes_at_most_all_units():
    assert planned(settings(), units=10, batch=20, steps=5).rate == 1.0


def test_a_given_noise_stays_and_the_budget_ends_the_run():
    plan = planned(settings(noise=1.0), units=100, batch=20, steps=1000)
    assert plan.noise == 1.0
    assert not plan.fits(1000)
    assert plan.fits(5)


def test_a_delta_that_allows_to_publish_a_unit_is_refused():
    with pytest.raises(ConfigError, match=r"must be below 1 / number of units.* 2000 units"):
        planned(settings(), units=2000, batch=20, steps=5)
    with pytest.raises(ConfigError, match="client 'north' hold 1 unit"):
        planned(settings(), units=1, batch=20, steps=5, client="north")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"unit": "row"}, "unit=row needs epsilon, the budget"),
        ({"unit": "row", "epsilon": 3}, "unit=row needs delta"),
        ({"epsilon": 3}, "epsilon=3 has no meaning without a unit"),
        ({"unit": "row", "epsilon": 3, "delta": 1.0}, "less than 1"),
        ({"unit": "row", "epsilon": 3, "delta": 0.1, "unit_rows": 2}, "no meaning for unit=row"),
    ],
)
def test_settings_without_a_meaning_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        PrivacyConfig(**given)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(accountant, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedvlm\[privacy\]'"):
        accountant.check_installed()
