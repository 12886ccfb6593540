"""A site's policy: the requests of a run that the site allows."""

import hashlib
import shutil
import subprocess

import pytest

from fedvlm.config import load
from fedvlm.deploy.policy import Policy, Refused, read_policy, weights_digest
from fedvlm.deploy.site import Site
from fedvlm.errors import ConfigError
from fedvlm.models.load import BUNDLED

RUN = load({"algorithm": {"name": "plora"}})


def test_a_site_that_asks_for_differential_privacy_refuses_runs_without_it():
    with pytest.raises(Refused, match=r"without differential privacy, .*\(dp_required\)"):
        Policy(dp_required=True).check(RUN)


def test_a_site_takes_a_model_by_the_hash_of_its_weights_alone(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED["tiny"], folder)
    right = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    allowed = {"path": str(folder), "sha256": right}
    policy = Policy(models={"tiny": allowed})
    assert policy.localized(RUN, "rows", tmp_path).model.name == str(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(
        Refused, match=f"weights of 'tiny' is [0-9a-f]{{64}}, but .* allows {right}"
    ) as error:
        Site("site-0", RUN, "rows", tmp_path / "state", policy)
    assert str(folder) not in str(error.value), "the server does not learn the site's paths"
    (folder / "model.safetensors").unlink()
    with pytest.raises(Refused, match=r"no folder has files \*\.safetensors"):
        policy.localized(RUN, "rows", tmp_path)


def test_the_hash_of_several_files_is_that_of_what_sha256sum_prints(tmp_path):
    for name in ("model-00002-of-00002", "model-00001-of-00002"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    shell = ["bash", "-c", "sha256sum *.safetensors | sha256sum"]
    said = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert weights_digest(tmp_path) == said.split()[0]


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
