"""The operator admits a key to one site, renews, revokes, and reads files that others wrote."""

import json
import shutil

import pytest

from fedvlm.errors import ConfigError, FedVLMError
from test_cli import call

pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")

from cryptography.hazmat.primitives import serialization

from fedvlm.deploy.nvflare import admitting, joining, keys
from fedvlm.deploy.nvflare.names import INSIDE
from fedvlm.deploy.nvflare.project import (
    Project,
    Server,
    admitted,
    check_certificate,
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
    past,
    yes,
)


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
    with pytest.raises(FedVLMError, match=r"ended on .*deploy renew"):
        check_certificate(path)
    provision(PROJECT, home)
    check_certificate(path)
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


def test_a_sites_key_can_be_a_credential_of_the_service_manager(home, tmp_path, monkeypatch):
    state = tmp_path / "north"
    joins(home, state)
    (key,) = (state / "keys").glob("*/site.key")
    given = tmp_path / "credentials"
    given.mkdir()
    key.rename(given / "site.key")
    with pytest.raises(FedVLMError, match=r"no credential 'site\.key' was given"):
        joining.equip(state, state / "nvflare")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(given))
    joining.equip(state, state / "nvflare")
    used = state / "nvflare" / "startup" / "client.key"
    assert used.resolve() == given / "site.key"
    secret = used.read_bytes()
    files = [path for path in state.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    assert not [path for path in files if secret in path.read_bytes()], "no copy is on the disk"


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


def test_init_again_leaves_a_running_server_what_its_next_jobs_read(home):
    """The process of a job reads the same files as the server that has started it."""
    local = home / "server" / "local"
    before = {p.name: p.read_bytes() for p in local.iterdir()}
    assert str(home / "admitted.json") not in before["resources.json"].decode()  # it was moved
    provision(PROJECT, home)
    after = {p.name: p.read_bytes() for p in local.iterdir()}
    assert str(home / "admitted.json") in after["resources.json"].decode()
    assert json.loads(after["comm_config.json"]) == INSIDE
    assert before.keys() == after.keys()
