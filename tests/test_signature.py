"""The operator's signature says who has ordered a run, and of which configuration."""

import datetime
import json
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from fedvlm.config import load
from fedvlm.deploy.digests import digest_of
from fedvlm.deploy.policy import Refused
from fedvlm.deploy.remote import as_sent
from fedvlm.deploy.signature import OPERATOR, ROLE, sign, signer

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def issued(name, role, own, issuer, authority, days=9):
    names = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    names += [x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, role)] if role else []
    builder = x509.CertificateBuilder().subject_name(x509.Name(names)).issuer_name(issuer)
    builder = builder.public_key(own.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(NOW - 20 * DAY).not_valid_after(NOW + days * DAY)
    return pem(builder.sign(authority, hashes.SHA256()))


def pem(certificate):
    return certificate.public_bytes(serialization.Encoding.PEM)


def private(own):
    form = serialization.PrivateFormat.TraditionalOpenSSL
    return own.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


@pytest.fixture(scope="module")
def ca():
    """An authority with an operator and a site, and another authority of the same name."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedvlm")])
    root, other, own = key(), key(), key()
    return SimpleNamespace(
        root=issued("fedvlm", None, root, name, root, 99),
        key=private(own),
        operator=issued(OPERATOR, ROLE, own, name, root),
        expired=issued(OPERATOR, ROLE, own, name, root, -1),
        site=issued("north", None, own, name, root),
        no_role=issued(OPERATOR, None, own, name, root),
        foreign=issued(OPERATOR, ROLE, own, name, other),
        itself=issued(OPERATOR, ROLE, own, x509.Name([*name]), own),
    )


def test_the_operators_signature_names_the_operator(ca):
    assert signer("r1", "d1", sign("r1", "d1", ca.key, ca.operator), ca.root) == OPERATOR


@pytest.mark.parametrize(
    ("who", "why"),
    [
        ("foreign", "not of this federation's authority"),
        ("itself", "not of this federation's authority"),
        ("site", f"not that of {OPERATOR}"),
        ("no_role", f"not that of {OPERATOR}"),
        ("expired", "a certificate is valid until"),
    ],
)
def test_a_signature_with_another_certificate_is_refused(ca, who, why):
    given = sign("r1", "d1", ca.key, getattr(ca, who))
    with pytest.raises(Refused, match=why):
        signer("r1", "d1", given, ca.root)


def test_a_signature_for_another_run_or_configuration_is_refused(ca):
    given = sign("r1", "d1", ca.key, ca.operator)
    for run, digest in (("r2", "d1"), ("r1", "d2"), ("r1\nd1", ""), ("", "r1\nd1")):
        with pytest.raises(Refused, match="for another run number or another configuration"):
            signer(run, digest, given, ca.root)


def test_a_signature_by_another_key_is_refused(ca):
    given = sign("r1", "d1", private(key()), ca.operator)
    with pytest.raises(Refused, match="for another run number or another configuration"):
        signer("r1", "d1", given, ca.root)


@pytest.mark.parametrize(
    "given",
    [
        None,
        [],
        "x",
        7,
        {},
        {"certificate": 1, "signature": 2},
        {"certificate": "x", "signature": "!"},
        {"certificate": "x", "signature": "AAAA"},
        {"certificate": "x" * 10**6, "signature": "AAAA"},
        {"certificate": "\ud800", "signature": "AAAA"},
        {"certificate": ["x"], "signature": ["AAAA"]},
    ],
)
def test_what_is_no_signature_is_refused(ca, given):
    with pytest.raises(Refused, match="needs the operator's signature"):
        signer("r1", "d1", given, ca.root)


# -- the digest


def test_a_configuration_has_the_same_digest_before_and_after_it_was_sent():
    tree = as_sent(load({"train": {"lr": 1e-30}, "lora": {"ranks": {"ä": 4}}}))
    there = json.loads(json.dumps(tree))
    assert digest_of(tree) == digest_of(there) == digest_of(dict(reversed(there.items())))
    assert digest_of({"a": {10: 1, 9: (1,)}}) == digest_of({"a": {"10": 1, "9": [1]}})


def test_a_resumed_run_sends_the_configuration_that_it_began_with(tmp_path):
    began = load({"output": "runs/a", "algorithm": {"name": "plora"}})
    resumed = load(json.loads(json.dumps(began.model_dump())), f"output={tmp_path}")
    assert digest_of(as_sent(began)) == digest_of(as_sent(resumed))


def test_every_setting_counts_in_the_digest():
    known = {digest_of(as_sent(load(None, text))) for text in ("seed=1", "seed=2", "train.lr=1e-5")}
    assert len(known) == 3
