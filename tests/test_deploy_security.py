"""Intruders at a deployed run, and a wiretap on its network: real processes on this machine.

One of the two sites attacks the other, and a user of that site's machine says to be the server.
"""

import contextlib
import datetime
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from fedvlm.deploy.nvflare import admitting
from fedvlm.deploy.nvflare.project import CLOSED, UNADMITTED, provision
from fedvlm.store import run as store
from loopback import processes, said, serve, start, until
from wiretap import Wiretap, are_records, pieces_of, pieces_of_rows

pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")
pytestmark = [pytest.mark.slow, pytest.mark.waits("machines")]

SITES = ("north", "south")
HERE = Path(__file__).parent
SMALL = {
    "algorithm": {"name": "plora"},
    "train": {"rounds": 2, "local_steps": 2, "batch_size": 4, "lr": 5e-3},
    "eval": {"every": 0, "max_rows": 3, "max_new_tokens": 3},
    "engine": {"clients": 1, "threads": 1},
}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


def pair_of(state):
    """The paths of a site's certificate and of its key."""
    folder = state / "keys" / (state / "keys" / "current").read_text()
    return folder / "site.crt", folder / "site.key"


def altered(state, to, certificate=None, **about):
    """Copies the folder of a site that has joined, with another certificate, name or port."""
    shutil.copytree(state, to)
    path = pair_of(to)[0]
    path.write_bytes(certificate or path.read_bytes())
    alter(to, **about)


def alter(state, **about):
    """Changes what a site knows of its federation: its own name, or the server's port."""
    joined = pair_of(state)[0].with_name("joined.json")
    joined.write_text(json.dumps(json.loads(joined.read_text()) | about))


def expired(home, state):
    """A certificate of the authority for a site's key. It expired yesterday."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    made = json.loads((home / "ca" / "fedvlm" / "state" / "cert.json").read_text())
    key = serialization.load_pem_private_key(made["root_pri_key"].encode(), None)
    old = x509.load_pem_x509_certificate(pair_of(state)[0].read_bytes())
    today = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=9))
        .not_valid_after(today - datetime.timedelta(days=1))
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def knock(port, root, pair=None):
    """Connects to the server with a certificate: ``let in``, or the reason of the refusal."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(root)
    context.set_alpn_protocols(["h2"])
    if pair:
        context.load_cert_chain(*pair)
    try:
        with (
            socket.create_connection(("localhost", port), 10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as sealed,
        ):
            sealed.sendall(PREFACE)
            return "let in" if sealed.recv(9) else "closed"
    except ssl.SSLError as error:
        return error.reason
    except OSError as error:
        return type(error).__name__


def raw(port, message):
    """Sends bytes to the server. Returns the bytes of its answer."""
    found = b""
    with (
        socket.create_connection(("localhost", port), 10) as plain,
        contextlib.suppress(OSError),
    ):
        plain.sendall(message)
        while part := plain.recv(2**12):
            found += part
    return found


def commands(folder):
    """The command lines that any user of this machine can read, of a command's processes."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FEDVLM_PROCESSES_OF") == str(folder):
                found[process] = process.cmdline()
    return found


def local_users(folder, home):
    """Starts users of north's machine who know what ``ps`` shows, and say to be the server."""

    def running():
        shown = commands(folder / "sites" / "north" / "nvflare")
        return next((words for words in shown.values() if "-n" in words and "-p" in words), None)

    until(running, 240)
    words = running()
    port, job = words[words.index("-p") + 1].rpartition(":")[2], words[words.index("-n") + 1]
    keys = folder / "sites" / "south" / "nvflare" / "startup"
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "local_user.py"), port, "north", job, str(known)],
            stderr=subprocess.DEVNULL,
        )
        for known in ("none", keys)
    ]


def secrets(folder):
    """Words that no other user may read: NVFlare's tokens, and lines of the keys."""
    found, known = set(), {path.name for path in (folder / "federation/server").iterdir()}
    for part in ("federation/server", "sites/north/nvflare", "sites/south/nvflare"):
        for process in commands(folder / part):
            with contextlib.suppress(psutil.Error):
                kept = process.environ()
                found |= {kept[name] for name in kept if name.startswith("NVFLARE_JOB_")}
        for key in (folder / part / "startup").glob("*.key"):
            found |= set(key.read_text().splitlines()[1:-1])
    return {word for word in found - known if len(word) > 20}  # a job's number is known


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A run of two sites behind a wiretap, while intruders try to take part."""
    from fedvlm.deploy.nvflare.demo import enrol, loopback, rows

    folder = tmp_path_factory.mktemp("security")
    rows(folder / "data")
    ours = loopback(SITES)
    port = ours.server.port
    home, other = folder / "federation", folder / "other"
    kits, foreign = provision(ours, home), provision(ours, other)
    root = home / "server" / "startup" / "rootCA.pem"
    states = {name: folder / "sites" / name for name in (*SITES, "foreign", "expired", "another")}
    for name in SITES:
        enrol(kits[name], states[name])
    enrol(foreign["north"], states["foreign"])
    altered(states["north"], states["expired"], expired(home, states["north"]))
    altered(states["north"], states["another"], site="south")
    certificates = {name: pair_of(state) for name, state in states.items()}
    servers = tuple(home / "server" / "startup" / f"server.{end}" for end in ("crt", "key"))
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(SMALL | {"output": str(folder / "run")}))
    with (
        Wiretap(port, root, servers, {s: certificates[s] for s in SITES}) as tap,
        processes(folder) as started,
    ):
        serve(started, home)
        for name, state in states.items():
            if name in SITES:
                alter(state, port=tap.port)
            rows_of = folder / "data" / f"{name if name in SITES else 'west'}.parquet"
            with pytest.MonkeyPatch.context() as patch:
                if name == "south":
                    path = [str(HERE / "rogue"), os.environ["PYTHONPATH"]]
                    patch.setenv("PYTHONPATH", os.pathsep.join(path))
                start(started, name, rows_of, state)
        command = [sys.executable, "-m", "fedvlm", "deploy", "run", str(config)]
        command += ["-f", str(home), "--min-sites", "2"]
        with open(folder / "said.log", "wb") as log:
            time.sleep(5)
            run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            users = local_users(folder, home)
            parts = ("federation/server", "sites/north/nvflare", "sites/south/nvflare")
            shown = [" ".join(c) for part in parts for c in commands(folder / part).values()]
            hidden = secrets(folder)
            until(lambda: (folder / "run" / "metrics.jsonl").exists(), 240)
            knocks = {n: knock(port, root, pair) for n, pair in certificates.items()}
            knocks["nobody"] = knock(port, root)
            secret = pieces_of_rows(folder / "data" / "north.parquet")[0]
            plain = raw(port, PREFACE + secret)
            raw(tap.port, PREFACE + secret)
            again = raw(port, bytes(tap.sealed[0].up))
            assert run.poll() is None, "the run must still be going on"
            code = run.wait(480)
            for user in users:
                user.terminate()
                user.wait(60)
        until((folder / "sites" / "south" / "attacks.json").exists, 60)  # all of south's commands
        until(lambda: len(refusals(folder)) == len(REFUSED), 30)
        admitting.revoke(home, "north")
        until(lambda: all(at_the_gate(folder, "north")), 60)
    assert code == 0, said(folder, "said")
    return folder, knocks, (plain, again), tap, (shown, hidden)


REFUSED = {
    "foreign": "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate",
    "expired": "CERTIFICATE_VERIFY_FAILED: certificate has expired",
    "nobody": "PEER_DID_NOT_RETURN_A_CERTIFICATE",
    "plain text": "WRONG_VERSION_NUMBER",
    "a site's connection, sent again": "BAD_DECRYPT",
    "another": "authenticated as 'north' but claimed endpoint 'south' requires identity 'south'",
}
"""Intruder -> the reason in the log of NVFlare's server."""


def refusals(folder):
    """The intruders that the server's log names."""
    log = (folder / "federation" / "server" / "nvflare.log").read_text()
    return {who for who, why in REFUSED.items() if why in log}


def at_the_gate(folder, site):
    """Whether the server has closed a site's connection, and then refused it another one."""
    log = (folder / "federation" / "server" / "nvflare.log").read_text()
    _, closed, after = log.partition(f"{CLOSED}: '{site}'")
    return bool(closed), f"{UNADMITTED}: '{site}'" in after


def test_a_revoked_site_loses_its_connection_and_gets_no_other(seen):
    folder, *_ = seen
    assert at_the_gate(folder, "north") == (True, True)
    assert at_the_gate(folder, "south") == (False, False), "the other site stays connected"
    assert "closed the connection of a revoked key" in said(folder, "server")


def test_the_server_refuses_all_intruders_and_says_why(seen):
    folder, knocks, (plain, again), *_ = seen
    assert refusals(folder) == REFUSED.keys()
    assert knocks.pop("north") == knocks.pop("south") == "let in"
    assert knocks.pop("another") == "let in", "the certificate is north's own: TLS has no objection"
    assert "let in" not in knocks.values()
    assert knocks.keys() == {"foreign", "expired", "nobody"}
    for answer in (plain, again):
        assert not answer or are_records(answer), "no answer, or TLS records"
    assert "refused: the certificate is another site's" in said(folder, "server")
    for name in ("foreign", "expired", "another"):
        assert "connected to the server" not in said(folder, name)
        assert not (folder / "sites" / name / "runs").exists()


def test_a_site_that_commands_another_one_gets_no_answer(seen):
    folder, *_ = seen
    answers = json.loads((folder / "sites" / "south" / "attacks.json").read_text())
    assert len(answers) == 4, "status, deploy, abort and shutdown"
    assert set(map(tuple, answers.values())) == {("timeout", "None")}
    assert not (folder / "sites" / "north" / "nvflare" / "stolen").exists()
    log = (folder / "federation" / "server" / "nvflare.log").read_text()
    assert "fedvlm refused a message (4) from 'south': it is for another site" in log
    assert "refused a message whose sender" in said(folder, "server")
    assert said(folder, "north").count("connected to the server") == 1, "it was not shut down"


def test_a_local_user_is_not_the_server(seen):
    folder, *_ = seen
    assert "planted" not in said(folder, "north")
    log = (folder / "sites" / "north" / "nvflare.log").read_text()
    assert "a process of this machine has no key: [SSL: WRONG_VERSION_NUMBER]" in log
    assert "authenticated as 'south' but claimed endpoint 'server." in log
    for line in ("no process of this site", "refused a request"):
        assert line not in log, "TLS has refused both before any other check"


def test_the_list_of_processes_shows_no_secret(seen):
    *_, (shown, hidden) = seen
    assert len(shown) >= 6
    assert len(hidden) > 50, "tokens of both jobs' processes, and three keys"
    assert not [word for word in hidden for line in shown if word in line]


def test_an_expired_certificate_is_reported_at_once(seen):
    folder, *_ = seen
    assert "ended on" in said(folder, "expired")
    assert "fedvlm site renew" in said(folder, "expired")


def test_a_run_among_intruders_is_that_of_its_own_sites(seen):
    folder, *_ = seen
    assert json.loads((folder / "run" / "sites.json").read_text())["weights"].keys() == set(SITES)
    lines = store.Store(folder / "run").lines()
    assert [line["round"] for line in lines] == [0, 1, 2, 3], "the last round averages"
    assert not [line for line in lines if line.get("missing") or line.get("rejected")]
    *rounds, last = lines[1:]
    for line in rounds:
        assert line["train_loss"].keys() == set(SITES)
    assert last["train_loss"] == {}, "nobody trains in the last round"


def test_the_network_sees_tls_records_and_nothing_else(seen):
    folder, _, _, tap, _ = seen
    (plain,) = (flow for flow in tap.sealed if bytes(flow.up).startswith(PREFACE))
    flows = [flow for flow in tap.sealed if flow is not plain]
    assert not are_records(plain.up), "the check detects a client without TLS"
    streams = streams_of(flows)
    assert len(streams) >= 4
    assert all(are_records(stream) for stream in streams)
    personal, shared, rows = searched(folder)
    assert sum(map(len, streams)) > sum(line_bytes(folder)), "the wiretap has recorded all uploads"
    assert not found(personal + shared + rows, streams)
    assert found(rows, [bytes(plain.up)]), "the search finds rows sent without TLS"


def test_with_tls_taken_off_what_is_shared_is_there_and_what_is_private_is_not(seen):
    folder, _, _, tap, _ = seen
    streams = streams_of(tap.opened)
    personal, shared, rows = searched(folder)
    assert min(len(personal), len(shared), len(rows)) > 200
    assert len(found(shared, streams)) > 0.99 * len(shared), "frames cut some pieces"
    assert not found(personal + rows, streams)
    state = str(folder / "sites")
    assert not found([state.encode(), b".parquet"], streams), "the sites' paths do not leave them"


def streams_of(flows):
    return [bytes(way) for flow in flows for way in (flow.up, flow.down) if way]


def found(pieces, streams):
    return [piece for piece in pieces if any(piece in stream for stream in streams)]


def searched(folder):
    """Pieces of the personal factors, of the shared factors, and of the rows, of both sites."""
    personal, shared, rows = [], [], []
    for site in SITES:
        rows += pieces_of_rows(folder / "data" / f"{site}.parquet")
        for kept in (folder / "sites" / site / "runs").glob("*/rounds/*"):
            personal += pieces_of(kept / "mine.safetensors", ".lora_A.")  # B is shared
            shared += pieces_of(kept / "upload.safetensors")
    return personal, shared, rows


def line_bytes(folder):
    """The bytes of every upload, from the run's metrics."""
    lines = store.Store(folder / "run").lines()[1:]
    return [size for line in lines for size in line["bytes_up"].values()]
