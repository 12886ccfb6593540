"""A site's policy: the requests of a run that the site allows."""

import pytest

from fedvlm.config import load
from fedvlm.deploy.policy import Policy, Refused, read_policy
from fedvlm.errors import ConfigError

RUN = load({"algorithm": {"name": "plora"}})


HOW = "set privacy.unit, privacy.epsilon and privacy.delta"
LIMITED = {"epsilon_max": 3, "delta_max": 1e-5}


def private(**settings):
    tree = {"unit": "row", "epsilon": 3, "delta": 1e-5, **settings}
    return load({"algorithm": {"name": "plora"}, "privacy": tree})


@pytest.mark.parametrize(
    ("policy", "run", "said"),
    [
        (
            {"dp_required": True},
            RUN,
            f"training without differential privacy, which the site requires (dp_required): {HOW}",
        ),
        (
            LIMITED,
            RUN,
            "training without differential privacy, which bounds no epsilon, and the limit is 3 "
            f"(epsilon_max): {HOW}",
        ),
        (
            {"delta_max": 1e-5},
            RUN,
            "training without differential privacy, which bounds no delta, and the limit is 1e-05 "
            f"(delta_max): {HOW}",
        ),
        (
            LIMITED,
            private(epsilon=3.5),
            "epsilon 3.5 (privacy.epsilon), and the limit is 3 (epsilon_max)",
        ),
        (
            LIMITED,
            private(delta=1e-4),
            "delta 0.0001 (privacy.delta), and the limit is 1e-05 (delta_max)",
        ),
        (
            {},
            private(unit="client"),
            "privacy.unit=client, which is for simulations: a site protects row, or a column",
        ),
    ],
)
def test_a_run_that_a_site_does_not_protect_enough_is_refused_by_name(policy, run, said):
    with pytest.raises(Refused) as error:
        Policy(**policy).check(run)
    assert str(error.value) == f"the site's policy refuses this run: it asks for {said}"


def test_a_run_within_the_sites_limits_on_privacy_is_allowed():
    for policy in ({}, {"dp_required": True}, LIMITED, LIMITED | {"dp_required": True}):
        Policy(**policy).check(private())
    Policy().check(RUN)


def test_a_sites_own_unit_replaces_that_of_a_private_run():
    policy = Policy(dp_unit="patient_id")
    for unit in ("row", "visit"):
        assert policy.localized(private(unit=unit), "x", "y").privacy.unit == "patient_id"
    assert policy.localized(RUN, "x", "y").privacy.unit is None
    row = Policy(dp_unit="row").localized(private(unit="visit", unit_rows=2), "x", "y").privacy
    assert (row.unit, row.column) == ("row", None)
    assert Policy().localized(private(unit="visit", unit_rows=2), "x", "y").privacy.unit_rows == 2


def test_a_policy_may_name_an_algorithm_by_an_alias(tmp_path):
    (tmp_path / "p.yml").write_text("algorithms: [fedavg]")
    policy = read_policy(tmp_path / "p.yml")
    policy.check(load({"algorithm": {"name": "lora"}}))
    with pytest.raises(Refused, match="algorithm 'plora', but the site allows fedavg"):
        policy.check(RUN)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds: 0", "rounds"),
        ("algoritms: [lora]", "algoritms"),
        ("algorithms: [nope]", "there is no 'nope'"),
        ("models: {a: {path: /m, sha256: abc}}", "models.a.sha256"),
        ("models: {a: {sha256: x}}", "models.a.path"),
        ("epsilon_max: 3", "epsilon_max=3 needs delta_max"),
        ("{epsilon_max: 0, delta_max: 0.1}", "epsilon_max"),
        ("dp_unit: client", "the unit of a site is row, or a column"),
        ("set: {train.lr: 1}", "a site sets model, data, engine, eval only"),
    ],
)
def test_a_wrong_policy_says_what_is_wrong(text, said, tmp_path):
    (tmp_path / "p.yml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_policy(tmp_path / "p.yml")
