"""The gate before a real gRPC stream with mutual TLS: admitted keys pass, and no others."""

import json
import queue
import shutil
from concurrent import futures
from types import SimpleNamespace

import pytest

pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")

from cryptography.hazmat.primitives import serialization

from fedvlm.deploy.nvflare import admitting, joining, keys
from fedvlm.deploy.nvflare.demo import enrol
from joined import (
    SITES,
    another,  # noqa: F401
    forged,
    home,  # noqa: F401
    invited,
    joins,
    made,  # noqa: F401
    never,
    renews,
)


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
