"""Joins a site to a federation. The site's private key is made here and never leaves.

``STATE/keys/`` has a folder for each key that is in use or waits for its admission. Two small files
name them: ``current`` and ``next``. NVFlare's own files are made anew at each start, from this
code, so that an operator cannot loosen what a site allows.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509

from fedvlm.deploy.nvflare import keys
from fedvlm.deploy.nvflare.keys import Admission, Invitation, Request
from fedvlm.deploy.nvflare.names import INSIDE
from fedvlm.deploy.nvflare.project import SITE_CLASSES, restrict
from fedvlm.errors import FedVLMError
from fedvlm.store import files

FOLDER = "keys"
CURRENT, NEXT = "current", "next"
KEY, CERTIFICATE, JOINED = "site.key", "site.crt", "joined.json"
PARTS = "nvflare.app_common"
COMPONENTS = [
    {
        "id": "resource_manager",
        "path": f"{PARTS}.resource_managers.gpu_resource_manager.GPUResourceManager",
        "args": {"num_of_gpus": 0, "mem_per_gpu_in_GiB": 0, "expiration_period": 300},
    },
    {
        "id": "resource_consumer",
        "path": f"{PARTS}.resource_consumers.gpu_resource_consumer.GPUResourceConsumer",
        "args": {},
    },
    {
        "id": "process_launcher",
        "path": f"{PARTS}.job_launcher.client_process_launcher.ClientProcessJobLauncher",
        "args": {},
    },
]
"""NVFlare's own parts in a site's process, as its provisioning names them."""
RENEWED = (
    "'fedvlm site renew --state {}' asks for a new one, or the operator gives 'fedvlm deploy renew'"
)
UNJOINED = (
    "the state '{}' has joined no federation: 'fedvlm site join NAME.invitation --state {}' makes "
    "its key and a request"
)


def join(invitation: str | Path, state: Path, to: Path | None = None, anew: bool = False) -> Path:
    """Makes a site's key, unless one waits already, and writes a request to be admitted.

    Args:
        invitation: the operator's file for this site.
        state: the site's folder, which gets the key.
        to: path of the request. ``None``: ``NAME.request`` in the working directory.
        anew: make a new key in any case.

    Returns:
        The path of the request, for the operator.

    Raises:
        FedVLMError: the invitation cannot be used, or the site has joined already.
    """
    asked = keys.read(invitation, Invitation)
    _check(asked)
    if _named(state, CURRENT) and not anew:
        raise FedVLMError(
            f"'{state}' has joined as '{joined(state).site}': 'fedvlm site renew' asks for another "
            "certificate, and --new-key makes a new key that the operator must admit anew"
        )
    waiting = _named(state, NEXT)
    known = _read(waiting) if waiting else asked
    if not anew and (known.site, known.root) != (asked.site, asked.root):
        raise FedVLMError(
            f"'{state}' waits for its admission as '{known.site}', and this invitation is for "
            f"'{asked.site}' or of another federation: use another --state, or --new-key to give "
            "the waiting key up"
        )
    if waiting is None or anew or known != asked:
        waiting = _prepared(state, asked)
    request = keys.ask(asked.site, keys.read_key(waiting / KEY))
    return keys.write(to or Path(f"{asked.site}.request"), request)


def renew(state: Path, to: Path | None = None) -> Path:
    """Makes a new key, and a request for its certificate that the present key signs.

    Args:
        state: the folder of a site that has joined.
        to: path of the request. ``None``: ``NAME.request`` in the working directory.

    Returns:
        The path of the request, for the operator.
    """
    present, about = _current(state), joined(state)
    waiting = _named(state, NEXT)
    if waiting is None or _read(waiting) != about:
        waiting = _prepared(state, about)
    old = keys.read_key(present / KEY)
    pair = (keys.certificate((present / CERTIFICATE).read_bytes(), "the certificate"), old)
    request: Request = keys.ask(about.site, keys.read_key(waiting / KEY), pair)
    return keys.write(to or Path(f"{about.site}.request"), request)


def install(admission: str | Path, state: Path) -> str:
    """Takes the operator's admission of the waiting key, or of the present one.

    A new certificate of the federation's authority is taken too, if its key is the one that this
    site knows.

    Returns:
        The day on which the certificate ends.

    Raises:
        FedVLMError: the certificate is not of this site's key, or not of its federation.
    """
    found = keys.read(admission, Admission)
    about = keys.certificate(found.certificate, f"the certificate in '{admission}'")
    folders = [f for f in (_named(state, NEXT), _named(state, CURRENT)) if f]
    if not folders:
        raise FedVLMError(UNJOINED.format(state, state))
    own = {keys.fingerprint(keys.read_key(folder / KEY)): folder for folder in folders}
    folder = own.get(keys.fingerprint(about))
    if folder is None:
        raise FedVLMError(
            f"'{admission}' is refused: it admits the key {keys.grouped(keys.fingerprint(about))}, "
            f"which is not in '{state}'"
        )
    invitation = _read(folder)
    root = keys.certificate(invitation.root, "the federation's certificate")
    if not keys.signed_by(about, root) or keys.common_name(about) != invitation.site:
        raise FedVLMError(
            f"'{admission}' is refused: its certificate is not for '{invitation.site}' by the "
            f"federation with the fingerprint {keys.grouped(keys.fingerprint(root))}"
        )
    if renewed := _renewed_root(found, root):
        keys.write(folder / JOINED, invitation.model_copy(update={"root": keys.pem(renewed)}))
    files.write_text(folder / CERTIFICATE, keys.pem(about))
    files.write_text(state / FOLDER / CURRENT, folder.name)
    (state / FOLDER / NEXT).unlink(missing_ok=True)
    for other in (state / FOLDER).iterdir():
        if other.is_dir() and other != folder:
            shutil.rmtree(other)
    return f"{about.not_valid_after_utc:%Y-%m-%d}"


def _renewed_root(found: Admission, known: x509.Certificate) -> x509.Certificate | None:
    """The authority's certificate in an admission, if it ends later than the known one.

    Raises:
        FedVLMError: it is of another key or name.
    """
    if found.root is None:
        return None
    fresh = keys.certificate(found.root, "the federation's certificate in the admission")
    same = keys.fingerprint(fresh) == keys.fingerprint(known) and fresh.subject == known.subject
    if not same or not keys.signed_by(fresh, fresh):
        raise FedVLMError(
            "the admission is refused: its authority is not the one that this site has joined, "
            f"which has the fingerprint {keys.grouped(keys.fingerprint(known))}"
        )
    return fresh if fresh.not_valid_after_utc > known.not_valid_after_utc else None


def joined(state: Path, waiting: bool = False) -> Invitation:
    """The federation that a site has joined.

    Args:
        state: the site's folder.
        waiting: also one that has not admitted the site yet.

    Raises:
        FedVLMError: there is none.
    """
    return _read((_named(state, NEXT) if waiting else None) or _current(state))


def fingerprints(state: Path) -> dict[str, str]:
    """The fingerprints of a site: ``federation``, and of its ``key`` and its ``next`` key.

    Raises:
        FedVLMError: the site has no key.
    """
    found: dict[str, str] = {}
    for name, mark in (("key", CURRENT), ("next", NEXT)):
        if folder := _named(state, mark):
            root = keys.certificate(_read(folder).root, "the federation's certificate")
            found["federation"] = keys.fingerprint(root)
            found[name] = keys.fingerprint(keys.read_key(folder / KEY))
    if not found:
        raise FedVLMError(UNJOINED.format(state, state))
    return found


def equip(state: Path, workspace: Path) -> str:
    """Writes the files with which NVFlare's client starts. Returns the site's name.

    Args:
        state: the folder of a site that has joined.
        workspace: NVFlare's folder.
    """
    folder, about = _current(state), joined(state)
    for part in ("startup", "local"):
        shutil.rmtree(workspace / part, ignore_errors=True)
    for path in (workspace, workspace / "startup", workspace / "local"):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    names = [(KEY, "client.key"), (CERTIFICATE, "client.crt")]
    if not (folder / KEY).exists():
        keys.place_secret(workspace / "startup" / "client.key", KEY)
        names = names[1:]
    for source, target in names:
        text = (folder / source).read_bytes()
        handle = os.open(workspace / "startup" / target, os.O_CREAT | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(text)
    (workspace / "startup" / "rootCA.pem").write_text(about.root)
    for name, tree in _nvflare(about).items():
        (workspace / name).write_text(json.dumps(tree, indent=2))
    (workspace / "local" / "comm_config.json").write_text(json.dumps(INSIDE))
    restrict(workspace / "local", SITE_CLASSES)
    return about.site


def _nvflare(about: Invitation) -> dict[str, Any]:
    """NVFlare's files of a site: path -> content. ``restrict`` completes those in ``local``."""
    template = resources.files("nvflare.lighter") / "templates" / "master_template.yml"
    logs = yaml.safe_load(template.read_text(encoding="utf-8"))["log_config"]
    target = {"target": f"{about.address}:{about.port}", "scheme": "grpc"}
    start = {
        "format_version": 2,
        "servers": [{"name": about.project, "service": target, "identity": about.address}],
        "client": {
            "ssl_private_key": "client.key",
            "ssl_cert": "client.crt",
            "ssl_root_cert": "rootCA.pem",
            "fqsn": about.site,
            "is_leaf": True,
            "connection_security": "mtls",
        },
    }
    return {
        "startup/fed_client.json": start,
        "local/resources.json.default": {
            "format_version": 2,
            "client": {"retry_timeout": 30, "compression": "Gzip"},
            "components": COMPONENTS,
        },
        "local/log_config.json.default": json.loads(logs),
    }


def _check(asked: Invitation) -> None:
    """Refuses an invitation whose authority is none, or has ended."""
    root = keys.certificate(asked.root, "the federation's certificate in the invitation")
    if not keys.signed_by(root, root):
        raise FedVLMError("the invitation is refused: its federation's certificate is no authority")
    if keys.left(root) < datetime.timedelta():
        end = f"{root.not_valid_after_utc:%Y-%m-%d}"
        raise FedVLMError(f"the invitation is refused: its federation ended on {end}")


def _prepared(state: Path, about: Invitation) -> Path:
    """Makes a key that waits for its admission. Returns its folder."""
    home = state / FOLDER
    for folder in (state, home):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    home.chmod(0o700)
    fresh = home / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    key = keys.new_key(fresh / KEY)
    keys.write(fresh / JOINED, about)
    folder = home / keys.fingerprint(key)[:16]
    fresh.rename(folder)
    files.write_text(home / NEXT, folder.name)
    return folder


def _read(folder: Path) -> Invitation:
    return keys.read(folder / JOINED, Invitation)


def _named(state: Path, mark: str) -> Path | None:
    """The folder of a key that ``current`` or ``next`` names."""
    path = state / FOLDER / mark
    return state / FOLDER / path.read_text().strip() if path.exists() else None


def _current(state: Path) -> Path:
    found = _named(state, CURRENT)
    if found is None:
        waits = _named(state, NEXT) is not None
        raise FedVLMError(
            f"'{state}' is not admitted yet: 'fedvlm site join NAME.admission --state {state}' "
            "takes the operator's answer"
            if waits
            else UNJOINED.format(state, state)
        )
    return found
