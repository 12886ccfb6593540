"""Certificates that end soon: warnings, and a renewal that keeps authority's and sites' keys."""

import json
import logging
import shutil
import ssl
import sys

import pytest
import yaml

from fedvlm.deploy import logs, monitor
from fedvlm.errors import FedVLMError
from test_cli import call

pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")

from fedvlm.deploy.nvflare import admitting, joining, keys, processes
from fedvlm.deploy.nvflare.ending import ends, warnings, warnings_at_site
from fedvlm.deploy.nvflare.project import SOON, provision
from joined import PROJECT, asks, joins, yes


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """A federation whose authority ends in 9 days, and with it everything; north has joined."""
    base = tmp_path_factory.mktemp("ending")
    provision(PROJECT.model_copy(update={"days": 9}), base / "federation")
    joins(base / "federation", base / "north")
    about = base / "federation" / "project.yml"
    about.write_text(yaml.safe_dump(PROJECT.model_dump()))
    return base


@pytest.fixture
def base(ending, tmp_path):
    return shutil.copytree(ending, tmp_path / "base")


def shakes_hands(home, site):
    """Connects a site to the server, as both are on the disk, by TLS in memory."""
    kit, there = home / "server" / "startup", site / "nvflare" / "startup"
    joining.equip(site, site / "nvflare")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(kit / "server.crt", kit / "server.key")
    server.load_verify_locations(kit / "rootCA.pem")
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=there / "rootCA.pem")
    client.load_cert_chain(there / "client.crt", there / "client.key")
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [server.wrap_bio(one, other, server_side=True)]
    ends.append(client.wrap_bio(other, one, server_hostname="localhost"))
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return [bool(end.getpeercert()) for end in ends] == [True, True]


def secrets(home):
    return [
        (home / path).read_bytes()
        for path in ("server/startup/server.key", "admin/startup/client.key")
    ]


def test_every_certificate_that_ends_soon_is_named(base, tmp_path):
    home, state = base / "federation", base / "north"
    found = list(warnings(home, PROJECT))
    named = [line.split("'")[1] for line in found]
    assert named == ["authority", "server", "operator", "north"]
    assert all("fedvlm deploy renew" in line and "ends on 2" in line for line in found)
    when = {who: end.timestamp() for who, end in ends(home, PROJECT).items()}
    families = {family.name: family for family in monitor.ServerNumbers(home, ["north"]).collect()}
    family = families["fedvlm_certificate_end_timestamp_seconds"]
    assert {s.labels["certificate"]: s.value for s in family.samples} == when
    joining.equip(state, state / "nvflare")
    (line,) = warnings_at_site(state / "nvflare/startup/client.crt", "north", "renew it")
    assert line.startswith("the certificate of 'north' ends on 2")
    assert list(warnings_at_site(tmp_path / "none", "north", "")) == []


def test_a_process_that_runs_warns_at_once_and_every_day(tmp_path, monkeypatch):
    told, log = [], tmp_path / "site.log"

    def daily():
        told.append(1)
        logs.warn(log, "the certificate ends")
        if len(told) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(processes, "DAY", 0.1)
    said = []
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes._keep(command, tmp_path, {}, tmp_path / "n.log", said.append, shown=log, daily=daily)
    assert len(told) == 2
    assert any("WARNING the certificate ends" in line for line in said)
    assert json.loads(log.read_text().splitlines()[0])["level"] == logging.getLevelName(30)


def test_a_renewal_keeps_the_keys_of_the_authority_and_the_sites(base, capsys, monkeypatch):
    home, state = base / "federation", base / "north"
    before, theirs = admitting.fingerprints(home), joining.fingerprints(state)
    secret = next(state.glob("keys/*/site.key")).read_bytes()
    private = secrets(home)
    assert shakes_hands(home, state)
    code, out, _ = call(capsys, monkeypatch, "deploy", "renew", "-f", str(home))
    assert code == 0
    assert "send" in out
    assert list(warnings(home, PROJECT)) == []
    after = admitting.fingerprints(home)
    assert after == before
    assert secrets(home) == private, "the server too: it has signed the tokens of the sites"
    assert shakes_hands(home, state), "a site goes on with its old certificates"
    joining.install(home / "sites" / "north.admission", state)
    assert joining.fingerprints(state) == theirs
    assert next(state.glob("keys/*/site.key")).read_bytes() == secret
    assert shakes_hands(home, state)
    root = keys.certificate(joining.joined(state).root, "it")
    assert keys.left(root) > 10 * SOON, "the site has the authority's new certificate"
    assert not list(warnings_at_site(state / "nvflare/startup/client.crt", "north", ""))
    joins(home, base / "south", "south")
    assert shakes_hands(home, base / "south"), "a new site has joined the same federation"


def test_a_site_whose_admission_is_gone_renews_by_itself(base):
    home, state = base / "federation", base / "north"
    (home / "sites" / "north.admission").unlink()
    assert "north" not in admitting.renew(home)
    request = joining.renew(state, base / "north.request")
    joining.install(admitting.admit(home, request, yes), state)
    assert shakes_hands(home, state)
    assert keys.left(keys.certificate(joining.joined(state).root, "it")) > 10 * SOON


def test_an_authority_of_another_key_is_not_taken(base, tmp_path):
    home, state = base / "federation", base / "north"
    other = tmp_path / "other"
    provision(PROJECT, other)
    path = admitting.admit(home, asks(home, base / "south", "south"), yes)
    mine = home / "sites" / "north.admission"
    root = (other / "server/startup/rootCA.pem").read_text()
    mine.write_text(json.dumps(json.loads(mine.read_text()) | {"root": root}))
    known = joining.joined(state).root
    with pytest.raises(FedVLMError, match="its authority is not the one that this site has joined"):
        joining.install(mine, state)
    assert joining.joined(state).root == known
    joining.install(path, base / "south")
