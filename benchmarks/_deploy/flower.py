"""Flower's side of `deploy.py`: a SuperLink, SuperNodes and a run, with TLS."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from _deploy.watch import Outcome, Watch

APP = Path(__file__).resolve().parent / "flower_app.py"
NAMES = {"flwr-serverapp": "job", "superexec": "executor", "flower-superlink": "server"}
LIMIT = 120.0  # seconds of one round
PROJECT = """\
[project]
name = "bench"
version = "1.0.0"
dependencies = ["flwr"]
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "bench.app:server"
clientapp = "bench.app:client"
[tool.flwr.app.config]
job = "{job}"
"""
CONFIG = """\
[superlink]
default = "bench"
[superlink.bench]
address = "localhost:{port}"
root-certificates = "{certificate}"
"""


def measure(
    folder: Path,
    programs: Path,
    quiet: dict[str, str],
    clients: int,
    shapes: list[list[int]],
    repeats: int,
) -> Outcome:
    """Starts all processes, runs the app and ends the processes.

    Args:
        folder: an empty folder.
        programs: folder of `flower-superlink` and the other programs.
        quiet: environment variables that stop Flower's requests to the network.
        clients: number of SuperNodes.
        shapes: shapes of the arrays in a message.
        repeats: number of rounds that count. One more round runs before them.
    """
    from fedvlm.deploy.nvflare.demo import free_ports
    from fedvlm.deploy.nvflare.processes import MARK, _end_all, _ends_with_parent

    port, *others = free_ports(1 + clients)
    certificate, key = _certificate(folder)
    done = folder / "rounds.jsonl"
    _write_app(folder, port, certificate, clients, shapes, repeats + 1, done)
    search = os.pathsep.join([str(programs), os.environ.get("PATH", "")])
    environment = {**os.environ, **quiet, "PATH": search, MARK: str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)

    def start(name: str, program: str, *words: str) -> subprocess.Popen[bytes]:
        home = folder / "homes" / name
        home.mkdir(parents=True)
        (home / "config.toml").write_text(CONFIG.format(port=port, certificate=certificate))
        with open(folder / f"{name}.log", "wb") as log:
            return subprocess.Popen(
                [str(programs / program), *words],
                env={**environment, "FLWR_HOME": str(home)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_ends_with_parent,
            )

    try:
        with Watch(NAMES) as watch:
            tls = ["--ssl-ca-certfile", certificate, "--ssl-certfile", certificate]
            here = ["--host", "127.0.0.1", "--port", str(port)]
            link = start("superlink", "flower-superlink", *tls, "--ssl-keyfile", key, *here)
            watch.add(link.pid)
            nodes = {}
            for number, own in enumerate(others):
                words = ["--superlink", f"localhost:{port}", "--root-certificates", certificate]
                words += ["--host", "127.0.0.1", "--port", str(own)]
                nodes[f"node-{number}"] = start(f"node-{number}", "flower-supernode", *words)
                watch.add_other(nodes[f"node-{number}"].pid)
            _wait_for(folder / "superlink.log", "Uvicorn running")
            run = start("run", "flwr", "run", str(folder / "app"))
            if run.wait(120):
                raise SystemExit("flwr run:\n" + (folder / "run.log").read_text()[-2000:])
            rounds = _followed(done, repeats + 1, {"superlink": link, **nodes}, folder)
            time.sleep(1.2)  # the watch reads every second
    finally:
        _end_all(str(folder))
    if few := [line for line in rounds if line["clients"] != clients]:
        raise SystemExit(f"clients are missing: {few[0]}")
    return Outcome(
        walls=[b["time"] - a["time"] for a, b in itertools.pairwise(rounds)],
        there=[line["there"] for line in rounds[1:]],
        sent=rounds[0]["sent"],
        peaks=watch.peaks,
    )


def _certificate(folder: Path) -> tuple[str, str]:
    """Writes a self-signed certificate for `localhost` and its key; returns their paths."""
    certificate, key = str(folder / "server.pem"), str(folder / "server.key")
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", names, "-out", certificate, "-keyout", key]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def _write_app(
    folder: Path,
    port: int,
    certificate: str,
    clients: int,
    shapes: list[list[int]],
    rounds: int,
    done: Path,
) -> None:
    package = folder / "app" / "bench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    shutil.copy(APP, package / "app.py")
    (folder / "app" / "pyproject.toml").write_text(PROJECT.format(job=folder / "job.json"))
    job = {"clients": clients, "shapes": shapes, "rounds": rounds, "rounds_file": str(done)}
    (folder / "job.json").write_text(json.dumps(job))


def _wait_for(log: Path, words: str) -> None:
    until = time.monotonic() + LIMIT
    while words not in log.read_text(errors="replace"):
        if time.monotonic() > until:
            raise SystemExit(f"no '{words}':\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.2)


def _followed(
    done: Path, rounds: int, processes: dict[str, subprocess.Popen[bytes]], folder: Path
) -> list[dict[str, float]]:
    """The lines about the rounds, once all are written."""
    from fedvlm.store.files import read_lines

    found: list[dict[str, float]] = []
    until = time.monotonic() + 2 * LIMIT
    while len(found) < rounds:
        time.sleep(0.5)
        now = read_lines(done)
        until = time.monotonic() + LIMIT if len(now) > len(found) else until
        found = now
        over = [name for name, process in processes.items() if process.poll() is not None]
        if over or time.monotonic() > until:
            logs = [folder / f"{name}.log" for name in (over or ["superlink", "node-0"])]
            tails = "\n".join(f"{log}:\n{log.read_text(errors='replace')[-3000:]}" for log in logs)
            raise SystemExit(f"Flower finished {len(found)} of {rounds} rounds:\n{tails}")
    return found
