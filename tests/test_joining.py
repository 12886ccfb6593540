"""A site joins a federation with a key of its own: requests, renewals, revocations."""

import datetime
import json
import re
import shutil

import pytest

from fedvlm.errors import FedVLMError
from test_cli import call

pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import NameOID

from fedvlm.deploy.nvflare import admitting, joining, keys
from fedvlm.deploy.nvflare.project import (
    admitted,
    provision,
)
from joined import (
    PROJECT,
    another,  # noqa: F401
    asks,
    forged,
    home,  # noqa: F401
    invited,
    joins,
    made,  # noqa: F401
    never,
    past,
    private_keys,
    renews,
    rsa_key,
    yes,
)


def test_no_private_key_of_a_site_is_ever_at_the_operator(home, tmp_path):
    state = tmp_path / "north"
    first = joins(home, state)
    joining.install(admitting.admit(home, renews(state), never), state)
    second = joining.fingerprints(state)["key"]
    provision(PROJECT, home)
    theirs = private_keys(home)
    state_file = "ca/fedvlm/state/cert.json"
    assert theirs.keys() == {state_file, "server/startup/server.key", "admin/startup/client.key"}
    assert len(theirs[state_file]) == 3, "the authority's, the server's and the operator's"
    assert not {first, second} & set().union(*theirs.values())
    mine = private_keys(state)
    assert mine == {f"keys/{second[:16]}/site.key": {second}}, "the search finds a site's key"
    for path in (*home.rglob("*.invitation"), *home.rglob("*.admission")):
        assert "PRIVATE" not in path.read_text()
    assert "PRIVATE" not in state.with_suffix(".request").read_text()


def test_only_its_owner_may_read_a_sites_key(home, tmp_path):
    state = tmp_path / "deep" / "north"
    joins(home, state)
    joining.equip(state, state / "nvflare")
    for path in [*state.rglob("*.key"), state / "keys", state, state / "nvflare" / "startup"]:
        assert path.stat().st_mode & 0o077 == 0, path
    assert (home / "ca" / "fedvlm" / "state" / "cert.json").stat().st_mode & 0o077 == 0


def test_both_ends_show_the_same_fingerprints(home, tmp_path, capsys, monkeypatch):
    state, request = str(tmp_path / "north"), str(tmp_path / "north.request")
    join = ("site", "join", str(invited(home)), "--state", state, "--to", request)
    code, asked, _ = call(capsys, monkeypatch, *join)
    assert code == 0
    (federation, own) = (keys.grouped(m) for m in joining.fingerprints(tmp_path / "north").values())
    assert federation in asked
    assert own in asked
    code, said, errors = call(capsys, monkeypatch, "deploy", "admit", request, "-f", str(home))
    assert code == 2, "nobody at a terminal has compared the fingerprints"
    assert own in said
    assert "--fingerprint" in errors
    admit = ("deploy", "admit", request, "-f", str(home), "--fingerprint", own.upper())
    assert call(capsys, monkeypatch, *admit)[0] == 0
    admission = str(home / "sites" / "north.admission")
    assert call(capsys, monkeypatch, "site", "join", admission, "--state", state)[0] == 0
    _, listed, _ = call(capsys, monkeypatch, "deploy", "fingerprints", "-f", str(home))
    _, here, _ = call(capsys, monkeypatch, "site", "fingerprint", "--state", state)
    for text in (listed, here):
        assert federation in text
        assert own in text
    assert re.search("south +not admitted", listed)


def test_another_fingerprint_admits_nobody(home, tmp_path, capsys, monkeypatch):
    request, wrong = asks(home, tmp_path / "north"), "ab" * 32
    for typed, said in (
        (wrong, "not confirmed"),
        (wrong[:-2], "no fingerprint"),
        ("", "telephone"),
    ):
        words = ("deploy", "admit", str(request), "-f", str(home), "--fingerprint", typed)
        code, _, errors = call(capsys, monkeypatch, *words)
        assert code == 2
        assert said in errors
        assert "Traceback" not in errors
    assert admitted(home)["sites"] == {}
    assert not list(home.rglob("*.admission"))


def test_a_site_renews_and_is_revoked_by_one_command_each(home, tmp_path, capsys, monkeypatch):
    state, request = tmp_path / "north", tmp_path / "north.request"
    first = joins(home, state)
    renew = ("site", "renew", "--state", str(state), "--to", str(request))
    assert call(capsys, monkeypatch, *renew)[0] == 0
    admit = ("deploy", "admit", str(request), "-f", str(home))
    assert call(capsys, monkeypatch, *admit)[0] == 0, "the present key vouches for the new one"
    admission = str(home / "sites" / "north.admission")
    assert call(capsys, monkeypatch, "site", "join", admission, "--state", str(state))[0] == 0
    second = joining.fingerprints(state)["key"]
    assert second != first
    code, said, _ = call(capsys, monkeypatch, "deploy", "revoke", "north", "-f", str(home))
    assert code == 0
    assert keys.grouped(second) in said
    code, _, errors = call(capsys, monkeypatch, "deploy", "revoke", "north", "-f", str(home))
    assert code == 2
    assert "no admitted key" in errors


def test_a_site_that_has_not_joined_is_told_how(home, tmp_path, capsys, monkeypatch):
    admission = str(admitting.admit(home, asks(home, tmp_path / "north"), yes))
    data, empty = ("--data", str(tmp_path)), ("--state", str(tmp_path / "empty"))
    for words in (("join", admission), ("renew",), ("fingerprint",), ("start", *data)):
        code, _, errors = call(capsys, monkeypatch, "site", *words, *empty)
        assert code == 2
        assert "has joined no federation: 'fedvlm site join NAME.invitation" in errors
    waiting = ("--state", str(tmp_path / "north"))
    code, _, errors = call(capsys, monkeypatch, "site", "start", *data, *waiting)
    assert code == 2
    assert "is not admitted yet: 'fedvlm site join NAME.admission" in errors
    assert not (tmp_path / "empty").exists()


def test_a_renewal_needs_no_person_and_both_keys_are_let_in_until_the_next(home, tmp_path):
    state = tmp_path / "north"
    first = joins(home, state)
    admission = admitting.admit(home, renews(state), never)
    second = joining.fingerprints(state)["next"]
    assert admitted(home)["sites"]["north"] == [first, second], "the site still runs with the first"
    joining.install(admission, state)
    joining.install(admitting.admit(home, renews(state), never), state)
    third = joining.fingerprints(state)["key"]
    assert admitted(home)["sites"]["north"] == [second, third]
    assert admitted(home)["revoked"] == [first]
    assert [p.name for p in (state / "keys").iterdir() if p.is_dir()] == [third[:16]]


def test_asking_twice_changes_nothing(home, tmp_path):
    state = tmp_path / "north"
    one = keys.read(asks(home, state), keys.Request)
    two = keys.read(asks(home, state), keys.Request)
    assert keys.fingerprint(keys.asked(one)) == keys.fingerprint(keys.asked(two))
    first = admitting.admit(home, asks(home, state), yes)
    assert admitting.admit(home, asks(home, state), never) == first, "its file was lost on the way"
    joining.install(first, state)
    with pytest.raises(FedVLMError, match="has joined as 'north'"):
        asks(home, state)


def test_only_the_key_is_taken_from_a_request(home):
    key = rsa_key()
    asked = forged(
        "north",
        key,
        names=[(NameOID.UNSTRUCTURED_NAME, "project_admin"), (NameOID.ORGANIZATION_NAME, "other")],
        extensions=[
            x509.BasicConstraints(ca=True, path_length=None),
            x509.SubjectAlternativeName([x509.DNSName("localhost")]),
        ],
    )
    admission = admitting.admit(home, keys.write(home / "r", asked), yes)
    found = keys.certificate(keys.read(admission, keys.Admission).certificate, "it")
    names = {n.oid: n.value for n in found.subject}
    assert names == {NameOID.COMMON_NAME: "north", NameOID.ORGANIZATION_NAME: "fedvlm"}
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    hosts = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert hosts.get_values_for_type(x509.DNSName) == ["north"], "not the server's, nor a wildcard"
    assert len(hosts) == 1
    assert found.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False
    root = keys.certificate((home / "server/startup/rootCA.pem").read_bytes(), "it")
    assert found.not_valid_after_utc <= root.not_valid_after_utc
    assert datetime.timedelta(359) < keys.left(found) <= datetime.timedelta(360)


def test_a_certificate_does_not_outlive_its_authority():
    now = datetime.datetime.now(datetime.UTC)
    authority = rsa_key()
    root = root_of(authority, now + datetime.timedelta(days=9))
    csr = keys.asked(forged("north", rsa_key()))
    assert keys.sign(csr, "north", root, authority).not_valid_after_utc == root.not_valid_after_utc
    with pytest.raises(FedVLMError, match="authority ended on"):
        keys.sign(csr, "north", root_of(authority, now - datetime.timedelta(days=9)), authority)


def root_of(authority, end):
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedvlm")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    builder = builder.public_key(authority.public_key()).serial_number(1)
    builder = builder.not_valid_before(end - datetime.timedelta(days=99)).not_valid_after(end)
    return builder.sign(authority, hashes.SHA256())


def changed(request, key):
    """A request whose signing request holds another key than the one that has signed it."""
    csr = x509.load_pem_x509_csr(request.csr.encode())
    der = csr.public_bytes(serialization.Encoding.DER)
    old, new = (
        k.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        for k in (csr.public_key(), key.public_key())
    )
    forged = x509.load_der_x509_csr(der.replace(old, new))
    text = forged.public_bytes(serialization.Encoding.PEM).decode()
    return request.model_copy(update={"csr": text})


REFUSED = {
    "a site that the project does not name": (lambda k: forged("west", k), "is no site of this"),
    "a name that differs from the key's": (lambda k: forged("north", k, name="south"), "'south'"),
    "two names": (
        lambda k: forged("north", k, names=[(NameOID.COMMON_NAME, "south")]),
        "its key is for ''",
    ),
    "a key that it does not hold": (
        lambda k: changed(forged("north", k), rsa_key()),
        "not by its own key",
    ),
    "a short key": (lambda k: forged("north", rsa_key(1024)), "no RSA key of 2048"),
    "a key with a small exponent": (lambda k: forged("north", rsa_key(exponent=3)), "65537"),
    "a key that NVFlare cannot use": (
        lambda k: forged("north", ed25519.Ed25519PrivateKey.generate()),
        "no RSA key",
    ),
    "no signing request": (lambda k: keys.Request(site="north", csr="x"), "is refused"),
    "a renewal without a certificate": (
        lambda k: forged("north", k, signature="eA=="),
        "is no certificate",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_request_is_refused_for(what, home):
    request, why = REFUSED[what]
    before = admitted(home)
    with pytest.raises(FedVLMError, match=re.escape(why)):
        admitting.admit(home, keys.write(home / "r", request(rsa_key())), never)
    assert admitted(home) == before
    assert not list(home.rglob("*.admission"))


def test_a_renewal_is_refused_without_the_signature_of_an_admitted_key(home, another, tmp_path):
    north, south, copy = tmp_path / "north", tmp_path / "south", tmp_path / "another"
    joins(home, north)
    joins(home, south, "south")
    joins(shutil.copytree(another, tmp_path / "other"), copy)

    def present(state):
        (key,) = (state / "keys").glob("*/site.key")
        text = key.with_name("site.crt").read_bytes()
        return keys.certificate(text, "it"), keys.read_key(key)

    certificate, own = present(north)
    root = json.loads((home / "ca" / "fedvlm" / "state" / "cert.json").read_text())
    authority = serialization.load_pem_private_key(root["root_pri_key"].encode(), None)
    ended = root_of(own, datetime.datetime.now(datetime.UTC))  # of north's key, by north itself
    for pair, why in (
        ((certificate, rsa_key()), "not signed by the site's present key"),
        (present(south), "is that of 'south'"),
        (present(copy), "not of this federation"),
        ((ended, own), "not of this federation"),
        ((past(certificate, authority), own), "ended on"),
    ):
        request = keys.write(tmp_path / "r", keys.ask("north", rsa_key(), pair))
        with pytest.raises(FedVLMError, match=why):
            admitting.admit(home, request, never)
    stale = keys.write(tmp_path / "r", keys.ask("north", rsa_key(), (certificate, own)))
    admitting.revoke(home, "north")
    with pytest.raises(FedVLMError, match="which is not admitted"):
        admitting.admit(home, stale, never)
    assert "north" not in admitted(home)["sites"]


def test_another_sites_invitation_does_not_replace_a_waiting_key(home, tmp_path):
    state = tmp_path / "south"
    asks(home, state, "south")
    waiting = joining.fingerprints(state)["next"]
    with pytest.raises(FedVLMError, match=r"waits for its admission as 'south'.*--new-key"):
        asks(home, state, "north")
    assert joining.fingerprints(state)["next"] == waiting
    asks(home, state, "north", anew=True)
    assert joining.fingerprints(state)["next"] != waiting
