"""The files of a federation: the operator's keys and kits, invitations to sites, and jobs."""

from __future__ import annotations

import datetime
import ipaddress
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pydantic import Field, field_validator, model_validator

from fedvlm import config as configs
from fedvlm.deploy.nvflare import keys
from fedvlm.deploy.nvflare.names import ADMIN, INSIDE
from fedvlm.deploy.nvflare.prolonging import prolonged
from fedvlm.deploy.policy import check_name
from fedvlm.deploy.remote import Limits
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.settings.method import Positive, Ratio, Section
from fedvlm.store import files
from fedvlm.version import BY, check_format, written_by

SOON = datetime.timedelta(days=30)  # a certificate is renewed this long before its end
RENEWED = "give 'fedvlm deploy renew', and restart the server"
PROJECT = "project.yml"
ADMITTED = "admitted.json"
SERVER_CLASSES = (
    "nvflare.collab.runtime.controller.CollabController",
    "fedvlm.deploy.nvflare.server.Server",
)
SITE_CLASSES = (
    "nvflare.collab.runtime.executor.CollabExecutor",
    "fedvlm.deploy.nvflare.client.Client",
)
GATE = {"id": "gate", "path": "fedvlm.deploy.nvflare.gate.Gate", "args": {}}
"""The part of the server's process that lets in admitted keys only. Its list is set at start."""
UNADMITTED = "refused a key that is not admitted"
CLOSED = "closed the connection of a key that is no longer admitted"
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
    rows: dict[str, Positive] = Field({}, description="site -> its most training rows in a mean")
    max_weight: Ratio = Field(
        2.0, description="most weight of a site without an entry in rows, in medians of the sites"
    )

    @field_validator("sites")
    @classmethod
    def _are_names(cls, sites: list[str]) -> list[str]:
        wrong = [p for site in sites for p in _problems(site)]
        if len(set(sites)) < len(sites):
            wrong.append("a site is named twice")
        if wrong:
            raise ValueError("; ".join(wrong))
        return sites

    @model_validator(mode="after")
    def _differ(self) -> Project:
        if self.server.address.lower() in map(str.lower, self.sites):
            raise ValueError(f"'{self.server.address}' names the server and a site")
        return self

    @field_validator("rows")
    @classmethod
    def _are_sites(cls, rows: dict[str, int], info: Any) -> dict[str, int]:
        unknown = sorted(rows.keys() - {*info.data.get("sites", rows)})
        if unknown:
            raise ValueError(f"'{unknown[0]}' is no site of this project: add it to sites")
        return rows


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
    """Writes the operator's keys and kits, and an invitation for every site.

    Called again, it renews certificates that end soon, invites new sites, and revokes the keys of
    sites that the project no longer names. No key of a site is made, or has a place, here.

    Args:
        project: the description of the federation.
        folder: gets ``ca``, ``server``, ``admin``, ``admitted.json`` and
            ``sites/NAME.invitation``. ``ca`` has the authority's private key.

    Returns:
        ``server``, ``admin`` or the name of a site -> the path of its kit or invitation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = _made(project, folder / "ca")
    kits: dict[str, Path] = {}
    for who, source in (("server", project.server.address), ("admin", ADMIN)):
        target = kits[who] = folder / who
        for part in ("startup", "local"):
            shutil.rmtree(target / part, ignore_errors=True)
            shutil.copytree(made / source / part, target / part)
        for script in (target / "startup").glob("*.sh"):
            script.unlink()  # they would start NVFlare without our settings
        target.chmod(0o700)
    shutil.rmtree(made)  # NVFlare's state has what it needs again
    state_of(folder, project).chmod(0o600)
    restrict(kits["server"] / "local", SERVER_CLASSES, GATE)
    place(folder)  # a server that runs starts the processes of its next jobs from these files
    root = (kits["server"] / "startup" / "rootCA.pem").read_text()
    for site in project.sites:
        invitation = keys.Invitation(
            site=site,
            project=project.name,
            address=project.server.address,
            port=project.server.port,
            root=root,
        )
        kits[site] = keys.write(folder / "sites" / f"{site}.invitation", invitation)
    _list(project, folder)
    files.write_text(folder / PROJECT, yaml.safe_dump(project.model_dump(), sort_keys=False))
    return kits


def place(folder: Path) -> None:
    """Writes the places of a federation's files into those that NVFlare's server reads.

    Args:
        folder: the federation, which may have been moved.
    """
    server = (folder / "server").absolute()
    path = server / "local" / "resources.json"
    tree = json.loads(path.read_text())
    storage = tree["snapshot_persistor"]["args"]["storage"]["args"]
    storage["root_dir"] = str(server / "snapshots")
    for component in tree["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(server / "jobs")
        if component["id"] == GATE["id"]:
            component["args"]["admitted"] = str(folder.absolute() / ADMITTED)
    path.write_text(json.dumps(tree, indent=2))
    files.write_text(server / "local" / "comm_config.json", json.dumps(INSIDE))
    (server / "transfer").mkdir(exist_ok=True)


def _made(project: Project, ca: Path) -> Path:
    """Lets NVFlare make the authority and the kits of server and operator. Returns their folder."""
    ca.mkdir(mode=0o700, exist_ok=True)
    _clean(project, ca)
    described = ca / "nvflare.yml"
    described.write_text(yaml.safe_dump(_nvflare(project), sort_keys=False))
    command = [sys.executable, "-m", "nvflare.lighter.provision"]
    command += ["-p", str(described), "-w", str(ca), "--force"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    made = sorted((ca / project.name).glob("prod_*"))
    if done.returncode or not made:
        raise FedVLMError(f"certificates could not be made: {(done.stderr or done.stdout)[-2000:]}")
    return made[-1]


def state_of(folder: Path, project: Project) -> Path:
    """Path of NVFlare's file with the authority's key, and the keys of server and operator."""
    return folder / "ca" / project.name / "state" / "cert.json"


def admitted(folder: Path) -> dict[str, Any]:
    """The keys that the server lets in, by their fingerprints.

    Returns:
        ``operator``: the name in the operator's certificate. ``admin``: the operator's key.
        ``sites``: site -> its keys, the newest last. ``revoked``: keys that stay refused.

    Raises:
        FedVLMError: a newer version of fedvlm has written the list.
    """
    path = folder / ADMITTED
    found: dict[str, Any] = {"operator": ADMIN, "admin": "", "sites": {}, "revoked": []}
    if path.exists():
        found |= json.loads(path.read_text())
        check_format(found, path)
        found.pop(BY, None)
    return found


def write_admitted(folder: Path, kept: Mapping[str, Any]) -> None:
    """Writes what :func:`admitted` reads."""
    text = json.dumps({**kept, BY: written_by()}, indent=2)
    files.write_text(folder / ADMITTED, text + "\n")


def _list(project: Project, folder: Path) -> None:
    """Writes the operator's key to the list, and revokes sites that have left the project."""
    kept = admitted(folder)
    for site in [site for site in kept["sites"] if site not in project.sites]:
        kept["revoked"] += kept["sites"].pop(site)
    mine = (folder / "admin" / "startup" / "client.crt").read_bytes()
    kept["admin"] = keys.fingerprint(keys.certificate(mine, "the operator's certificate"))
    write_admitted(folder, kept)


def _clean(project: Project, ca: Path) -> None:
    """Prolongs certificates that end soon, and removes keys of sites.

    NVFlare keeps every certificate that it has made, even an expired one. Version 0.1 made the
    sites' keys here.
    """
    for old in (ca / project.name).glob("prod_*"):
        shutil.rmtree(old)
    for kit in (ca.parent / "sites").glob("*.zip"):
        kit.unlink()
    path = state_of(ca.parent, project)
    if not path.exists():
        return
    tree = json.loads(path.read_text())
    own = (project.server.address, ADMIN)
    kept = {who: made for who, made in tree.items() if not isinstance(made, dict) or who in own}
    if kept != tree:
        files.write_text(path, json.dumps(kept))
    pairs = [made for made in kept.values() if isinstance(made, dict)]
    if any(_left(made["cert"].encode())[1] < SOON for made in pairs):
        root = keys.certificate(kept["root_cert"], "the authority's certificate")
        authority = serialization.load_pem_private_key(kept["root_pri_key"].encode(), None)
        assert isinstance(authority, rsa.RSAPrivateKey), "NVFlare makes RSA keys only"
        prolong(path, root, authority)


def prolong(state: Path, root: x509.Certificate, authority: rsa.RSAPrivateKey) -> None:
    """Prolongs the server's and the operator's certificates in NVFlare's file.

    Args:
        state: see :func:`state_of`.
        root: the authority's certificate, which may be new.
        authority: its key.
    """
    tree = {**json.loads(state.read_text()), "root_cert": keys.pem(root)}
    for made in (part for part in tree.values() if isinstance(part, dict)):
        old = keys.certificate(made["cert"], "a certificate in ca/")
        fresh = prolonged(old, authority, keys.VALID.days, root.not_valid_after_utc)
        made["cert"] = keys.pem(fresh)
    files.write_text(state, json.dumps(tree))


def _nvflare(project: Project) -> dict[str, Any]:
    server = {
        "name": project.server.address,
        "type": "server",
        "org": "fedvlm",
        "fed_learn_port": project.server.port,
        "admin_port": project.server.admin_port,
    }
    admin = {"name": ADMIN, "type": "admin", "org": "fedvlm", "role": "project_admin"}
    implementations = "nvflare.lighter.impl"
    return {
        "api_version": 3,
        "name": project.name,
        "participants": [server, admin],
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


def restrict(local: Path, classes: tuple[str, ...], *more: dict[str, Any]) -> None:
    """Allows our jobs only: a job carries no code and creates no classes but ``classes``.

    Args:
        local: the folder ``local`` of a kit, with NVFlare's default files.
        classes: what a job may create.
        more: further components of the process itself.
    """
    tree = json.loads((local / "resources.json.default").read_text())
    tree["class_list_enforcement_mode"] = "enforce"
    tree["class_allow_list"] = list(classes)
    unwanted = ("log_receiver", "site_log_streamer")
    tree["components"] = [c for c in tree["components"] if c["id"] not in unwanted] + list(more)
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


def check_certificate(path: Path, remedy: str = RENEWED) -> None:
    """Refuses a certificate that has ended.

    Args:
        path: the certificate.
        remedy: what a person should do.

    Raises:
        FedVLMError: the certificate has expired.
    """
    end, left = _left(path.read_bytes())
    if left < datetime.timedelta():
        raise FedVLMError(f"the certificate '{path}' ended on {end}: {remedy}")


def _left(certificate: bytes) -> tuple[str, datetime.timedelta]:
    """The day on which a certificate ends, and the time until then."""
    found = x509.load_pem_x509_certificate(certificate)
    return f"{found.not_valid_after_utc:%Y-%m-%d}", keys.left(found)


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
