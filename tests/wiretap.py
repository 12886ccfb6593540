"""Records the bytes between sites and server, on the wire and with TLS taken off."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from fedvlm.store import files


@dataclass
class Flow:
    """The bytes of one connection: ``up`` to the server, ``down`` to the site."""

    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)


class Wiretap:
    """Listens in the place of the server, passes everything on, and keeps two records.

    ``sealed`` has the bytes that anybody on the network sees. Behind it, the wiretap ends TLS with
    the server's certificate, and begins it again with the certificate of the site at the other end.
    ``opened`` has the bytes in between. That takes the private keys of the server and of all sites.

    Args:
        port: the server's port.
        root: the authority's certificate.
        server: the server's certificate and key.
        sites: site -> its certificate and key.
    """

    def __init__(
        self, port: int, root: Path, server: tuple[Path, Path], sites: Mapping[str, Any]
    ) -> None:
        self.sealed: list[Flow] = []
        self.opened: list[Flow] = []
        self.to = port
        self._inside = _context(ssl.PROTOCOL_TLS_SERVER, root, server)
        self._inside.verify_mode = ssl.CERT_REQUIRED
        self._outside = {n: _context(ssl.PROTOCOL_TLS_CLIENT, root, c) for n, c in sites.items()}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Wiretap:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: Any) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _listen(self) -> None:
        ending = await asyncio.start_server(self._open, "127.0.0.1", 0, ssl=self._inside)
        self._within = ending.sockets[0].getsockname()[1]
        listening = await asyncio.start_server(self._record, "127.0.0.1", 0)
        self.port = listening.sockets[0].getsockname()[1]

    async def _record(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        on = await asyncio.open_connection("127.0.0.1", self._within)
        await _passed(reader, writer, on, self.sealed)

    async def _open(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        names = dict(pair for part in writer.get_extra_info("peercert")["subject"] for pair in part)
        context = self._outside[names["commonName"]]
        on = await asyncio.open_connection(
            "localhost", self.to, ssl=context, server_hostname="localhost"
        )
        await _passed(reader, writer, on, self.opened)


async def _passed(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on: Any, flows: list[Flow]
) -> None:
    flow = Flow()
    flows.append(flow)

    async def one_way(source: Any, target: Any, record: bytearray) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := await source.read(2**16):
                record += data
                target.write(data)
                await target.drain()
        with contextlib.suppress(OSError, ssl.SSLError):
            target.close()

    await asyncio.gather(one_way(reader, on[1], flow.up), one_way(on[0], writer, flow.down))


def _context(kind: int, root: Path, pair: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(kind)
    context.load_verify_locations(root)
    context.load_cert_chain(*pair)
    context.set_alpn_protocols(["h2"])
    return context


def are_records(stream: bytes) -> bool:
    """Whether bytes are a sequence of TLS records. The last record may be cut off."""
    at = 0
    while at + 5 <= len(stream):
        kind, version = stream[at], stream[at + 1 : at + 3]
        if kind not in (20, 21, 22, 23) or version not in (b"\x03\x01", b"\x03\x03"):
            return False
        at += 5 + int.from_bytes(stream[at + 3 : at + 5], "big")
    return at > 0


def pieces_of_rows(path: Path) -> list[bytes]:
    """Bytes of every image, question and answer in a parquet."""
    rows = pd.read_parquet(path)
    found = [image["bytes"][100:164] for image in rows["image"]]
    found += [text.encode() for text in rows["question"]]
    return found + [text.encode() for text in rows["chosen"] if len(text) > 6]


def pieces_of(path: Path, part: str = "") -> list[bytes]:
    """Three pieces of 32 bytes of each tensor in a file whose name holds ``part``.

    The scalars of a client's state are too short to be searched for.
    """
    kept = {n: t for n, t in files.load_tree(path).items() if part in n and t.ndim}
    tensors = [tensor.numpy().tobytes() for tensor in kept.values()]
    return [b[i : i + 32] for b in tensors for i in (0, len(b) // 2, len(b) - 32)]
