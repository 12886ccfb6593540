"""The server's side of a secure sum: messages in, messages out, and no input or output.

Each of five steps asks the sites that are still there. ``asks_*`` gives the message for each site,
and raises :class:`fedvlm.privacy.blind.messages.Void` when they are too few. A site whose answer
does not come, or raises ``ValueError`` here, has dropped out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedvlm.privacy.blind import messages, shamir
from fedvlm.privacy.blind.identity import signed
from fedvlm.privacy.blind.masks import Masked, check_key, pairwise
from fedvlm.privacy.blind.messages import LEAST, SEALED, SIGNATURE, Advertisement, Context, Void


class Collector:
    """One attempt at a secure sum.

    Args:
        context: the round.
        size: the length of the encoded uploads, in numbers.
        least: fewest sites in the sum.

    Attributes:
        odd: wrong shares that were left out. Each says who has sent it and whose secret it is of:
            either of both may have made it wrong.
    """

    def __init__(self, context: Context, size: int, least: int = LEAST):
        self.context, self.size, self.least = context, size, max(least, LEAST)
        self.odd: list[str] = []
        self._digest = context.digest
        self._keys: dict[str, Advertisement] = {}
        self._sealed: dict[str, dict[str, str]] = {}
        self._total = np.zeros(size, np.uint32)
        self._uploaded: list[str] = []
        self._signatures: dict[str, str] = {}
        self._seeds: dict[str, dict[int, bytes]] = {}  # site -> number of a share -> share
        self._secrets: dict[str, dict[int, bytes]] = {}
        self._answered = 0
        self._closed = False

    def advertised(self, site: str, told: Any) -> None:
        """Takes the keys of a site."""
        one = Advertisement.parsed(told)
        text = messages.advertised(self._digest, site, one.told())
        if not signed(one.identity, text, one.signature):
            raise ValueError(f"the keys of '{site}' are not signed for this round")
        for key in (one.mask, one.shares):  # sites refuse the whole list where one key is none
            check_key(key)
        if messages.repeated([*self._keys.values(), one]):
            raise ValueError(f"a key of '{site}' is that of another site, or its other key")
        self._keys[site] = one

    def asks_share(self) -> dict[str, dict[str, Any]]:
        """The message of step 2 to each site."""
        self._enough(len(self._keys), "have sent their keys")
        self._keys = dict(sorted(self._keys.items()))
        told = {name: one.told() for name, one in self._keys.items()}
        return {name: {"keys": told} for name in self._keys}

    @property
    def sites(self) -> int:
        """The number of sites that have advertised keys."""
        return len(self._keys)

    def shared(self, site: str, told: Any) -> None:
        """Takes the sealed shares of a site."""
        peers = self._keys.keys() - {site}
        given = messages.mapping(told, ["shares"], "the answer")["shares"]
        for text in messages.mapping(given, peers, "the shares").values():
            messages.raw(text, SEALED, "sealed shares")
        self._sealed[site] = given

    def asks_mask(self) -> dict[str, dict[str, Any]]:
        """The message of step 3 to each site that has shared."""
        self._enough(len(self._sealed), "have shared their keys")
        return {
            site: {"shares": {peer: of[site] for peer, of in self._sealed.items() if peer != site}}
            for site in self._sealed
        }

    def masked(self, site: str, told: Any, blob: bytes) -> None:
        """Adds the masked upload of a site; it is not kept.

        The answer has the site's signature for the case that all sites upload.
        """
        if site not in self._sealed or site in self._uploaded or self._closed:
            raise ValueError(f"no upload of '{site}' is expected")
        if len(blob) != 4 * self.size:
            raise ValueError(f"a masked upload has {4 * self.size} bytes here, got {len(blob)}")
        signature = self._signature(site, told, self._sealed)
        self._total += np.frombuffer(blob, "<u4")
        self._signatures[site] = signature
        self._uploaded.append(site)

    def asks_agree(self) -> dict[str, dict[str, Any]]:
        """The message of step 4 to each site that has uploaded; none where all have uploaded.

        Later uploads are refused.
        """
        self._enough(len(self._uploaded), "have uploaded")
        self._closed = True
        self._uploaded.sort()
        if len(self._uploaded) == len(self._sealed):
            return {}
        self._signatures = {}
        return {site: {"uploaded": list(self._uploaded)} for site in self._uploaded}

    def agreed(self, site: str, told: Any) -> None:
        """Takes the signature of a site over the set of uploads."""
        self._signatures[site] = self._signature(site, told, self._uploaded)

    def asks_unmask(self) -> dict[str, dict[str, Any]]:
        """The message of step 5 to each site that has confirmed."""
        self._enough(len(self._signatures), "have confirmed the set of uploads")
        return {site: {"signatures": dict(self._signatures)} for site in self._signatures}

    def unmasked(self, site: str, told: Any) -> None:
        """Takes the shares that a site has of the others' secrets."""
        given = messages.mapping(told, ["seeds", "keys"], "the answer")
        dropped = self._sealed.keys() - set(self._uploaded)
        number = list(self._keys).index(site) + 1
        for kind, names, into in (
            ("seeds", self._uploaded, self._seeds),
            ("keys", dropped, self._secrets),
        ):
            parts = messages.mapping(given[kind], names, kind)
            read = {n: messages.raw(part, shamir.BYTES, "a share") for n, part in parts.items()}
            for name, part in read.items():
                into.setdefault(name, {})[number] = part
        self._answered += 1

    def opened(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """The sum of the encoded uploads modulo 2^32, and the sites in it.

        Raises:
            Void: shares are too few, or too many are wrong.
        """
        self._enough(self._answered, "have sent their shares")
        found = Masked(self._total.copy())
        for site in self._uploaded:
            seed = self._recovered(site, self._seeds[site], _hidden, self._keys[site].seed)
            found.add(seed, -1)
        for site in sorted(self._secrets):
            secret = self._recovered(site, self._secrets[site], _public, self._keys[site].mask)
            key = X25519PrivateKey.from_private_bytes(secret)
            for other in self._uploaded:
                peer = self._keys[other].mask
                agreed, sign = pairwise(key, peer, self._digest, other, site)
                found.add(agreed, -sign)
        return found.total, tuple(self._uploaded)

    def _signature(self, site: str, told: Any, uploaded: Iterable[str]) -> str:
        """The signature in an answer, which must be that of a site over a set of uploads."""
        given: str = messages.mapping(told, ["signature"], "the answer")["signature"]
        signature = messages.raw(given, SIGNATURE, "a signature")
        transcript = messages.seen(self._keys, self._sealed)
        text = messages.consistent(self._digest, transcript, uploaded)
        if not signed(self._keys[site].identity, text, signature):
            raise ValueError(f"'{site}' has signed another set of uploads")
        return given

    def _recovered(
        self,
        site: str,
        shares: Mapping[int, bytes],
        shown: Callable[[bytes], bytes],
        wanted: bytes,
    ) -> bytes:
        """The secret of a site from its shares, at most one of which may be wrong.

        The right secret is the one for which ``shown(secret)`` is ``wanted``.
        """
        needed, names = messages.threshold(len(self._keys)), list(self._keys)
        for without in (0, *shares):
            kept = {number: part for number, part in shares.items() if number != without}
            if len(kept) < needed:
                break
            secret = shamir.join(kept)
            if shown(secret) == wanted:
                if without:
                    self.odd.append(
                        f"the share of a secret of '{site}' that '{names[without - 1]}' sent is "
                        "wrong: one of the two made it so"
                    )
                return secret
        raise Void(
            f"the shares of a secret of '{site}' do not give what it advertised: some are wrong, "
            f"or fewer than its own min_sites have sent theirs ({len(shares)} have)"
        )

    def _enough(self, count: int, what: str) -> None:
        """Ends an attempt with too few sites."""
        needed = max(self.least, messages.threshold(len(self._keys)))
        if count < needed:
            raise Void(
                f"the secure sum of round {self.context.round} is void: {count} sites {what}, and "
                f"at least {needed} must"
            )


def _hidden(seed: bytes) -> bytes:
    return hashlib.sha256(seed).digest()


def _public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
