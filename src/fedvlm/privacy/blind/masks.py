"""Masks from keys: streams of random numbers, and keys that two sites agree on."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedvlm.privacy.blind.messages import canonical

MASK, SHARES = "fedvlm blind mask 1", "fedvlm blind shares 1"
"""The purposes of agreed keys."""


def stream(key: bytes, count: int) -> np.ndarray:
    """``count`` random numbers, uint32, from a key of 32 bytes: the key stream of ChaCha20."""
    return np.frombuffer(_cipher(key).update(bytes(4 * count)), "<u4")


class Masked:
    """Numbers modulo 2^32, to which streams are added and subtracted.

    Args:
        total: the numbers, uint32 ``[count]``; changed in place.
    """

    def __init__(self, total: np.ndarray):
        self.total = total
        self._zeros, self._drawn = bytes(total.nbytes), bytearray(total.nbytes)

    def add(self, key: bytes, sign: int = 1) -> None:
        """Adds :func:`stream` of a key, or subtracts it with ``sign`` -1."""
        _cipher(key).update_into(self._zeros, self._drawn)
        change = np.add if sign > 0 else np.subtract
        change(self.total, np.frombuffer(self._drawn, "<u4"), out=self.total)


def _cipher(key: bytes) -> CipherContext:
    return Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()


def agreed(
    own: X25519PrivateKey, peer: bytes, purpose: str, context: bytes, names: tuple[str, str]
) -> bytes:
    """The key of 32 bytes that two sites agree on.

    Args:
        own: the secret key of one site.
        peer: the public key of the other site.
        purpose: :data:`MASK` or :data:`SHARES`.
        context: the digest of the round, see :class:`fedvlm.privacy.blind.messages.Context`.
        names: the names of the sites, in the same order at both.

    Raises:
        ValueError: the public key is none.
    """
    shared = own.exchange(X25519PublicKey.from_public_bytes(peer))
    info = canonical([purpose, *names])
    return HKDF(hashes.SHA256(), 32, salt=context, info=info).derive(shared)


def check_key(peer: bytes) -> None:
    """Refuses a public key of low order, with which nobody can agree on a secret.

    Raises:
        ValueError: the public key is none.
    """
    X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(peer))


def pairwise(
    own: X25519PrivateKey, peer: bytes, context: bytes, name: str, other: str
) -> tuple[bytes, int]:
    """The key and the sign of the mask that site ``name`` adds for site ``other``.

    Both agree on the key; one adds its stream, and the other subtracts it.
    """
    low, high = sorted((name, other))
    return agreed(own, peer, MASK, context, (low, high)), 1 if name == low else -1
