"""The operator's signature over a run: its number, and the digest of its configuration.

``fedvlm deploy run`` signs with the key in ``admin/``. A site checks that the certificate is the
operator's and that the federation's authority has issued it. A signature is of no use for another
run number or another configuration. Both functions are pure.
"""

from __future__ import annotations

import base64
import binascii
import datetime
from typing import Any

from fedvlm.deploy.policy import Refused

PURPOSE = "fedvlm run 1"
"""Begins every signed text, so that no signature of the key for another purpose is one of these."""
OPERATOR, ROLE = "admin@fedvlm.local", "project_admin"
"""The operator's name and role, as the authority writes them into its certificate."""
LARGEST = 2**14  # characters of a certificate and of a signature
AGAIN = "start the run with 'fedvlm deploy run' and the federation's own admin/ folder"


def sign(run: str, digest: str, key: bytes, certificate: bytes) -> dict[str, str]:
    """The operator's signature, to be sent with ``open``.

    Args:
        run: the number of the run.
        digest: the digest of its configuration as it is sent.
        key: the operator's private key, an RSA key without a password (PEM).
        certificate: the operator's certificate (PEM).
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    loaded = serialization.load_pem_private_key(key, None)
    assert isinstance(loaded, rsa.RSAPrivateKey), "the authority makes RSA keys only"
    signature = loaded.sign(_text(run, digest), *_padded())
    return {"certificate": certificate.decode(), "signature": base64.b64encode(signature).decode()}


def signer(
    run: str, digest: str, given: Any, root: bytes, now: datetime.datetime | None = None
) -> str:
    """The name of the operator who has signed a run.

    Args:
        run: the number of the run.
        digest: the digest of its configuration, computed from what arrived.
        given: what arrived as the result of :func:`sign`; it may be anything.
        root: the authority's certificate, from the site's kit (PEM).
        now: the time; None: the clock's.

    Raises:
        Refused: there is no signature, or it is not the operator's for this run.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import rsa

    certificate, signature = _parts(given)
    now = now or datetime.datetime.now(datetime.UTC)
    authority = x509.load_pem_x509_certificate(root)
    try:
        found = x509.load_pem_x509_certificate(certificate)
        found.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise _refused("the certificate is not of this federation's authority") from None
    for one in (found, authority):
        if not one.not_valid_before_utc <= now <= one.not_valid_after_utc:
            raise _refused(f"a certificate is valid until {one.not_valid_after_utc:%Y-%m-%d} only")
    if _names(found) != ([OPERATOR], [ROLE]):
        raise _refused(f"the certificate is not that of {OPERATOR}")
    key = found.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        raise _refused("the key is of another kind than RSA")
    try:
        key.verify(signature, _text(run, digest), *_padded())
    except InvalidSignature:
        raise _refused("the one sent is for another run number or another configuration") from None
    return OPERATOR


def _parts(given: Any) -> tuple[bytes, bytes]:
    if given is None:
        raise _refused("there is none")
    try:
        certificate, signature = given["certificate"], given["signature"]
        if len(certificate) > LARGEST or len(signature) > LARGEST:
            raise _refused("what was sent is too long")
        return certificate.encode(), base64.b64decode(signature, validate=True)
    except (KeyError, TypeError, AttributeError, ValueError, binascii.Error):
        raise _refused("what was sent has another form") from None


def _names(found: Any) -> tuple[list[str], list[str]]:
    from cryptography.x509.oid import NameOID

    about = found.subject
    names = about.get_attributes_for_oid(NameOID.COMMON_NAME)
    roles = about.get_attributes_for_oid(NameOID.UNSTRUCTURED_NAME)
    return [str(n.value) for n in names], [str(r.value) for r in roles]


def _text(run: str, digest: str) -> bytes:
    return f"{PURPOSE}\n{run}\n{digest}\n".encode()


def _padded() -> tuple[Any, Any]:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    return padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH), hashes.SHA256()


def _refused(why: str) -> Refused:
    return Refused(f"this site needs the operator's signature of the run, and {why}; {AGAIN}")
