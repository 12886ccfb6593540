"""Digests that server and site compute alike, of bytes and of JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def sha256(content: bytes) -> str:
    """The SHA-256 of some bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def digest_of(tree: Mapping[str, Any]) -> str:
    """The SHA-256 of a tree's canonical JSON, such as a run's configuration as it is sent.

    Canonical: keys are sorted, without spaces, and other characters than ASCII are escaped. A tree
    has the same digest before it is sent as JSON and after. The order of its keys and the type of
    its sequences make no difference. An int and a float do: ``1`` is not ``1.0``.

    Raises:
        TypeError: the tree holds something that JSON does not have.
    """
    as_sent = json.loads(json.dumps(tree))  # numbers as keys become texts before they are sorted
    return sha256(json.dumps(as_sent, sort_keys=True, separators=(",", ":")).encode())
