"""Who may say what to a site: signed requests, signed jobs, and messages by their senders."""

import datetime
import io
import json
import shutil
import socket
import ssl
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")

from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey as Key
from nvflare.fuel.f3.cellnet.fqcn import FqcnInfo
from nvflare.fuel.f3.drivers.connector_info import Mode
from nvflare.fuel.f3.drivers.tcp_driver import TcpDriver, TcpStreamServer
from nvflare.lighter.utils import load_private_key_file, sign_folders

from fedvlm.deploy.nvflare import client, guard, signing
from fedvlm.deploy.nvflare.project import provision
from fedvlm.deploy.nvflare.signing import Forged, Signer, Verifier

JOB = "0f8fad5b-d9cb-469f-a165-70867728950e"
TRAIN, BLOB = {"do": "train", "round": 3}, b"tensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A federation of north and south, with the files of NVFlare's clients in ``kits``."""
    from fedvlm.deploy.nvflare.demo import enrol, loopback
    from fedvlm.deploy.nvflare.joining import equip

    folder = tmp_path_factory.mktemp("guard")
    invited = provision(loopback(("north", "south")), folder)
    for name in ("north", "south"):
        enrol(invited[name], folder / "states" / name)
        equip(folder / "states" / name, folder / "kits" / name)
    return folder


@pytest.fixture(scope="module")
def signer(home):
    return Signer(home / "server" / "startup", JOB)


@pytest.fixture
def verifier(home):
    return Verifier(home / "kits" / "north" / "startup", JOB, "north")


# -- signed requests


def test_a_site_takes_the_requests_that_the_server_signs(signer, verifier):
    for header in (TRAIN, {"do": "wait"}, {"do": "fetch"}):
        assert verifier.header(signer.sign(header, BLOB, "north"), BLOB) == header


def test_a_request_counts_once_and_never_after_a_later_one(signer, verifier):
    early, late = (signer.sign(TRAIN, BLOB, "north") for _ in range(2))
    verifier.header(late, BLOB)
    for text in (late, early):
        with pytest.raises(Forged, match="a repetition, or an older request"):
            verifier.header(text, BLOB)


def test_a_request_is_for_one_site_one_job_and_one_body(home, signer, verifier):
    with pytest.raises(Forged, match="for another site"):
        verifier.header(signer.sign(TRAIN, BLOB, "south"), BLOB)
    with pytest.raises(Forged, match="for another job"):
        verifier.header(Signer(home / "server" / "startup", "1").sign(TRAIN, BLOB, "north"), BLOB)
    with pytest.raises(Forged, match="for another body"):
        verifier.header(signer.sign(TRAIN, BLOB, "north"), b"other tensors")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "[" * 10**5, json.dumps(TRAIN)])
def test_a_request_without_a_signature_is_refused(verifier, text):
    with pytest.raises(Forged, match="no signature of the server"):
        verifier.header(text, BLOB)


def test_a_request_that_was_changed_is_refused(signer, verifier):
    whole = json.loads(signer.sign(TRAIN, BLOB, "north"))
    for changed in ({"said": whole["said"].replace("3", "4")}, {"signature": "AAAA"}):
        with pytest.raises(Forged, match="not of the server's key"):
            verifier.header(json.dumps(whole | changed), BLOB)
    with pytest.raises(Forged, match="characters"):
        verifier.header(" " * (signing.HEADER + 1), BLOB)


def test_a_site_of_the_federation_cannot_sign_as_the_server(home, verifier, tmp_path):
    for end in ("crt", "key"):
        shutil.copy(
            home / "kits" / "south" / "startup" / f"client.{end}", tmp_path / f"server.{end}"
        )
    with pytest.raises(Forged, match=r"signed by \['south'\], and the server is 'localhost'"):
        verifier.header(Signer(tmp_path, JOB).sign(TRAIN, BLOB, "north"), BLOB)


def test_a_server_of_another_federation_is_refused(signer, verifier, tmp_path):
    from fedvlm.deploy.nvflare.demo import loopback

    provision(loopback(("north",)), tmp_path)
    other = Signer(tmp_path / "server" / "startup", JOB)
    with pytest.raises(Forged, match="of another authority"):
        verifier.header(other.sign(TRAIN, BLOB, "north"), BLOB)
    whole = json.loads(other.sign(TRAIN, BLOB, "north"))
    ours = json.loads(signer.sign(TRAIN, BLOB, "north"))["certificate"]
    with pytest.raises(Forged, match="not of the server's key"):
        verifier.header(json.dumps(whole | {"certificate": ours}), BLOB)


@pytest.mark.parametrize(("hours", "how"), [(-2, "before"), (2, "after")])
def test_a_request_of_another_time_is_refused(signer, verifier, monkeypatch, hours, how):
    now = signing.time.time()
    then = SimpleNamespace(time_ns=lambda: int((now + 3600 * hours) * 1e9), time=lambda: now)
    monkeypatch.setattr(signing, "time", then)
    monkeypatch.setattr(signer, "_last", 0)
    text = signer.sign(TRAIN, BLOB, "north")
    signer._last = 0
    with pytest.raises(Forged, match=rf"720\d s {how} this site's time.*check the clocks"):
        verifier.header(text, BLOB)


def test_a_request_by_an_expired_certificate_is_refused(signer, verifier, monkeypatch):
    text = signer.sign(TRAIN, BLOB, "north")
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=400)
    clock = SimpleNamespace(datetime=SimpleNamespace(now=lambda zone: later), UTC=datetime.UTC)
    monkeypatch.setattr(signing, "datetime", clock)
    with pytest.raises(Forged, match="has expired"):
        verifier.header(text, BLOB)


def test_a_sites_process_does_no_work_for_an_unsigned_request(signer, verifier, monkeypatch):
    monkeypatch.setattr(client, "collab", SimpleNamespace(caller="server"))
    monkeypatch.setattr(guard, "install", lambda: None)
    site, done = client.Client(), []
    site.verifier = verifier
    site.desk = SimpleNamespace(ask=lambda *asked: done.append(asked) or ({"did": "it"}, b""))
    answer, tensors = site.ask(json.dumps({**TRAIN, "number": "1", "limit": 9}), BLOB)
    assert json.loads(answer)["error"] == "refused"
    assert not tensors
    assert not done
    assert site.ask(signer.sign(TRAIN, BLOB, "north"), BLOB) == ['{"did": "it"}', b""]
    assert done == [(TRAIN, BLOB)]


# -- signed jobs


def app(home, folder, pair):
    """A job's files, signed with a key. Returns the zip archive."""
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "config_fed_client.json").write_text("{}")
    if pair:
        startup = home / pair / "startup"
        sign_folders(folder, load_private_key_file(startup / "client.key"), startup / "client.crt")
    return zipped(folder)


def zipped(folder):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for path in folder.rglob("*"):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
    return whole.getvalue()


@pytest.fixture
def deployed(home):
    """Takes a job as a site's process does. Returns the answer, and whether NVFlare got the job."""
    taken = []

    def take(files):
        deploy = SimpleNamespace(process=lambda req, ctx: taken.append(req) or "deployed")
        context = SimpleNamespace(args=SimpleNamespace(workspace=str(home / "kits" / "north")))
        answer = guard.Signed(deploy).process(SimpleNamespace(body=files), context)
        return (answer if answer == "deployed" else str(answer.body)), bool(taken)

    return take


def test_a_job_of_the_operator_is_taken(home, deployed, tmp_path):
    assert deployed(app(home, tmp_path / "app", "admin")) == ("deployed", True)


@pytest.mark.parametrize(
    ("pair", "why"),
    [("kits/south", "it is signed by ['south']"), (None, "it is not signed, or was changed")],
)
def test_a_job_of_a_site_or_of_nobody_is_refused(home, deployed, tmp_path, pair, why):
    answer, taken = deployed(app(home, tmp_path / "app", pair))
    assert why in answer
    assert not taken


def test_a_job_that_was_changed_is_refused(home, deployed, tmp_path):
    app(home, tmp_path / "app", "admin")
    (tmp_path / "app" / "config" / "config_fed_client.json").write_text("{ }")
    answer, taken = deployed(zipped(tmp_path / "app"))
    assert "it is not signed, or was changed" in answer
    assert not taken
    assert "no zip archive" in deployed(b"PK")[0]


def test_a_site_performs_the_commands_of_a_job_and_no_others(monkeypatch):
    processors = list(guard.ClientRequestProcessors.request_processors)
    monkeypatch.setattr(guard.ClientRequestProcessors, "request_processors", processors)
    guard.restrict()
    topics = {topic for each in processors for topic in each.get_topics()}
    assert topics == set(guard.COMMANDS)
    assert not {"sys.shell", "train.shutdown", "train.delete_run", "sys.report_env"} & topics
    deploys = [each for each in processors if guard.TrainingTopic.DEPLOY in each.get_topics()]
    assert [type(each) for each in deploys] == [guard.Signed]


# -- senders

ADMIN = {Key.CHANNEL: "admin"}


def why(own, peer, origin, to, inward=False, **headers):
    about = {Key.ORIGIN: origin, Key.DESTINATION: to, **headers}
    return guard.refusal(own, peer, about, inward)


@pytest.mark.parametrize(
    ("own", "peer", "origin", "to", "inward"),
    [
        ("north", "server", "server", "north", False),
        ("north", "server", "server", "north.J", False),
        ("north", "north.J", "north.J", "north", True),
        ("north", "north.J", "north.J", "server", True),
        ("north.J", "server", "server.J", "north.J", False),
        ("north.J", "north", "server", "north.J", False),
        ("north.J", "north", "north", "north.J", False),
        ("server", "north", "north", "server", True),
        ("server", "north.J", "north.J", "server.J", True),
        ("server", "server.J", "server.J", "north.J", True),
        ("server.J", "server", "server", "server.J", False),
        ("server", "_admin_1", "_admin_1", "server", True),
    ],
)
def test_messages_of_a_run_pass(own, peer, origin, to, inward):
    assert not why(own, peer, origin, to, inward)


@pytest.mark.parametrize(
    ("own", "peer", "origin", "to", "inward", "text"),
    [
        ("north", "server", "south", "north", False, "of another site"),  # relayed
        ("north", "server", "south.J", "north.J", False, "of another site"),
        ("north", "server", "server", "south", False, "for another site"),
        ("north", "south", "server", "north", False, "its sender is no process"),
        ("north", "server.J", "server.J", "north.J", True, "its sender is no process"),  # local
        ("north", "north.x", "server.J", "north.J", True, "is not the server"),
        ("north.J", "south.J", "north", "north.J", False, "its sender is no process"),
        ("server", "south", "server", "north", True, "another site than its sender"),
        ("server", "south", "north", "server", True, "another site than its sender"),
        ("server", "south", "south", "north", True, "for another site"),
        ("server", "south.J", "south.J", "north.J", True, "for another site"),
        ("server", "_admin_1", "_admin_1", "north", True, "for another site"),
        ("north", "server", None, "north", False, "no origin"),
        ("north", "server", ["server"], "north", False, "no origin"),
    ],
)
def test_messages_of_others_do_not_pass(own, peer, origin, to, inward, text):
    assert text in why(own, peer, origin, to, inward)


def test_only_the_servers_own_process_commands_a_site():
    assert "command" in why("north", "server", "server.J", "north", **ADMIN)
    assert not why("north", "server", "server", "north", **ADMIN)
    assert not why("north", "north.J", "north.J", "north", True, **ADMIN)


@pytest.fixture
def guarded(monkeypatch):
    """The messages that pass a guard in this process. The guard is taken away afterwards."""
    passed = []
    monkeypatch.setattr(
        CoreCell, "process_message", lambda self, *message: passed.append(message[-1].headers)
    )
    for name in ("server_activate", "finish_request"):
        monkeypatch.setattr(TcpStreamServer, name, getattr(TcpStreamServer, name))
    guard.install.__wrapped__()
    return passed


def test_a_refused_message_reaches_no_code_of_nvflare(guarded, caplog):
    cell = SimpleNamespace(my_info=FqcnInfo("north"))

    def arrives(peer, origin, mode):
        connection = SimpleNamespace(connector=SimpleNamespace(mode=mode))
        message = SimpleNamespace(headers={Key.ORIGIN: origin, Key.DESTINATION: "north"})
        CoreCell.process_message(cell, SimpleNamespace(name=peer), connection, 1, message)

    arrives("server", "server", Mode.ACTIVE)
    assert [headers[Key.ORIGIN] for headers in guarded] == ["server"]
    for _ in range(9):
        arrives("server", "south", Mode.ACTIVE)
    arrives("server", "server", Mode.PASSIVE)
    assert len(guarded) == 1
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 5, "a flood of messages fills no disk: 1, 2, 4 and 8, and the other reason"
    assert said[0] == "fedvlm refused a message (1) from 'server': it is of another site"


def test_a_silent_process_does_not_keep_others_from_a_site(guarded, home):
    """A job's process connects to its site by TLS, while another process says nothing."""
    startup = home / "kits" / "north" / "startup"
    paths = {"ca_cert": "rootCA.pem", "client_cert": "client.crt", "client_key": "client.key"}
    params = {name: str(startup / path) for name, path in paths.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"scheme": "stcp", "host": "127.0.0.1", "port": port}
    driver = TcpDriver()
    driver.register_conn_monitor(SimpleNamespace(state_change=lambda connection: None))
    connector = SimpleNamespace(params=params | place, mode=Mode.PASSIVE)
    threading.Thread(target=driver.listen, args=[connector], daemon=True).start()
    context = ssl.create_default_context(cafile=startup / "rootCA.pem")
    context.check_hostname = False
    context.load_cert_chain(startup / "client.crt", startup / "client.key")
    until_open(port)
    try:
        with (
            socket.create_connection(("127.0.0.1", port)),
            socket.create_connection(("127.0.0.1", port), 20) as plain,
            context.wrap_socket(plain) as sealed,
        ):
            assert sealed.version()
        anyone = ssl.create_default_context(cafile=startup / "rootCA.pem")
        anyone.check_hostname = False
        assert not greeted(port, anyone), "a process without a key is refused"
    finally:
        driver.server.shutdown()


def greeted(port, context):
    """Whether a listener keeps a connection after the handshake."""
    with socket.create_connection(("127.0.0.1", port), 20) as plain:
        try:
            with context.wrap_socket(plain) as sealed:
                sealed.settimeout(3)
                return bool(sealed.recv(1))
        except TimeoutError:
            return True
        except OSError:
            return False


def until_open(port):
    from loopback import until

    def is_open():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    until(is_open, 20)


def test_a_site_has_what_the_checks_need(home):
    startup = home / "kits" / "north" / "startup"
    assert "CERTIFICATE" in (startup / "rootCA.pem").read_text()
    about = json.loads((startup / "fed_client.json").read_text())
    assert about["servers"][0]["identity"] == "localhost"
    assert Path(home / "server" / "startup" / "server.key").exists()


def test_what_others_can_cause_at_will_is_printed_once():
    from fedvlm.deploy.nvflare.processes import NOTED, Meaning

    meaning = Meaning()
    lines = ("target_unreachable", "fedvlm refused a message (1)", "x", "target_unreachable") * 2
    assert [text for line in lines for text in meaning.of(line)] == [
        NOTED["target_unreachable"],
        "refused a message whose sender may not send it; nvflare.log has more",
    ]
    assert meaning.of("Successfully registered client") == ["connected to the server"]
