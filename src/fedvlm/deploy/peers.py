"""Secure aggregation at a site: its long-lived key, and the peers whose keys it knows."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from fedvlm.errors import FedVLMError
from fedvlm.settings.method import Section
from fedvlm.settings.sections import Config
from fedvlm.store.files import sync

if TYPE_CHECKING:
    from fedvlm.privacy.blind.identity import Identity

logger = logging.getLogger("fedvlm")

FILE = "identity.key"
"""The site's long-lived key (Ed25519, 32 bytes), in its state folder."""


class Peers(Section):
    """The part of a site's policy about secure aggregation."""

    secure_required: bool = Field(False, description="refuse runs without secure aggregation")
    peers: dict[str, str] = Field(
        {}, description="other sites -> fingerprints of their keys (fedvlm site fingerprint)"
    )
    min_sites: Annotated[int, Field(ge=3, le=64)] = Field(
        3, description="fewest sites in a sum with secure aggregation, this site included"
    )

    @field_validator("peers")
    @classmethod
    def _as_printed(cls, given: dict[str, str]) -> dict[str, str]:
        from fedvlm.privacy.blind.identity import plain

        return {name: plain(mark) for name, mark in given.items()}


def problems(policy: Peers) -> list[str]:
    """The mistakes in this part of a policy."""
    if policy.secure_required and not policy.peers:
        return [
            "secure_required: without peers, the server could put keys of its own in the place of "
            "the other sites' keys; set peers to their fingerprints (fedvlm site fingerprint)"
        ]
    if policy.peers and len(policy.peers) + 1 < policy.min_sites:
        return [
            f"min_sites: {policy.min_sites} sites cannot be in a sum of this site and its "
            f"{len(policy.peers)} peers"
        ]
    return []


def unsafe(policy: Peers, config: Config) -> list[str]:
    """The parts of a run that this part of a policy does not allow."""
    if policy.secure_required and not config.wire.secure:
        return ["single uploads, but the site requires secure aggregation (secure_required)"]
    return []


def pins(policy: Peers) -> dict[str, str] | None:
    """The fingerprints by which a site knows its peers; None: it knows none of them."""
    if not policy.peers:
        logger.warning(
            "secure aggregation without peers in the policy: this site cannot tell the other "
            "sites' keys from keys that the server made; set peers to their fingerprints"
        )
        return None
    return dict(policy.peers)


def identity(state: str | Path, name: str) -> Identity:
    """The long-lived key of a site, made at its first use.

    Args:
        state: the site's folder.
        name: the name of the site.

    Raises:
        FedVLMError: the file is damaged.
    """
    from fedvlm.privacy.blind.identity import Identity

    folder = Path(state)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / FILE
    if not path.exists():
        _create(path, Identity(name).secret)
    secret = path.read_bytes()
    if len(secret) != 32:
        raise FedVLMError(
            f"'{path}' is damaged: it has {len(secret)} bytes and not 32; restore it from a copy, "
            "or remove it and give all peers the new fingerprint"
        )
    return Identity(name, secret)


def _create(path: Path, secret: bytes) -> None:
    """Writes a new key for its owner alone. A key that another process has just made stays."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    with contextlib.suppress(FileExistsError):
        os.link(scratch, path)
    scratch.unlink()
    sync(path.parent)
