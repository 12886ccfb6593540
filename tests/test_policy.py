"""A site's policy: the requests of a run that the site allows."""

import pytest

from fedvlm.config import load
from fedvlm.deploy.policy import Policy, Refused, read_policy
from fedvlm.errors import ConfigError

RUN = load({"algorithm": {"name": "plora"}})


def test_a_site_that_asks_for_differential_privacy_refuses_runs_without_it():
    with pytest.raises(Refused, match=r"without differential privacy, .*\(dp_required\)"):
        Policy(dp_required=True).check(RUN)


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
        ("set: {train.lr: 1}", "a site sets model, data, engine, eval only"),
    ],
)
def test_a_wrong_policy_says_what_is_wrong(text, said, tmp_path):
    (tmp_path / "p.yml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_policy(tmp_path / "p.yml")
