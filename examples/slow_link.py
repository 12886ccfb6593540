"""A run over slow and lossy lines, one of which is cut in the middle of an upload.

    python examples/slow_link.py [FOLDER]

A server and three sites, real processes with mutual TLS, on this machine. A site opens connections
to the server and nothing else. Between them lies a relay of this script: 200 ms there and back,
5 Mbit/s each way, and a packet in a hundred comes a round trip later, with all that follow it, as
TCP does it. One site goes through an HTTP proxy (CONNECT), as a hospital may demand. After some
rounds the line of another site carries nothing for 60 s. Fails unless the run finishes, unless the
others go on meanwhile, and unless the site trains again. About five minutes; needs no root.

The relay stands in for ``tc netem``, which needs root and a module that kernels of containers often
lack. It works on bytes of TCP: it neither loses nor reorders packets of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import faults

from fedvlm import config as configs
from fedvlm.deploy.nvflare.demo import SETTINGS, SITES, Started, enrol, free_ports, loopback, rows
from fedvlm.deploy.nvflare.project import provision
from fedvlm.store import files
from fedvlm.store import run as store

DELAY, RATE, LOSS, PACKET = 0.1, 5e6 / 8, 0.01, 1400  # s one way, bytes/s, share, bytes
CUT = 60.0  # seconds
PROXIED, LOST = "north", "south"
PROXY = "grpc_proxy"  # the variable that gRPC reads
SLOW, LAST = 3, 12  # the first slow round, and the last round
MORE = ("algorithm.name=lora", "lora.rank=48", "train.local_steps=5", f"train.rounds={LAST}")
PATIENCE = 400.0  # seconds for anything
wait = partial(faults.wait, patience=PATIENCE)


class Line:
    """A relay, or a proxy, that sends what it gets on to the server.

    Attributes:
        slow: whether bytes are delayed.
        cut: whether nothing is carried. What comes meanwhile is carried later.
        up: bytes from the site, and ``asked``: connections that it has opened.
    """

    def __init__(self, port: int, server: int, proxy: bool):
        self.port, self.server, self.proxy = port, server, proxy
        self.slow = self.cut = False
        self.up = self.asked = 0
        self._random = random.Random(port)

    async def listen(self) -> None:
        await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    async def _connected(self, site: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        while self.cut:
            await asyncio.sleep(0.1)
        self.asked += 1
        if self.proxy:
            head = await site.readuntil(b"\r\n\r\n")
            if head.split()[:2] != [b"CONNECT", b"localhost:%d" % self.server]:
                back.close()
                return
            back.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        server, there = await asyncio.open_connection("127.0.0.1", self.server)
        await asyncio.gather(self._carry(site, there, True), self._carry(server, back, False))

    async def _carry(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, up: bool
    ) -> None:
        """Carries one direction, until its end."""
        way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

        async def leave() -> None:
            with contextlib.suppress(ConnectionError):
                while chunk := await source.read(8 * PACKET):
                    self.up += len(chunk) if up else 0
                    due = time.monotonic()
                    if self.slow:
                        await asyncio.sleep(len(chunk) / RATE)
                        packets = -(-len(chunk) // PACKET)
                        lost = self._random.random() > (1 - LOSS) ** packets
                        due = time.monotonic() + DELAY + (2 * DELAY if lost else 0.0)
                    await way.put((due, chunk))
            await way.put((0.0, b""))

        leaving = asyncio.ensure_future(leave())
        with contextlib.suppress(ConnectionError):
            while True:
                due, chunk = await way.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                while self.cut:
                    await asyncio.sleep(0.1)
                if not chunk:
                    break
                target.write(chunk)
                await target.drain()
        leaving.cancel()
        target.close()


def relayed(server: int) -> dict[str, Line]:
    """A line for every site, served by a thread."""
    lines = {
        site: Line(port, server, site == PROXIED)
        for site, port in zip(SITES, free_ports(len(SITES)), strict=True)
    }

    async def serve() -> None:
        for line in lines.values():
            await line.listen()
        await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    return lines


def start(folder: Path, started: Started) -> dict[str, Line]:
    """Starts the server and the sites, each behind its line, and the run."""
    rows(folder / "data")
    data = f"data.path={folder / 'data' / 'all.parquet'}"
    settings = configs.load(SETTINGS, *MORE, data, f"output={folder / 'run'}")
    files.write_text(folder / "config.yaml", json.dumps(settings.model_dump()))
    project = loopback(SITES, "slow")
    kits = provision(project, folder / "federation")
    lines = relayed(project.server.port)
    home = str(folder / "federation")
    started.start("server", "deploy", "server", "-f", home)
    for site, line in lines.items():
        if line.proxy:
            os.environ[PROXY] = f"http://127.0.0.1:{line.port}"
        else:  # the site's invitation leads to its line
            invited = json.loads(kits[site].read_text()) | {"port": line.port}
            files.write_text(kits[site], json.dumps(invited))
        enrol(kits[site], folder / "sites" / site)
        words = ("--data", str(folder / "data" / f"{site}.parquet"))
        started.start(site, "site", "start", *words, "--state", str(folder / "sites" / site))
        os.environ.pop(PROXY, None)
    more = ("-f", home, "--round-deadline", "120", "--wait", "180")
    started.start("run", "deploy", "run", str(folder / "config.yaml"), *more)
    return lines


def main() -> None:
    home = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="slow-"))
    home.mkdir(parents=True, exist_ok=True)
    print(f"everything is in {home}", flush=True)
    with Started(home) as started:
        lines = start(home, started)

        def rounds() -> list[dict[str, Any]]:  # another process writes them
            return store.Store(home / "run").lines()

        def done() -> int:
            return len(rounds()) - 1

        wait(lambda: done() >= SLOW - 1, "the rounds over fast lines")
        for line in lines.values():
            line.slow = True
        wait(lambda: done() >= SLOW + 2, "the rounds over slow lines")
        before, size = lines[LOST].up, max(rounds()[-1]["bytes_up"].values())
        wait(lambda: lines[LOST].up - before > size / 3, "the middle of an upload")
        lines[LOST].cut = True
        cut, number = time.time(), done() + 1
        print(f"the line of {LOST} is cut in round {number}", flush=True)
        wait(lambda: time.time() - cut > CUT, "the end of the cut")
        lines[LOST].cut = False
        meanwhile = done()
        wait(lambda: done() > number and LOST in rounds()[-1]["train_loss"], "its return")
        back = time.time() - cut - CUT
        code = started.processes["run"].wait(PATIENCE)
    if code:
        raise SystemExit(f"the run ended with {code}; see {home / 'run.log'}")
    report(store.Store(home / "run"), lines, number, meanwhile, back, size)


def report(
    run: store.Store, lines: dict[str, Line], number: int, meanwhile: int, back: float, size: int
) -> None:
    """Checks what happened, and prints it."""
    seconds = {line["round"]: line["seconds"] for line in run.timing() if "seconds" in line}
    missed = [line["round"] for line in run.lines() if LOST in line.get("missing", ())]
    assert {s for line in run.lines() for s in line.get("missing", ())} <= {LOST}
    assert run.lines()[-2]["train_loss"].keys() == set(SITES), "all sites have trained in the end"
    assert lines[PROXIED].asked, f"{PROXIED} has not used the proxy"
    assert meanwhile >= number, "the others have gone on during the cut"
    print(f"\nan upload has {size / 1e6:.2f} MB; {PROXIED} made {lines[PROXIED].asked} connections")
    print(f"seconds of a round: fast {seconds[SLOW - 1]:.1f}, slow {seconds[SLOW + 1]:.1f}")
    print(f"cut in round {number}, which took {seconds[number]:.1f} s; missed: {missed}")
    print(
        f"rounds done at the end of the cut: {meanwhile}; {LOST} trained again after {back:.0f} s"
    )


if __name__ == "__main__":
    main()
