"""A site joins a federation with a key of its own: requests, admissions, renewals, revocations."""

import datetime
import json
import queue
import re
import shutil
from concurrent import futures
from types import SimpleNamespace

import pytest

from fedvlm.errors import ConfigError, FedVLMError
from test_cli import call

pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.x509.oid import NameOID

from fedvlm.deploy import keys
from fedvlm.deploy.nvflare import admitting, joining
from fedvlm.deploy.nvflare.demo import enrol
from fedvlm.deploy.nvflare.project import (
    Project,
    Server,
    admitted,
    check_certificate,
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


def past(certificate, authority):
    """The same certificate, but it ended yesterday."""
    today = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(certificate.subject)
    builder = builder.issuer_name(certificate.issuer).public_key(certificate.public_key())
    builder = builder.serial_number(7).not_valid_before(today - datetime.timedelta(days=9))
    builder = builder.not_valid_after(today - datetime.timedelta(days=1))
    return builder.sign(authority, hashes.SHA256())


def test_one_key_is_for_one_site(home, tmp_path):
    joins(home, tmp_path / "north")
    key = keys.read_key(next((tmp_path / "north" / "keys").glob("*/site.key")))
    theirs = keys.write(tmp_path / "r", forged("south", key))
    with pytest.raises(FedVLMError, match="is that of north"):
        admitting.admit(home, theirs, yes)
    operator = keys.read_key(home / "admin" / "startup" / "client.key")
    with pytest.raises(FedVLMError, match="is that of the operator"):
        admitting.admit(home, keys.write(tmp_path / "r", forged("south", operator)), yes)


def test_a_second_key_is_admitted_only_in_place_of_the_first(home, tmp_path):
    first = joins(home, tmp_path / "north")
    request = asks(home, tmp_path / "stolen-name")
    with pytest.raises(FedVLMError, match="admitted with another key"):
        admitting.admit(home, request, yes)
    assert admitted(home)["sites"]["north"] == [first]
    admitting.admit(home, request, yes, replace=True)
    second = joining.fingerprints(tmp_path / "stolen-name")["next"]
    assert admitted(home)["sites"]["north"] == [second]
    assert admitted(home)["revoked"] == [first]


def test_a_revoked_key_is_never_admitted_again_but_a_new_one_is(home, tmp_path):
    state = tmp_path / "north"
    request = asks(home, state)
    joining.install(admitting.admit(home, request, yes), state)
    first = joining.fingerprints(state)["key"]
    assert admitting.revoke(home, "north") == [first]
    for replace in (False, True):
        with pytest.raises(FedVLMError, match="was revoked"):
            admitting.admit(home, request, yes, replace)
    second = joins(home, state, anew=True)
    assert admitted(home)["sites"]["north"] == [second]
    assert admitted(home)["revoked"] == [first]


def test_init_again_keeps_admitted_keys_and_revokes_sites_that_have_left(home, tmp_path):
    north, south = joins(home, tmp_path / "north"), joins(home, tmp_path / "south", "south")
    provision(PROJECT.model_copy(update={"sites": ["north", "east"]}), home)
    kept = admitted(home)
    assert kept["sites"] == {"north": [north]}
    assert kept["revoked"] == [south]
    assert invited(home, "east").exists()
    joins(home, tmp_path / "east", "east")


def test_init_again_renews_the_operators_certificates_and_removes_keys_of_sites(home):
    """Version 0.1 made the sites' keys at the operator."""
    kept = home / "ca" / "fedvlm" / "state" / "cert.json"
    tree = json.loads(kept.read_text())
    authority = serialization.load_pem_private_key(tree["root_pri_key"].encode(), None)
    ended = keys.pem(past(keys.certificate(tree["localhost"]["cert"], "it"), authority))
    server = {**tree["localhost"], "cert": ended}
    kept.write_text(json.dumps({**tree, "localhost": server, "north": tree["localhost"]}))
    (home / "sites" / "north.zip").write_bytes(b"kit")
    old = home / "ca" / "fedvlm" / "prod_00" / "north" / "startup"
    old.mkdir(parents=True)
    (old / "client.key").write_bytes((home / "server" / "startup" / "server.key").read_bytes())
    path, admin = home / "server" / "startup" / "server.crt", admitted(home)["admin"]
    path.write_text(ended)
    with pytest.raises(FedVLMError, match=r"ended on .*deploy init"):
        check_certificate(path)
    provision(PROJECT, home)
    assert check_certificate(path) == "", "the new certificate is valid for long"
    again = json.loads(kept.read_text())
    assert again.keys() == tree.keys(), "without north"
    assert again["root_cert"] == tree["root_cert"]
    assert admitted(home)["admin"] == admin, "the operator's certificate does not end yet"
    assert not (home / "sites" / "north.zip").exists()
    assert not list(home.rglob("prod_*"))


def test_a_site_refuses_an_admission_of_another_key_or_federation(home, another, tmp_path):
    state = tmp_path / "north"
    request = asks(home, state)
    theirs = admitting.admit(shutil.copytree(another, tmp_path / "other"), request, yes)
    with pytest.raises(FedVLMError, match="is not for 'north' by the federation"):
        joining.install(theirs, state)
    with pytest.raises(FedVLMError, match="which is not in"):
        joining.install(admitting.admit(home, asks(home, tmp_path / "n2"), yes), state)
    with pytest.raises(FedVLMError, match="is not admitted yet"):
        joining.joined(state)
    joining.install(admitting.admit(home, request, yes, replace=True), state)
    assert joining.joined(state).site == "north"


def test_an_invitation_cannot_loosen_what_a_site_allows(home, tmp_path):
    state = tmp_path / "north"
    text = invited(home).read_text()
    for field, value in (("files", {}), ("address", "h:1/x"), ("site", "../x"), ("port", 0)):
        wrong = tmp_path / "wrong.invitation"
        wrong.write_text(json.dumps(json.loads(text) | {field: value}))
        with pytest.raises(FedVLMError, match=f"is no invitation of fedvlm: {field}"):
            joining.join(wrong, state, tmp_path / "r")
    assert not state.exists()
    joins(home, state)
    local = state / "nvflare" / "local"
    joining.equip(state, local.parent)
    whole = json.loads((local / "resources.json").read_text())
    (local / "resources.json").write_text(json.dumps(whole | {"class_list_enforcement_mode": ""}))
    (local / "custom.json").write_text("{}")
    joining.equip(state, local.parent)
    assert json.loads((local / "resources.json").read_text()) == whole
    assert whole["class_list_enforcement_mode"] == "enforce"
    assert not (local / "custom.json").exists()


def test_an_invitation_without_an_authority_is_refused(home, tmp_path):
    request = asks(home, tmp_path / "north")
    signed = keys.read(admitting.admit(home, request, yes), keys.Admission).certificate
    text = json.loads(invited(home).read_text())
    for root, why in ((signed, "no authority"), ("x", "is no certificate")):
        (tmp_path / "wrong.invitation").write_text(json.dumps(text | {"root": root}))
        with pytest.raises(FedVLMError, match=why):
            joining.join(tmp_path / "wrong.invitation", tmp_path / "s", tmp_path / "r")


DAMAGED = {
    "nothing": b"",
    "no JSON": b"PK\x03\x04",
    "a list": b"[]",
    "brackets": b"[" * 60_000,
    "a long file": b" " * 2**17,
    "another kind": b'{"kind": "fedvlm request"}',
    "a number": b'{"kind": 7}',
    "a surrogate": b'{"kind": "fedvlm admission", "site": "\\ud800", "certificate": "\\ud800"}',
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_one_message_and_exit_code_2(what, tmp_path, capsys, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(DAMAGED[what])
    words = ("site", "join", str(path), "--state", str(tmp_path / "s"))
    code, _, errors = call(capsys, monkeypatch, *words)
    assert code == 2
    assert "is no invitation or admission of fedvlm" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "s").exists()


def test_without_the_authoritys_key_nothing_is_signed(home, tmp_path):
    request = asks(home, tmp_path / "north")
    shutil.rmtree(home / "ca")
    with pytest.raises(FedVLMError, match="kept offline"):
        admitting.admit(home, request, yes)
    assert admitted(home)["sites"] == {}


def test_no_site_has_the_servers_name():
    with pytest.raises(ValueError, match="names the server and a site"):
        Project(server=Server(address="North"), sites=["north"])
    with pytest.raises((ConfigError, ValueError), match="is no name"):
        Project(server=Server(address="h"), sites=["admin@fedvlm.local"])


# -- the gate, before a real gRPC stream with mutual TLS


@pytest.fixture
def gate(home, tmp_path, monkeypatch):
    """The server's stream behind the gate. ``connect(state)`` opens one as a site."""
    import grpc
    from nvflare.fuel.f3.drivers import grpc_driver
    from nvflare.fuel.f3.drivers.grpc import streamer_pb2, streamer_pb2_grpc

    from fedvlm.deploy.nvflare import gate as gates

    def echo(self, request_iterator, context):
        yield from request_iterator

    monkeypatch.setattr(gates, "LOOKED", 0.05)
    monkeypatch.setattr(grpc_driver.Servicer, "Stream", echo)
    gates.Gate(str(home / "admitted.json"))
    server = grpc.server(futures.ThreadPoolExecutor(8))
    connector = SimpleNamespace(params={"scheme": "grpcs"})
    servicer = grpc_driver.Servicer(SimpleNamespace(connector=connector))
    streamer_pb2_grpc.add_StreamerServicer_to_server(servicer, server)
    kit = home / "server" / "startup"
    root = (kit / "rootCA.pem").read_bytes()
    pair = tuple((kit / f"server.{end}").read_bytes() for end in ("key", "crt"))
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair], root, True))
    server.start()
    channels = []

    class Stream:
        """A site's open stream: sends a frame, and waits for its echo."""

        def __init__(self, certificate, key):
            credentials = grpc.ssl_channel_credentials(root, key, certificate)
            channels.append(grpc.secure_channel(f"localhost:{port}", credentials))
            self.frames = queue.Queue()
            stub = streamer_pb2_grpc.StreamerStub(channels[-1])
            self.answers = stub.Stream(iter(self.frames.get, None), timeout=60)

        def echo(self):
            """``let in``, or the status with which the server has ended the stream."""
            self.frames.put(streamer_pb2.Frame(seq=1, data=b"x"))
            try:
                return "let in" if next(self.answers).data == b"x" else "other"
            except grpc.RpcError as error:
                return error.code().name
            except StopIteration:
                return "ended"

        def ended(self):
            """Waits for the end of the stream."""
            try:
                next(self.answers)
            except grpc.RpcError as error:
                return error.code().name
            return "still open"

    def connect(state):
        (key,) = (state / "keys").glob("*/site.key")
        return Stream(key.with_name("site.crt").read_bytes(), key.read_bytes())

    connect.Stream = Stream
    yield connect
    for channel in channels:
        channel.close()
    server.stop(None)


def test_the_gate_lets_in_admitted_keys_and_the_operator(gate, home, tmp_path):
    for site in SITES:
        enrol(invited(home, site), tmp_path / site)
        assert gate(tmp_path / site).echo() == "let in"
    kit = home / "admin" / "startup"
    operator = gate.Stream((kit / "client.crt").read_bytes(), (kit / "client.key").read_bytes())
    assert operator.echo() == "let in"


def test_a_certificate_of_the_authority_alone_does_not_pass_the_gate(gate, home, tmp_path):
    enrol(invited(home), tmp_path / "north")
    stolen = shutil.copytree(home, tmp_path / "stolen")  # signs, but its list is not the server's
    enrol(invited(stolen, "south"), tmp_path / "south")
    assert gate(tmp_path / "south").echo() == "PERMISSION_DENIED"
    root = json.loads((home / "ca" / "fedvlm" / "state" / "cert.json").read_text())
    authority = serialization.load_pem_private_key(root["root_pri_key"].encode(), None)
    own = keys.read_key(next((tmp_path / "north" / "keys").glob("*/site.key")))
    ca = keys.certificate(root["root_cert"], "it")
    named = keys.sign(keys.asked(forged("south", own)), "south", ca, authority)
    text = own.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    liar = gate.Stream(keys.pem(named).encode(), text)
    assert liar.echo() == "PERMISSION_DENIED", "north's admitted key, in a certificate of south"


def test_revoking_closes_the_open_stream_of_one_site_only(gate, home, tmp_path):
    for site in SITES:
        enrol(invited(home, site), tmp_path / site)
    north, south = gate(tmp_path / "north"), gate(tmp_path / "south")
    assert north.echo() == south.echo() == "let in"
    admitting.revoke(home, "north")
    assert north.ended() == "CANCELLED"
    assert gate(tmp_path / "north").echo() == "PERMISSION_DENIED"
    assert south.echo() == "let in"
    joins(home, tmp_path / "north", anew=True)
    assert gate(tmp_path / "north").echo() == "let in", "a new key, without a new federation"


def test_both_keys_pass_the_gate_while_a_site_renews(gate, home, tmp_path):
    state = tmp_path / "north"
    enrol(invited(home), state)
    running = gate(state)
    assert running.echo() == "let in"
    joining.install(admitting.admit(home, renews(state), never), state)
    assert gate(state).echo() == "let in"
    assert running.echo() == "let in"


@pytest.mark.parametrize("text", ["", "{}", '{"sites": 7}', "[]"])
def test_the_gate_is_shut_while_the_list_cannot_be_read(text, gate, home, tmp_path):
    enrol(invited(home), tmp_path / "north")
    whole = (home / "admitted.json").read_text()
    before = gate(tmp_path / "north")
    assert before.echo() == "let in"
    (home / "admitted.json").write_text(text)
    assert before.ended() == "CANCELLED"
    assert gate(tmp_path / "north").echo() == "PERMISSION_DENIED"
    (home / "admitted.json").write_text(whole)
    assert gate(tmp_path / "north").echo() == "let in"


def test_a_server_does_not_start_if_nvflare_has_no_such_stream(tmp_path, monkeypatch):
    from nvflare.fuel.f3.drivers import grpc_driver

    from fedvlm.deploy.nvflare.gate import Gate

    monkeypatch.setattr(grpc_driver.Servicer, "Stream", lambda self, frames: frames)
    with pytest.raises(RuntimeError, match="keys cannot be checked"):
        Gate(str(tmp_path))
