"""A site's long-lived key: the key whose fingerprint its peers pin."""

from __future__ import annotations

import hashlib
import re

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PURPOSE = b"fedvlm blind 1\n"
"""Begins every signed text, so that no signature for another purpose is one of these."""


class Identity:
    """The Ed25519 key of a site.

    Args:
        name: the name of the site.
        secret: the 32 bytes of the key; None: a new key.
    """

    def __init__(self, name: str, secret: bytes | None = None):
        self.name = name
        self._key = (
            Ed25519PrivateKey.from_private_bytes(secret) if secret else Ed25519PrivateKey.generate()
        )
        self.public = self._key.public_key().public_bytes_raw()

    @property
    def secret(self) -> bytes:
        """The 32 bytes of the key, for the site's own disk."""
        return self._key.private_bytes_raw()

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the public key."""
        return fingerprint(self.public)

    def sign(self, text: bytes) -> bytes:
        """The signature of a text, 64 bytes."""
        return self._key.sign(PURPOSE + text)


def fingerprint(public: bytes) -> str:
    """The SHA-256 of a public key, as 64 hexadecimal digits."""
    return hashlib.sha256(public).hexdigest()


def plain(text: str) -> str:
    """A fingerprint that a person wrote, without spaces, colons and capitals.

    Raises:
        ValueError: it is no fingerprint.
    """
    found = re.sub(r"[\s:]", "", text).lower()
    if not re.fullmatch("[0-9a-f]{64}", found):
        raise ValueError(f"a fingerprint has 64 hexadecimal digits, got {text!r:.80}")
    return found


def signed(public: bytes, text: bytes, signature: bytes) -> bool:
    """Whether a signature is that of a public key."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, PURPOSE + text)
    except (InvalidSignature, ValueError):
        return False
    return True
