"""The operator's side of a federation's keys: invite, admit, renew, revoke.

``federation/admitted.json`` lists the keys that the server lets in. The server reads the list
again whenever it changes, so that a revoked key loses its connection within seconds.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from fedvlm.deploy.nvflare import keys
from fedvlm.deploy.nvflare.ending import admission, ends
from fedvlm.deploy.nvflare.keys import Admission, Request
from fedvlm.deploy.nvflare.processes import read_federation
from fedvlm.deploy.nvflare.project import (
    ADMITTED,
    Project,
    admitted,
    prolong,
    provision,
    state_of,
    write_admitted,
)
from fedvlm.deploy.nvflare.prolonging import prolonged
from fedvlm.errors import FedVLMError
from fedvlm.store import files

PATIENCE = 20.0  # seconds to wait for another command of the operator


def admit(
    folder: Path,
    request: str | Path,
    confirm: Callable[[str, str], bool],
    replace: bool = False,
) -> Path:
    """Signs the key of a site, and lets it in.

    A request that a present key has signed needs no confirmation, nor does the present key.

    Args:
        folder: the federation.
        request: the site's file.
        confirm: called with the site's name and the fingerprint of a new key. Returns whether the
            site has confirmed it.
        replace: revoke the site's present keys in favour of this one.

    Returns:
        The path of the admission, for the site.

    Raises:
        FedVLMError: the request is refused; nothing has changed.
    """
    project = read_federation(folder)
    asked = keys.read(request, Request)
    csr = keys.asked(asked)
    if asked.site not in project.sites:
        raise FedVLMError(
            f"'{asked.site}' is no site of this federation ({', '.join(project.sites)}): add it to "
            "project.yml and run 'fedvlm deploy init project.yml' again, or send the site its own "
            "invitation"
        )
    root, authority = _authority(folder, project)
    mark = keys.fingerprint(csr)
    with _changing(folder) as kept:
        present = kept["sites"].get(asked.site, [])
        if mark in kept["revoked"]:
            raise FedVLMError(
                f"the key {keys.grouped(mark)} of '{asked.site}' was revoked: the site makes a new "
                "one with 'fedvlm site join NAME.invitation --new-key'"
            )
        _refuse_another(asked.site, mark, kept)
        signer = keys.renewed(asked, root)
        if signer is not None and signer not in present:
            raise FedVLMError(
                f"the request of '{asked.site}' is refused: it is signed by the key "
                f"{keys.grouped(signer)}, which is not admitted"
            )
        if present and mark not in present and signer is None and not replace:
            raise FedVLMError(
                f"'{asked.site}' is admitted with another key, {keys.grouped(present[-1])}: if its "
                "key is lost, --replace revokes that one and admits this one"
            )
        if mark not in present and signer is None and not confirm(asked.site, mark):
            raise FedVLMError(f"'{asked.site}' was not admitted: its fingerprint is not confirmed")
        signed = keys.sign(csr, asked.site, root, authority)
        remaining = [signer] if signer else present if mark in present else []
        kept["revoked"] += [old for old in present if old not in remaining and old != mark]
        kept["sites"][asked.site] = [old for old in remaining if old != mark] + [mark]
    return keys.write(
        folder / "sites" / f"{asked.site}.admission",
        Admission(site=asked.site, certificate=keys.pem(signed), root=keys.pem(root)),
    )


def renew(folder: Path) -> dict[str, datetime.datetime]:
    """Makes new certificates of the authority, the server, the operator and all admitted sites.

    All keep their keys, so no fingerprint changes. A site gets its certificate, and that of the
    authority, with ``sites/NAME.admission``. Until it has taken them, it goes on with the old ones.

    Returns:
        Who -> the end of the certificate, see :func:`fedvlm.deploy.nvflare.ending.ends`. A site
        whose present key is not known here, because its admission is gone, is missing.

    Raises:
        FedVLMError: the authority's key is not on this machine.
    """
    project = read_federation(folder)
    old, authority = _authority(folder, project)
    root = prolonged(old, authority, project.days)
    prolong(state_of(folder, project), root, authority)
    provision(project, folder)
    with _changing(folder) as kept:
        for site, marks in kept["sites"].items():
            path = folder / "sites" / f"{site}.admission"
            present = admission(path)
            if present is None or keys.fingerprint(present) not in marks:
                path.unlink(missing_ok=True)
                continue
            signed = keys.pem(keys.sign(present, site, root, authority))
            keys.write(path, Admission(site=site, certificate=signed, root=keys.pem(root)))
    return ends(folder, project)


def revoke(folder: Path, site: str) -> list[str]:
    """Refuses all keys of a site from now on. Returns their fingerprints.

    Raises:
        FedVLMError: the site is not admitted.
    """
    read_federation(folder)
    with _changing(folder) as kept:
        found: list[str] = kept["sites"].pop(site, [])
        if not found:
            names = ", ".join(sorted(kept["sites"])) or "no site"
            raise FedVLMError(f"'{site}' has no admitted key to revoke; admitted: {names}")
        kept["revoked"] += found
    (folder / "sites" / f"{site}.admission").unlink(missing_ok=True)
    return found


def fingerprints(folder: Path) -> dict[str, str]:
    """Who -> fingerprint: ``federation``, ``admin``, and every site; empty if not admitted."""
    project, kept = read_federation(folder), admitted(folder)
    root = keys.certificate((folder / "server/startup/rootCA.pem").read_bytes(), "the authority's")
    found = {"federation": keys.fingerprint(root), "admin": kept["admin"]}
    for site in project.sites:
        found[site] = next(iter(kept["sites"].get(site, [])[::-1]), "")
    return found


def _refuse_another(site: str, mark: str, kept: dict[str, Any]) -> None:
    """Refuses a key that somebody else is admitted with."""
    holders = {key: name for name, found in kept["sites"].items() for key in found}
    other = "the operator" if mark == kept["admin"] else holders.get(mark, site)
    if other != site:
        raise FedVLMError(
            f"the request of '{site}' is refused: the key {keys.grouped(mark)} is that of {other}; "
            "every site needs a state folder of its own"
        )


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the list of admitted keys, and writes it on leaving unless there was an error."""
    taken = f"another command is changing '{folder / ADMITTED}'"
    with files.only_one(folder, taken, PATIENCE):
        kept = admitted(folder)
        yield kept
        write_admitted(folder, kept)


def _authority(folder: Path, project: Project) -> tuple[x509.Certificate, rsa.RSAPrivateKey]:
    """The certificate and the key of the authority.

    Raises:
        FedVLMError: the key is not on this machine.
    """
    try:
        tree = json.loads(state_of(folder, project).read_text())
        key = serialization.load_pem_private_key(tree["root_pri_key"].encode(), None)
        found = keys.certificate(tree["root_cert"], "the authority's certificate")
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ValueError("its key is no RSA key")
    except (OSError, ValueError, KeyError) as error:
        raise FedVLMError(
            f"the authority's key in '{folder / 'ca'}' cannot be read, so nothing can be signed: "
            f"{error}. If the folder is kept offline, run this command there"
        ) from None
    return found, key
