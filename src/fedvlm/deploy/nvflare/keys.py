"""Keys, certificates, and the files that join a site to a federation.

Three small JSON files travel between an operator and a site: the invitation, the site's request and
the operator's admission. None holds a private key, and each side treats the other's file as text
from somebody who may lie. People compare fingerprints by another channel, such as the telephone.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import AfterValidator, Field, ValidationError

from fedvlm.deploy.policy import check_name
from fedvlm.errors import ConfigError, FedVLMError, brief, shown
from fedvlm.settings.method import Section
from fedvlm.store import files
from fedvlm.version import BY, check_format, written_by

BITS = 2048  # of a site's RSA key, as of the authority's; NVFlare signs with RSA only
VALID = datetime.timedelta(days=360)  # the longest time that a site's certificate is valid
SKEW = datetime.timedelta(hours=1)  # two machines' clocks may differ by this much
LARGEST = 2**16  # bytes of an invitation, a request or an admission
Holder = x509.Certificate | x509.CertificateSigningRequest | rsa.RSAPrivateKey
USES = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
ORGANIZATION = "fedvlm"  # NVFlare wants one in every certificate


def _name(text: str) -> str:
    try:
        return check_name(text)
    except ConfigError as error:
        raise ValueError("; ".join(error.problems)) from None


Name = Annotated[str, AfterValidator(_name)]
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$")]


class Invitation(Section):
    """What a site must know to ask for its admission: the place of the server, the authority."""

    kind: Literal["fedvlm invitation"] = "fedvlm invitation"
    site: Name
    project: Annotated[str, Field(min_length=1, max_length=200)]
    address: Host
    port: Annotated[int, Field(ge=1, le=65535)]
    root: str = Field(description="the authority's certificate, PEM")


class Request(Section):
    """A site's request for a certificate of its key.

    A request for renewal also has the site's present certificate, and a signature by its key.
    """

    kind: Literal["fedvlm request"] = "fedvlm request"
    site: Name
    csr: str = Field(description="certificate signing request, PEM")
    present: str | None = Field(None, description="the certificate to renew, PEM")
    signature: str | None = Field(None, description="by the present key over the csr, base64")


class Admission(Section):
    """The authority's certificate of a site's key, and the authority's own."""

    kind: Literal["fedvlm admission"] = "fedvlm admission"
    site: Name
    certificate: str = Field(description="PEM")
    root: str | None = Field(None, description="the authority's present certificate, PEM")


F = TypeVar("F", bound=Section)


def read(path: str | Path, *forms: type[F]) -> F:
    """Reads a file that the other side has sent.

    Args:
        path: the file.
        forms: what the file may be.

    Raises:
        FedVLMError: the file cannot be read, or is something else.
    """
    what = " or ".join(form.__name__.lower() for form in forms)
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        tree = json.loads(text)
        kind = tree.get("kind") if isinstance(tree, dict) else None
        named = [form for form in forms if form.model_fields["kind"].default == kind]
        if not named:
            raise ValueError(f"its kind is {shown(kind)}")
        check_format(tree, path)
        tree.pop(BY, None)
        return named[0].model_validate(tree)
    except OSError as error:
        raise FedVLMError(f"the {what} '{path}' cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        why = f"{where}: {first['msg']}, not {shown(first['input'])}"
        raise FedVLMError(f"'{path}' is no {what} of fedvlm: {why}") from None
    except (ValueError, RecursionError) as error:
        raise FedVLMError(f"'{path}' is no {what} of fedvlm: {brief(error)}") from None


def write(path: Path, sent: Invitation | Request | Admission) -> Path:
    """Writes a file for the other side, and returns its path."""
    text = json.dumps({**sent.model_dump(exclude_none=True), BY: written_by()}, indent=2)
    files.write_text(path, text + "\n")
    return path


def new_key(path: Path) -> rsa.RSAPrivateKey:
    """Makes a private key and writes it to a new file that only its owner may read."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=BITS)
    text = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return key


def credential(name: str) -> Path | None:
    """A secret that the service manager holds for this process (``LoadCredential`` of systemd)."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(folder) / name if folder else None
    return path if path and path.is_file() else None


def place_secret(path: Path, name: str = "") -> None:
    """Lets a key's path lead to the service manager's secret, unless the key itself is there.

    Args:
        path: where the key is read.
        name: the name of the secret; empty: that of the file.

    Raises:
        FedVLMError: there is neither the key nor the secret.
    """
    if path.exists() and not path.is_symlink():
        return
    name = name or path.name
    secret = credential(name)
    if secret is None:
        raise FedVLMError(
            f"the private key '{path}' is not there, and no credential '{name}' was given to this "
            f"process: put the key back, or run the service with LoadCredentialEncrypted={name}:..."
        )
    path.unlink(missing_ok=True)
    path.symlink_to(secret)


def read_key(path: Path) -> rsa.RSAPrivateKey:
    """Reads a private key.

    Raises:
        FedVLMError: the file holds none.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        if isinstance(key, rsa.RSAPrivateKey):
            return key
        raise ValueError("it is no RSA key")
    except (OSError, ValueError, TypeError) as error:
        raise FedVLMError(f"the private key '{path}' cannot be read: {brief(error)}") from None


def certificate(text: str | bytes, what: str) -> x509.Certificate:
    """Reads a certificate from its text.

    Args:
        text: PEM.
        what: names the certificate in the message of the error.

    Raises:
        FedVLMError: the text holds no certificate of an RSA key.
    """
    try:
        found = x509.load_pem_x509_certificate(text.encode() if isinstance(text, str) else text)
        if not isinstance(found.public_key(), rsa.RSAPublicKey):
            raise ValueError("its key is no RSA key")
        return found
    except (ValueError, TypeError, x509.UnsupportedGeneralNameType) as error:
        raise FedVLMError(f"{what} is no certificate: {brief(error)}") from None


def pem(found: x509.Certificate) -> str:
    """The text of a certificate."""
    return found.public_bytes(serialization.Encoding.PEM).decode()


def fingerprint(holder: Holder) -> str:
    """SHA-256 of a public key (its SubjectPublicKeyInfo), as 64 hexadecimal digits."""
    spki = holder.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(spki).hexdigest()


def grouped(digits: str) -> str:
    """A fingerprint as people read it aloud: groups of four digits."""
    return " ".join(digits[k : k + 4] for k in range(0, len(digits), 4))


def typed(text: str) -> str:
    """A fingerprint that a person has typed, as 64 digits.

    Raises:
        FedVLMError: the text is no whole fingerprint.
    """
    digits = re.sub(r"[\s:.-]", "", text).lower()
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise FedVLMError(
            f"{shown(text)} is no fingerprint: give all 64 hexadecimal digits, such as "
            "'3f2a 91c0 ...', in which spaces do not matter"
        )
    return digits


def common_name(found: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The name in a certificate; empty if there is not exactly one."""
    names = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def left(found: x509.Certificate) -> datetime.timedelta:
    """The time until a certificate ends. It is negative after the end."""
    return found.not_valid_after_utc - datetime.datetime.now(datetime.UTC)


def signed_by(found: x509.Certificate, root: x509.Certificate) -> bool:
    """Whether the authority has signed a certificate. Dates are not checked."""
    try:
        found.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def ask(
    site: str,
    key: rsa.RSAPrivateKey,
    present: tuple[x509.Certificate, rsa.RSAPrivateKey] | None = None,
) -> Request:
    """Makes a site's request for a certificate of its key.

    Args:
        site: its name.
        key: the key. Only its public part is in the request.
        present: the certificate to renew, and its key, which signs the request.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    text = csr.public_bytes(serialization.Encoding.PEM).decode()
    if present is None:
        return Request(site=site, csr=text)
    found, old = present
    signature = old.sign(text.encode(), *_padded())
    encoded = base64.b64encode(signature).decode()
    return Request(site=site, csr=text, present=pem(found), signature=encoded)


def asked(request: Request) -> x509.CertificateSigningRequest:
    """Checks that the sender of a request holds its key, and returns the signing request.

    Raises:
        FedVLMError: the request is damaged, is for another name, or has an unfit key.
    """
    try:
        csr = x509.load_pem_x509_csr(request.csr.encode())
        key = csr.public_key()
        if not isinstance(key, rsa.RSAPublicKey) or not BITS <= key.key_size <= 2 * BITS:
            raise ValueError(f"its key is no RSA key of {BITS} to {2 * BITS} bits")
        if key.public_numbers().e != 65537:
            raise ValueError("the exponent of its key is not 65537")
        if not csr.is_signature_valid:
            raise ValueError("its signature is not by its own key")
    except (ValueError, TypeError) as error:
        raise FedVLMError(f"the request of '{request.site}' is refused: {brief(error)}") from None
    if common_name(csr) != request.site:
        raise FedVLMError(
            f"the request of '{request.site}' is refused: its key is for {shown(common_name(csr))}"
        )
    return csr


def renewed(request: Request, root: x509.Certificate) -> str | None:
    """The fingerprint of the present key that has signed a request for renewal.

    Returns:
        ``None`` if the request renews nothing.

    Raises:
        FedVLMError: the present certificate is not of the authority and this site, has ended, or
            has not signed the request.
    """
    if request.present is None and request.signature is None:
        return None
    found = certificate(request.present or "", f"the present certificate of '{request.site}'")
    key = found.public_key()
    why = ""
    if not signed_by(found, root):
        why = "its present certificate is not of this federation"
    elif common_name(found) != request.site:
        why = f"its present certificate is that of {shown(common_name(found))}"
    elif left(found) < datetime.timedelta():
        why = (
            f"its present certificate ended on {found.not_valid_after_utc:%Y-%m-%d}: ask the site "
            "for a new request by 'fedvlm site join INVITATION --new-key', then admit --replace"
        )
    else:
        assert isinstance(key, rsa.RSAPublicKey)
        try:
            signature = base64.b64decode(request.signature or "", validate=True)
            key.verify(signature, request.csr.encode(), *_padded())
        except (ValueError, InvalidSignature):
            why = "it is not signed by the site's present key"
    if why:
        raise FedVLMError(f"the request of '{request.site}' is refused: {why}")
    return fingerprint(found)


def sign(
    holder: x509.CertificateSigningRequest | x509.Certificate,
    site: str,
    root: x509.Certificate,
    authority: rsa.RSAPrivateKey,
) -> x509.Certificate:
    """Makes the certificate of a site.

    Only the key is taken from the request, or from the certificate that is renewed. The new
    certificate gives no role, and makes its holder no authority. Its host name is the site's name,
    so that no other site takes its holder for the server. The processes of the site itself connect
    by TLS with it, at both ends.

    Raises:
        FedVLMError: the authority has ended.
    """
    now = datetime.datetime.now(datetime.UTC)
    if root.not_valid_after_utc <= now:
        raise FedVLMError(
            f"the federation's authority ended on {root.not_valid_after_utc:%Y-%m-%d}: give "
            "'fedvlm deploy renew' where its key is"
        )
    names = [(NameOID.COMMON_NAME, site), (NameOID.ORGANIZATION_NAME, ORGANIZATION)]
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    key, issuer = holder.public_key(), x509.SubjectKeyIdentifier.from_public_key(root.public_key())
    assert isinstance(key, rsa.RSAPublicKey)
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (usage, True),
        (x509.ExtendedKeyUsage(USES), False),
        (x509.SubjectAlternativeName([x509.DNSName(site)]), False),
        (x509.SubjectKeyIdentifier.from_public_key(key), False),
        (x509.AuthorityKeyIdentifier(issuer.digest, None, None), False),
    ]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(oid, text) for oid, text in names]))
        .issuer_name(root.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(min(now + VALID, root.not_valid_after_utc))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(authority, hashes.SHA256())


def _padded() -> tuple[padding.PSS, hashes.SHA256]:
    """Padding and hash of a signature by a present key."""
    return padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH), hashes.SHA256()
