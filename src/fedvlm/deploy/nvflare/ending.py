"""When the certificates of a federation end, and warnings of those that end soon."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509

from fedvlm.deploy.nvflare import keys
from fedvlm.deploy.nvflare.project import RENEWED, SOON, Project, admitted
from fedvlm.errors import FedVLMError

PARTS = {
    "authority": "server/startup/rootCA.pem",
    "server": "server/startup/server.crt",
    "operator": "admin/startup/client.crt",
}


def ends(folder: Path, project: Project) -> dict[str, datetime.datetime]:
    """Who -> the end of its certificate, as far as the files are on this machine.

    Args:
        folder: the federation.
        project: its project. Of the sites, those with an admitted key are looked at.

    Returns:
        ``authority``, ``server``, ``operator`` and names of sites.
    """
    found = {who: _read(folder / path) for who, path in PARTS.items()}
    known = admitted(folder)["sites"]
    for site in (name for name in project.sites if name in known):
        found[site] = admission(folder / "sites" / f"{site}.admission")
    return {who: one.not_valid_after_utc for who, one in found.items() if one}


def warnings(folder: Path, project: Project) -> Iterator[str]:
    """A line for each certificate that ends within 30 days, or has ended."""
    for who, end in ends(folder, project).items():
        yield from _soon(who, end, RENEWED)


def warnings_at_site(certificate: Path, site: str, remedy: str) -> Iterator[str]:
    """The same for a site's own certificate."""
    if found := _read(certificate):
        yield from _soon(site, found.not_valid_after_utc, remedy)


def _soon(who: str, end: datetime.datetime, remedy: str) -> Iterator[str]:
    now = datetime.datetime.now(datetime.UTC)
    if end - now < SOON:
        verb = "ends" if end > now else "ended"
        yield f"the certificate of '{who}' {verb} on {end:%Y-%m-%d}; {remedy}"


def admission(path: Path) -> x509.Certificate | None:
    """The certificate in an operator's answer to a site; None if it cannot be read."""
    try:
        return keys.certificate(keys.read(path, keys.Admission).certificate, "the admission")
    except FedVLMError:
        return None


def _read(path: Path) -> x509.Certificate | None:
    try:
        return keys.certificate(path.read_bytes(), "it")
    except (OSError, FedVLMError):
        return None
