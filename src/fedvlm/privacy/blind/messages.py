"""The messages of a secure sum: JSON with bytes as hexadecimal digits, parsed strictly.

Whatever arrives may be a lie. A reader here raises ``ValueError`` for another form.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedvlm.errors import FedVLMError

LEAST = 3
"""Fewest sites in a sum. The difference of two numbers' sum and one of them is the other."""
MOST = 64
"""Most sites in a sum: each site shares its keys with each other site."""
KEY, SIGNATURE, SEALED = 32, 64, 80  # bytes; a sealed message has two shares of 32 and a tag of 16


class Withheld(FedVLMError):
    """A site gives no answer, because the answer could reveal more than the sum."""


class Void(FedVLMError):
    """A round has no sum."""


@dataclass(frozen=True)
class Context:
    """What all sites of a sum must agree on.

    Attributes:
        run: the name of the run.
        round: the round, from 1.
        attempt: a number that only grows; each attempt has fresh keys.
        config: the digest of the configuration of the run.
        download: the digest of the download.
        unit: the number of training examples whose weight is 1.
        sampled: the cohort's share of all clients' examples.
    """

    run: str
    round: int
    attempt: int
    config: str
    download: str
    unit: float
    sampled: float = 1.0

    @property
    def digest(self) -> bytes:
        """A digest of all of it, 32 bytes."""
        return hashlib.sha256(canonical(asdict(self))).digest()


@dataclass(frozen=True)
class Advertisement:
    """The keys of a site for one attempt, with the site's signature.

    Attributes:
        identity: the site's long-lived public key (Ed25519).
        mask: the public key of its masks (X25519).
        shares: the public key by which it receives shares (X25519).
        seed: the SHA-256 of the seed of its own mask.
        signature: by the long-lived key, over :func:`advertised`.
    """

    identity: bytes
    mask: bytes
    shares: bytes
    seed: bytes
    signature: bytes

    @classmethod
    def parsed(cls, given: Any) -> Advertisement:
        """Reads :meth:`told`.

        Raises:
            ValueError: it has another form.
        """
        names = ("identity", "mask", "shares", "seed", "signature")
        fields = mapping(given, names, "keys")
        sizes = (KEY, KEY, KEY, KEY, SIGNATURE)
        return cls(*(raw(fields[n], size, n) for n, size in zip(names, sizes, strict=True)))

    def told(self) -> dict[str, str]:
        """The advertisement as JSON."""
        return {name: value.hex() for name, value in asdict(self).items()}


def advertised(context: bytes, name: str, keys: Mapping[str, str]) -> bytes:
    """The text that a site signs to advertise its keys.

    Args:
        context: the digest of the round.
        name: the name of the site.
        keys: :meth:`Advertisement.told`; its signature is left out.
    """
    own = {key: value for key, value in keys.items() if key != "signature"}
    return canonical(["advertise", context.hex(), name, own])


def consistent(context: bytes, transcript: bytes, uploaded: Iterable[str]) -> bytes:
    """The text that a site signs to confirm who has uploaded.

    Args:
        context: the digest of the round.
        transcript: :func:`seen`.
        uploaded: the names of the sites whose uploads are in the sum.
    """
    return canonical(["consistent", context.hex(), transcript.hex(), sorted(uploaded)])


def seen(keys: Mapping[str, Advertisement], shared: Iterable[str]) -> bytes:
    """A digest of what a site has seen: everybody's keys, and who has shared its keys."""
    told = {name: one.told() for name, one in keys.items()}
    return hashlib.sha256(canonical([told, sorted(shared)])).digest()


def repeated(keys: Iterable[Advertisement]) -> bool:
    """Whether two sites have the same key, or a site has one key for two purposes."""
    every = list(keys)
    used = {key for one in every for key in (one.mask, one.shares)}
    return len(used) < 2 * len(every) or len({one.identity for one in every}) < len(every)


def threshold(sites: int) -> int:
    """The number of sites that must stay to the end: more than two thirds."""
    return 2 * sites // 3 + 1


def told_bytes(name: str, names: Iterable[str]) -> int:
    """Bytes of a site's messages without its masked upload, if no site drops out.

    Args:
        name: the site.
        names: all sites of the round.
    """
    key, signature = "0" * 2 * KEY, "0" * 2 * SIGNATURE
    keys = dict.fromkeys(("identity", "mask", "shares", "seed"), key) | {"signature": signature}
    told: tuple[dict[str, Any], ...] = (
        keys,
        {"shares": {peer: "0" * 2 * SEALED for peer in names if peer != name}},
        {"signature": signature},
        {"seeds": dict.fromkeys(names, key), "keys": {}},
    )
    return sum(len(json.dumps(message)) for message in told)


def canonical(tree: Any) -> bytes:
    """The one JSON text of a tree: keys sorted, no spaces, ASCII only."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()


def raw(given: Any, size: int, what: str) -> bytes:
    """The bytes of hexadecimal digits.

    Raises:
        ValueError: it is something else, or has another size.
    """
    whole = isinstance(given, str) and len(given) == 2 * size
    if not whole or set(given) - set("0123456789abcdef"):
        raise ValueError(f"{what} must be {size} bytes as hexadecimal digits, got {given!r:.60}")
    return bytes.fromhex(given)


def mapping(given: Any, names: Iterable[str] | None, what: str) -> dict[str, Any]:
    """A mapping of texts with exactly these names; None: with any, at most :data:`MOST`.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{what} must be a mapping, got {given!r:.60}")
    if names is None and len(given) > MOST:
        raise ValueError(f"{what} must have at most {MOST} entries, got {len(given)}")
    if names is not None and given.keys() != set(names):
        raise ValueError(f"{what} must have {sorted(names)}, got {sorted(given)!r:.200}")
    return given


def listed(given: Any, known: Iterable[str], what: str) -> set[str]:
    """A list of names among the known names, each once.

    Raises:
        ValueError: it is something else.
    """
    texts = isinstance(given, list) and all(isinstance(name, str) for name in given)
    if not texts or len(set(given)) < len(given) or set(given) - set(known):
        raise ValueError(f"{what} must be a list of sites of this round, got {given!r:.200}")
    return set(given)
