"""Helpers of the tests of joining: federations, and sites that ask, join and renew."""

import datetime
import re
import shutil

import pytest

pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.x509.oid import NameOID

from fedvlm.deploy.nvflare import admitting, joining, keys
from fedvlm.deploy.nvflare.project import (
    Project,
    Server,
    provision,
)

SITES = ("north", "south")
PROJECT = Project(server=Server(address="localhost"), sites=list(SITES), days=2000)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A federation as ``deploy init`` makes it."""
    folder = tmp_path_factory.mktemp("made") / "federation"
    provision(PROJECT, folder)
    return folder


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """Another federation with the same names."""
    folder = tmp_path_factory.mktemp("another") / "federation"
    provision(PROJECT, folder)
    return folder


@pytest.fixture
def home(made, tmp_path):
    """A copy of the federation, for one test."""
    return shutil.copytree(made, tmp_path / "federation")


def invited(home, site="north"):
    return home / "sites" / f"{site}.invitation"


def asks(home, state, site="north", **more):
    """The path of a site's request."""
    return joining.join(invited(home, site), state, state.with_suffix(".request"), **more)


def renews(state):
    return joining.renew(state, state.with_suffix(".request"))


def yes(site, mark):
    return True


def never(site, mark):
    raise AssertionError("nobody is asked")


def joins(home, state, site="north", **more):
    """Joins a site. Returns the fingerprint of its key."""
    joining.install(admitting.admit(home, asks(home, state, site, **more), yes, True), state)
    return joining.fingerprints(state)["key"]


def forged(site, key, **more):
    """A request by somebody who makes the signing request by hand."""
    names = [x509.NameAttribute(NameOID.COMMON_NAME, more.pop("name", site))]
    names += [x509.NameAttribute(oid, text) for oid, text in more.pop("names", ())]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    for extension in more.pop("extensions", ()):
        builder = builder.add_extension(extension, True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    text = builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM).decode()
    return keys.Request(site=site, csr=text, **more)


def rsa_key(bits=2048, exponent=65537):
    return rsa.generate_private_key(public_exponent=exponent, key_size=bits)


def private_keys(folder):
    """Path -> the fingerprints of all private keys in a folder's files, JSON files included."""
    found = {}
    for path in folder.rglob("*"):
        text = path.read_bytes().replace(b"\\n", b"\n") if path.is_file() else b""
        for block in re.findall(
            rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?END [^\n]*-----", text, re.S
        ):
            key = serialization.load_pem_private_key(block + b"\n", None)
            found.setdefault(str(path.relative_to(folder)), set()).add(keys.fingerprint(key))
    return found


def past(certificate, authority):
    """The same certificate, but it ended yesterday."""
    today = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(certificate.subject)
    builder = builder.issuer_name(certificate.issuer).public_key(certificate.public_key())
    builder = builder.serial_number(7).not_valid_before(today - datetime.timedelta(days=9))
    builder = builder.not_valid_after(today - datetime.timedelta(days=1))
    return builder.sign(authority, hashes.SHA256())
