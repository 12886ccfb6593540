"""The files that NVFlare reads: names, certificates, start-up kits and jobs of a federation."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, field_validator

from fedvlm import config as configs
from fedvlm.deploy.nvflare.names import ADMIN
from fedvlm.deploy.policy import check_name
from fedvlm.deploy.remote import Limits
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.settings.method import Positive, Section
from fedvlm.store import files

SOON = datetime.timedelta(days=30)  # a certificate is renewed this long before its end
RENEWED = (
    "on the server's machine, 'fedvlm deploy init project.yml' again; then hand out the new kit"
)
PROJECT = "project.yml"
SERVER_CLASSES = (
    "nvflare.collab.runtime.controller.CollabController",
    "fedvlm.deploy.nvflare.server.Server",
)
SITE_CLASSES = (
    "nvflare.collab.runtime.executor.CollabExecutor",
    "fedvlm.deploy.nvflare.client.Client",
)
Port = Annotated[int, Field(ge=1, le=65535)]


class Server(Section):
    """Address and ports of the server."""

    address: str = Field(description="host name that all sites can resolve; in its certificate")
    port: Port = 8002
    admin_port: Port = Field(8003, description="for fedvlm deploy run, status and abort")

    @field_validator("address")
    @classmethod
    def _is_a_name(cls, address: str) -> str:
        try:
            ipaddress.ip_address(address)
        except ValueError:
            return address
        raise ValueError("a host name, which certificates need; /etc/hosts can give one")


class Project(Section):
    """``project.yml``: the server and the sites of a federation."""

    name: str = "fedvlm"
    server: Server
    sites: list[str] = Field(min_length=1)
    days: Positive = Field(360, description="how long the certificate authority is valid")

    @field_validator("sites")
    @classmethod
    def _are_names(cls, sites: list[str]) -> list[str]:
        wrong = [p for site in sites for p in _problems(site)]
        if len(set(sites)) < len(sites):
            wrong.append("a site is named twice")
        if wrong:
            raise ValueError("; ".join(wrong))
        return sites


def _problems(site: str) -> list[str]:
    try:
        check_name(site)
    except ConfigError as error:
        return error.problems
    return []


def read_project(path: str | Path) -> Project:
    """Reads the description of a federation.

    Raises:
        ConfigError: the file has mistakes; the error lists all of them.
    """
    return configs.read_file(path, Project, "project")


def provision(project: Project, folder: Path) -> dict[str, Path]:
    """Writes certificates and kits. Called again, it adds new sites and renews certificates.

    Args:
        project: the description of the federation.
        folder: gets ``ca``, ``server``, ``admin`` and ``sites/NAME.zip``. ``ca`` has the private
            keys of all: keep it off every other machine.

    Returns:
        ``server``, ``admin`` or the name of a site -> the path of its kit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ca = folder / "ca"
    ca.mkdir(mode=0o700, exist_ok=True)
    _forget_ending(ca / project.name / "state" / "cert.json")
    described = ca / "nvflare.yml"
    described.write_text(yaml.safe_dump(_nvflare(project), sort_keys=False))
    command = [
        sys.executable,
        "-m",
        "nvflare.lighter.provision",
        "-p",
        described,
        "-w",
        ca,
        "--force",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    made = sorted((ca / project.name).glob("prod_*"))
    if done.returncode or not made:
        raise FedVLMError(f"certificates could not be made: {(done.stderr or done.stdout)[-2000:]}")
    kits: dict[str, Path] = {}
    for who, source, target in (
        ("server", project.server.address, folder / "server"),
        ("admin", ADMIN, folder / "admin"),
        *((site, site, folder / "sites" / site) for site in project.sites),
    ):
        for part in ("startup", "local"):
            shutil.rmtree(target / part, ignore_errors=True)
            shutil.copytree(made[-1] / source / part, target / part)
        for script in (target / "startup").glob("*.sh"):
            script.unlink()  # they would start NVFlare without our settings
        target.chmod(0o700)
        kits[who] = target
    for site in project.sites:
        _restrict(kits[site] / "local", SITE_CLASSES)
        kits[site] = _zipped(kits[site])
    _restrict(kits["server"] / "local", SERVER_CLASSES)
    (folder / PROJECT).write_text(yaml.safe_dump(project.model_dump(), sort_keys=False))
    return kits


def _forget_ending(path: Path) -> None:
    """Removes the certificates that end soon, so that NVFlare makes new ones.

    NVFlare keeps every certificate that it has made, even an expired one.

    Args:
        path: NVFlare's file with all certificates. It may not exist yet.
    """
    if not path.exists():
        return
    tree = json.loads(path.read_text())
    kept = {
        who: made
        for who, made in tree.items()
        if not (isinstance(made, dict) and _left(made["cert"].encode())[1] < SOON)
    }
    if kept != tree:
        files.write_text(path, json.dumps(kept))


def _nvflare(project: Project) -> dict[str, Any]:
    server = {
        "name": project.server.address,
        "type": "server",
        "org": "fedvlm",
        "fed_learn_port": project.server.port,
        "admin_port": project.server.admin_port,
    }
    sites = [{"name": site, "type": "client", "org": "fedvlm"} for site in project.sites]
    admin = {"name": ADMIN, "type": "admin", "org": "fedvlm", "role": "project_admin"}
    implementations = "nvflare.lighter.impl"
    return {
        "api_version": 3,
        "name": project.name,
        "participants": [server, *sites, admin],
        "builders": [
            {
                "path": f"{implementations}.workspace.WorkspaceBuilder",
                "args": {"template_file": "master_template.yml"},
            },
            {
                "path": f"{implementations}.static_file.StaticFileBuilder",
                "args": {"config_folder": "config", "scheme": "grpc"},
            },
            {
                "path": f"{implementations}.cert.CertBuilder",
                "args": {"root_valid_days": project.days},
            },
            {"path": f"{implementations}.signature.SignatureBuilder"},
        ],
    }


def _restrict(local: Path, classes: tuple[str, ...]) -> None:
    """Allows our jobs only: a job carries no code and creates no classes but ``classes``."""
    tree = json.loads((local / "resources.json.default").read_text())
    tree["class_list_enforcement_mode"] = "enforce"
    tree["class_allow_list"] = list(classes)
    unwanted = ("log_receiver", "site_log_streamer")
    tree["components"] = [c for c in tree["components"] if c["id"] not in unwanted]
    tree.pop("allow_log_streaming", None)
    (local / "resources.json").write_text(json.dumps(tree, indent=2))
    rights = ("submit_job", "manage_job", "view", "operate")
    denied = ("byoc", "clone_job", "download_job", "shell_commands", "server-predeployed-flwr")
    allowed = dict.fromkeys(rights, "any") | dict.fromkeys(denied, "none")
    text = {"format_version": "1.0", "permissions": {"project_admin": allowed}}
    (local / "authorization.json").write_text(json.dumps(text, indent=2))
    for unused in local.glob("*.default"):
        if unused.name != "log_config.json.default":
            unused.unlink()


def _zipped(kit: Path) -> Path:
    """Packs a kit into one file that only its owner may read, and removes the kit's folder."""
    path = kit.with_suffix(".zip")
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("fedvlm.json", json.dumps({"site": kit.name}))
        for entry in sorted(kit.rglob("*")):
            if entry.is_file():
                archive.write(entry, entry.relative_to(kit))
    shutil.rmtree(kit)
    return path


def unpacked(kit: str | Path, workspace: Path) -> str:
    """Unpacks a site's kit where NVFlare's client looks for it. Returns the site's name.

    Raises:
        FedVLMError: the file is no kit.
    """
    try:
        with zipfile.ZipFile(kit) as archive:
            name = json.loads(archive.read("fedvlm.json"))["site"]
            for part in ("startup", "local"):
                shutil.rmtree(workspace / part, ignore_errors=True)
            workspace.mkdir(parents=True, exist_ok=True, mode=0o700)
            archive.extractall(workspace)
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise FedVLMError(
            f"'{kit}' is no start-up kit of a site, such as sites/north.zip that 'fedvlm deploy "
            f"init' writes: {error}"
        ) from None
    workspace.chmod(0o700)
    return check_name(name)


def check_certificate(path: Path) -> str:
    """Returns a warning if a certificate ends soon, else an empty text.

    Raises:
        FedVLMError: the certificate has expired.
    """
    end, left = _left(path.read_bytes())
    if left < datetime.timedelta():
        raise FedVLMError(f"the certificate '{path}' ended on {end}: {RENEWED}")
    return f"the certificate ends on {end}; {RENEWED}" if left < SOON else ""


def _left(certificate: bytes) -> tuple[str, datetime.timedelta]:
    """The day on which a certificate ends, and the time until then."""
    from cryptography import x509

    end = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    return f"{end:%Y-%m-%d}", end - datetime.datetime.now(datetime.UTC)


def write_job(folder: Path, job: Path, sites: list[str], limits: Limits) -> Path:
    """Writes a job for NVFlare: names of classes that the kits allow, and no code."""
    controller, server = SERVER_CLASSES
    executor, client = SITE_CLASSES
    threads = {"max_call_threads": limits.at_once + 4}
    collab = {"server_obj_id": "_server", "sync_task_timeout": 120, **threads}
    described = {
        "meta.json": {
            "name": "fedvlm",
            "resource_spec": {},
            "min_clients": limits.min_sites,
            "deploy_map": {"at_server": ["server"], "at_site": sites},
        },
        "at_server/config/config_fed_server.json": {
            "format_version": 2,
            "workflows": [{"id": "controller", "path": controller, "args": collab}],
            "components": [{"id": "_server", "path": server, "args": {"job": str(job)}}],
        },
        "at_site/config/config_fed_client.json": {
            "format_version": 2,
            "executors": [
                {
                    "tasks": ["*"],
                    "executor": {
                        "path": executor,
                        "args": {"client_obj_id": "_client", "max_call_threads": 4},
                    },
                }
            ],
            "components": [{"id": "_client", "path": client, "args": {}}],
        },
    }
    for name, tree in described.items():
        files.write_text(folder / name, json.dumps(tree, indent=2))
    return folder
