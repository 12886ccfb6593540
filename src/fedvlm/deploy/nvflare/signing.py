"""Requests that carry the server's signature, so that a site can tell them from everybody else's.

TLS ends at NVFlare's processes, and a request passes through two of them at a site. Therefore the
server signs each request with the key of its certificate, and the process that answers checks the
signature. A signature covers the header, the digest of the body, the site's name, the job and a
number that only grows. A recorded request is thus of no use: not later, not at another site, not
in another job, and not with another body.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from fedvlm.deploy.frames import HEADER, parsed

SKEW = 3600.0  # seconds by which a request may be older or newer than the site's clock
PURPOSE = b"fedvlm request 1\n"
"""Begins every signed text, so that no signature of the key for another purpose is one of these."""
_PADDING = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)


class Forged(Exception):
    """A request is not the server's, not for this site, or not new."""


class Signer:
    """Signs the server's requests in one job. Threads may share it.

    Args:
        startup: folder with ``server.key`` and ``server.crt``.
        job: NVFlare's number of the job.
    """

    def __init__(self, startup: Path, job: str):
        key = serialization.load_pem_private_key((startup / "server.key").read_bytes(), None)
        assert isinstance(key, rsa.RSAPrivateKey), "the authority makes RSA keys only"
        self._key, self._job = key, job
        self._certificate = (startup / "server.crt").read_text()
        self._last, self._turn = 0, threading.Lock()

    def sign(self, header: dict[str, Any], blob: bytes, site: str) -> str:
        """Returns the text of a request, which replaces its header.

        Args:
            header: the request.
            blob: its body.
            site: the name of the site that gets it.
        """
        with self._turn:  # microseconds since 1970, and always larger than the last one
            self._last = number = max(self._last + 1, time.time_ns() // 1000)
        about = {"job": self._job, "site": site, "number": number, "body": _digest(blob)}
        said = json.dumps({**about, "header": header})
        signature = self._key.sign(PURPOSE + said.encode(), _PADDING, hashes.SHA256())
        text = base64.b64encode(signature).decode()
        return json.dumps({"said": said, "signature": text, "certificate": self._certificate})


class Verifier:
    """Checks the requests that a site gets in one job. Requests to a site come one by one.

    Args:
        startup: folder with ``rootCA.pem``, and with the server's name in ``fed_client.json``.
        job: NVFlare's number of the job.
        site: the name of this site.
    """

    def __init__(self, startup: Path, job: str, site: str):
        self._root = x509.load_pem_x509_certificate((startup / "rootCA.pem").read_bytes())
        (server,) = json.loads((startup / "fed_client.json").read_text())["servers"]
        self._server, self._job, self._site = str(server["identity"]), job, site
        self._last, self._turn = 0, threading.Lock()

    def header(self, text: str, blob: bytes) -> dict[str, Any]:
        """Returns the header of a request that is the server's, for this site, and new.

        Args:
            text: what :meth:`Signer.sign` has returned.
            blob: the body.

        Raises:
            Forged: it is something else.
        """
        if not isinstance(text, str) or len(text) > HEADER:
            raise Forged(f"it is no text of at most {HEADER} characters")
        try:
            outer = parsed(text)
            said, signature = outer["said"], base64.b64decode(outer["signature"])
            key = self._key(outer["certificate"])
            key.verify(signature, PURPOSE + said.encode(), _PADDING, hashes.SHA256())
            inner = parsed(said)
            found = {name: inner[name] for name in ("job", "site", "body", "number", "header")}
        except InvalidSignature:
            raise Forged("its signature is not of the server's key") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Forged("it has no signature of the server") from None
        wanted = {"job": self._job, "site": self._site, "body": _digest(blob)}
        if wrong := [name for name, value in wanted.items() if found[name] != value]:
            raise Forged(f"it was signed for another {wrong[0]}")
        self._is_new(found["number"])
        return dict(found["header"])

    def _key(self, text: str) -> rsa.RSAPublicKey:
        """The key of the server's certificate.

        Raises:
            Forged: the certificate is another one.
        """
        certificate = x509.load_pem_x509_certificate(text.encode())
        try:
            certificate.verify_directly_issued_by(self._root)
        except (InvalidSignature, ValueError, TypeError):
            raise Forged("its certificate is of another authority") from None
        names = [
            str(a.value) for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        ]
        if names != [self._server]:
            raise Forged(f"it is signed by {names}, and the server is '{self._server}'")
        now = datetime.datetime.now(datetime.UTC)
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise Forged("the server's certificate has expired, or is not valid yet")
        key = certificate.public_key()
        if not isinstance(key, rsa.RSAPublicKey):
            raise Forged("the server's key is no RSA key")
        return key

    def _is_new(self, number: Any) -> None:
        """Takes note of a request's number.

        Raises:
            Forged: the number is not larger than that of an earlier request, or its time is wrong.
        """
        away = number / 1e6 - time.time()
        if abs(away) > SKEW:
            raise Forged(
                f"it was signed {abs(away):.0f} s {'after' if away > 0 else 'before'} this site's "
                f"time, and at most {SKEW:.0f} s are allowed: check the clocks of both machines"
            )
        with self._turn:
            if number <= self._last:
                raise Forged("it is a repetition, or an older request than the last one")
            self._last = number


def _digest(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()
