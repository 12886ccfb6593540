"""A site's side of a secure sum: messages in, messages out, and no input or output.

A site answers each step once, in order. A message that it refuses ends its part in the attempt.
The keys of an attempt are in memory only, so a process that was killed takes no further part.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedvlm.errors import shown
from fedvlm.privacy.blind import messages, shamir
from fedvlm.privacy.blind.identity import Identity, fingerprint, signed
from fedvlm.privacy.blind.masks import SHARES, Masked, agreed, check_key, pairwise
from fedvlm.privacy.blind.messages import (
    LEAST,
    MOST,
    SEALED,
    SIGNATURE,
    Advertisement,
    Context,
    Withheld,
)

MASKED, OPENED = "masked", "opened"
"""What a site records, before it answers: its masked upload, and its shares of the others' keys."""


class Client:
    """One site in one attempt at a secure sum.

    Args:
        identity: the long-lived key of the site.
        context: the round, as this site knows it.
        pins: peer -> fingerprint of its long-lived key. None: nothing is pinned, and a server that
            makes keys of its own can read the upload.
        least: fewest sites in the sum, at least :data:`LEAST`.
        record: called with :data:`MASKED` and :data:`OPENED`, before the answer leaves. It returns
            when the fact is on disk, and raises to withhold the answer.
    """

    def __init__(
        self,
        identity: Identity,
        context: Context,
        pins: Mapping[str, str] | None = None,
        least: int = LEAST,
        record: Callable[[str], None] = lambda fact: None,
    ):
        self.identity, self.context, self.pins = identity, context, pins
        self.name, self.least, self._record = identity.name, max(least, LEAST), record
        self._digest = context.digest
        self._next: tuple[str, ...] = ("advertise",)
        self._mask, self._cipher = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._seed = secrets.token_bytes(32)
        self._keys: dict[str, Advertisement] = {}
        self._shown = ""  # the digest of these keys
        self._shares: dict[str, bytes] = {}  # site -> our shares of its seed and of its mask key
        self._uploaded: set[str] = set()
        self._confirms = b""

    @property
    def sites(self) -> int:
        """The number of sites that have advertised keys; from the second step on."""
        return len(self._keys)

    def advertise(self) -> dict[str, str]:
        """Step 1: fresh keys, signed."""
        self._enter("advertise")
        keys = {
            "identity": self.identity.public.hex(),
            "mask": self._mask.public_key().public_bytes_raw().hex(),
            "shares": self._cipher.public_key().public_bytes_raw().hex(),
            "seed": hashlib.sha256(self._seed).hexdigest(),
        }
        text = messages.advertised(self._digest, self.name, keys)
        self._own = Advertisement.parsed({**keys, "signature": self.identity.sign(text).hex()})
        self._next = ("share",)
        return self._own.told()

    def share(self, asked: Any) -> dict[str, Any]:
        """Step 2: the shares of this site's secrets, each sealed for one peer.

        Args:
            asked: ``{"keys": {site: advertisement}}``.

        Raises:
            Withheld: a peer's key is not the pinned one, a signature is wrong, or sites are too
                few.
        """
        self._enter("share")
        given = self._read(messages.mapping, asked, ["keys"], "the message")["keys"]
        given = self._read(messages.mapping, given, None, "the keys")
        keys = {n: self._read(Advertisement.parsed, told) for n, told in given.items()}
        if keys.get(self.name) != self._own:
            raise self._withheld("the server shows other keys for this site than it has sent")
        self._check_many(len(keys), f"{len(keys)} sites have keys")
        if len(keys) > MOST:
            raise self._withheld(f"{len(keys)} sites have keys, and {MOST} are the most")
        for name, one in keys.items():
            self._check_peer(name, one)
        if messages.repeated(keys.values()):
            raise self._withheld("two sites have the same key")
        self._keys = dict(sorted(keys.items()))
        self._shown = messages.seen(self._keys, []).hex()
        for name, one in keys.items():
            self._check_exchange(name, one)
        needed = messages.threshold(len(keys))
        # The others can open a sum that this site has not confirmed, with this upload in it. So the
        # shares of its seed that they need are as many as its own minimum of sites.
        seeds = shamir.split(self._seed, max(needed, self.least), len(keys))
        secret = shamir.split(self._mask.private_bytes_raw(), needed, len(keys))
        parts = {n: seeds[k] + secret[k] for k, n in enumerate(self._keys, start=1)}
        self._shares[self.name] = parts.pop(self.name)
        sealed = {
            n: self._cipher_of(self.name, n).encrypt(*self._aad(part, self.name, n)).hex()
            for n, part in parts.items()
        }
        self._next = ("mask",)
        return {"shares": sealed}

    def mask(self, asked: Any, encoded: Callable[[], np.ndarray]) -> tuple[dict[str, str], bytes]:
        """Step 3: the masked numbers, little-endian.

        The answer also confirms the set of all sites that have shared, as in step 4. Where all of
        them have uploaded, step 4 is left out. A site answers step 5 once, for one set, and a set
        needs the answers of more than two thirds of the sites, all of which have seen the same keys
        (:meth:`_aad`): of the set of all sites and a smaller set, only one reaches that number.

        Args:
            asked: ``{"shares": {peer: sealed shares}}``, of the peers that have shared.
            encoded: gives the encoded upload, uint32; called after all checks of the message.

        Raises:
            Withheld: a peer's shares are not for this site and round, or peers are too few.
        """
        self._enter("mask")
        given = self._read(messages.mapping, asked, ["shares"], "the message")["shares"]
        given = self._read(messages.mapping, given, None, "the shares")
        others = self._keys.keys() - {self.name}
        peers = self._read(messages.listed, list(given), others, "the shares")
        self._check_many(len(peers) + 1, f"{len(peers) + 1} sites have shared their keys")
        for peer in peers:
            sealed = self._read(messages.raw, given[peer], SEALED, "sealed shares")
            try:
                cipher = self._cipher_of(peer, self.name)
                self._shares[peer] = cipher.decrypt(*self._aad(sealed, peer, self.name))
            except InvalidTag:
                raise self._withheld(
                    f"the shares of '{peer}' are not for this site, round and attempt"
                ) from None
        self._record(MASKED)  # before the encoding: its error tells the server one bit, once
        numbers = encoded()
        if numbers.dtype != np.uint32:
            raise TypeError(f"encoded numbers are uint32, got {numbers.dtype}")
        masked = Masked(numbers.copy())
        masked.add(self._seed)
        for peer in sorted(peers):
            key = self._keys[peer].mask
            masked.add(*pairwise(self._mask, key, self._digest, self.name, peer))
        signature = self._confirmed(set(self._shares))
        self._next = ("agree", "unmask")
        return {"signature": signature}, masked.total.astype("<u4").tobytes()

    def agree(self, asked: Any) -> dict[str, str]:
        """Step 4, where a site has dropped out: the signature of the set of uploads.

        Args:
            asked: ``{"uploaded": [site, ...]}``.

        Raises:
            Withheld: the set lacks this site, or is too small.
        """
        self._enter("agree")
        given = self._read(messages.mapping, asked, ["uploaded"], "the message")
        uploaded = self._read(
            messages.listed, given["uploaded"], self._shares, "the sites with an upload"
        )
        if self.name not in uploaded:
            raise self._withheld("the server says that this site has not uploaded")
        self._check_many(len(uploaded), f"{len(uploaded)} sites have uploaded")
        signature = self._confirmed(uploaded)
        self._next = ("unmask",)
        return {"signature": signature}

    def unmask(self, asked: Any) -> dict[str, dict[str, str]]:
        """Step 5: one share of each site: of its seed if it has uploaded, else of its mask key.

        Args:
            asked: ``{"signatures": {site: signature}}``, of the sites that confirm the set.

        Raises:
            Withheld: a signature is not for the set that this site has signed, or they are too
                few.
        """
        self._enter("unmask")
        given = self._read(messages.mapping, asked, ["signatures"], "the message")
        found = self._read(messages.mapping, given["signatures"], None, "the signatures")
        self._read(messages.listed, list(found), self._uploaded, "the signatures")
        for name, text in found.items():
            signature = self._read(messages.raw, text, SIGNATURE, "a signature")
            if not signed(self._keys[name].identity, self._confirms, signature):
                raise self._withheld(
                    f"'{name}' has not confirmed the set of uploads that this site was told"
                )
        self._check_many(len(found), f"{len(found)} sites have confirmed the set of uploads")
        self._record(OPENED)
        dropped = self._shares.keys() - self._uploaded
        half = shamir.BYTES
        return {
            "seeds": {name: self._shares[name][:half].hex() for name in sorted(self._uploaded)},
            "keys": {name: self._shares[name][half:].hex() for name in sorted(dropped)},
        }

    def _confirmed(self, uploaded: set[str]) -> str:
        """Notes a set of uploads as the one that this site opens, and signs it."""
        self._uploaded = uploaded
        transcript = messages.seen(self._keys, self._shares)
        self._confirms = messages.consistent(self._digest, transcript, uploaded)
        return self.identity.sign(self._confirms).hex()

    # -- checks

    def _enter(self, step: str) -> None:
        """Begins a step; it is the only one that can follow, and a refusal in it is final."""
        if step not in self._next:
            after = " or to ".join(self._next)
            raise self._withheld(
                f"it was asked to {step}, and "
                + (f"the next step is to {after}" if after else "its part is over")
            )
        self._next = ()

    def _check_many(self, count: int, what: str) -> None:
        least = self.least
        if self._keys:
            least = max(least, messages.threshold(len(self._keys)))
        if count < least:
            raise self._withheld(f"{what}, and at least {least} must")

    def _check_peer(self, name: str, one: Advertisement) -> None:
        """Refuses a peer whose long-lived key is not pinned, or whose signature is wrong."""
        if self.pins is not None and name != self.name:
            pinned, found = self.pins.get(name), fingerprint(one.identity)
            if pinned is None:
                raise self._withheld(f"{shown(name)} is no peer of this site (peers in its policy)")
            if pinned != found:
                raise self._withheld(
                    f"the key of {shown(name)} has the fingerprint {found[:16]}…, and this site's "
                    f"policy has {pinned[:16]}… for it (peers)"
                )
        text = messages.advertised(self._digest, name, one.told())
        if not signed(one.identity, text, one.signature):
            raise self._withheld(
                f"the keys of {shown(name)} are not signed for this round: another round, "
                "configuration, download or attempt, or another signer"
            )

    def _check_exchange(self, name: str, one: Advertisement) -> None:
        """Refuses keys of low order, with which no secret can be agreed on."""
        try:
            check_key(one.mask)
            check_key(one.shares)
        except ValueError:
            raise self._withheld(f"{shown(name)} has advertised a key that is none") from None

    def _cipher_of(self, source: str, target: str) -> ChaCha20Poly1305:
        """The cipher of the shares from one site to another; its key has this one use."""
        peer = target if source == self.name else source
        own, other = self._cipher, self._keys[peer].shares
        return ChaCha20Poly1305(agreed(own, other, SHARES, self._digest, (source, target)))

    def _aad(self, text: bytes, source: str, target: str) -> tuple[bytes, bytes, bytes]:
        """The nonce, the text and the associated data of sealed shares.

        The associated data bind the keys of all sites that this site was shown. Sites that were
        shown different keys cannot open one another's shares, so all sites of a sum have seen the
        same keys. Without that, a server could give two groups of sites quorums for one upload.
        """
        bound = [self._digest.hex(), self._shown, source, target]
        return bytes(12), text, messages.canonical(bound)

    def _read(self, reader: Callable[..., Any], *given: Any) -> Any:
        try:
            return reader(*given)
        except ValueError as error:
            raise self._withheld(str(error)) from None

    def _withheld(self, why: str) -> Withheld:
        where = f"round {self.context.round}"
        return Withheld(f"site '{self.name}' takes no further part in the sum of {where}: {why}")
