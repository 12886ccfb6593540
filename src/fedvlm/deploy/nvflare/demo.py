"""``fedvlm deploy demo``: a server and three sites on this machine, as real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedvlm import config as configs
from fedvlm.deploy.nvflare import admitting, joining
from fedvlm.deploy.nvflare.federation import Federation
from fedvlm.deploy.nvflare.project import Project, Server, provision
from fedvlm.deploy.peers import identity
from fedvlm.deploy.remote import Limits
from fedvlm.documents import write_yaml
from fedvlm.errors import FedVLMError
from fedvlm.rounds.results import Results

SITES = ("north", "south", "west")
SETTINGS: dict[str, Any] = {
    "algorithm": {"name": "plora"},
    "partition": {"kind": "column", "column": "site", "splits": "alone", "min_rows": 2},
    "train": {"rounds": 8, "local_steps": 5, "batch_size": 4, "lr": 5e-3},
    "eval": {"every": 0, "max_rows": 10},
    "engine": {"clients": 1, "threads": 1},
}


def demo(
    folder: Path,
    overrides: list[str],
    tell: Callable[[dict[str, Any]], None],
    secure: bool = False,
) -> Results:
    """Provisions a federation, starts its processes, runs, and ends the processes.

    Args:
        folder: gets all files. The run is in its subfolder ``run``.
        overrides: settings that replace those of the demo.
        tell: receives the events.
        secure: whether the sites require secure aggregation, and pin one another's keys.
    """
    folder = folder.absolute()
    if folder.exists() and any(folder.iterdir()):
        raise FedVLMError(f"'{folder}' is not empty; choose another folder with --to DIR")
    rows(folder / "data")
    path = folder / "data" / "all.parquet"
    overrides = [*(["wire.secure=true"] if secure else []), *overrides]
    settings = configs.load(SETTINGS, *overrides, f"output={folder / 'run'}", f"data.path={path}")
    kits = provision(loopback(SITES, "demo"), folder / "federation")
    with Started(folder) as started:
        started.start("server", "deploy", "server", "-f", str(folder / "federation"))
        for name in SITES:
            data = str(folder / "data" / f"{name}.parquet")
            state = folder / "sites" / name
            enrol(kits[name], state)
            words = ["--policy", str(pinned(folder / "sites", SITES))] if secure else []
            started.start(name, "site", "start", "--data", data, "--state", str(state), *words)
        limits = Limits(min_sites=len(SITES), open_s=120, train_s=120, score_s=120)
        federation = Federation(folder / "federation")
        return federation.run(settings, limits=limits, wait=180, tell=tell)


def pinned(sites: Path, names: Sequence[str], **policy: Any) -> Path:
    """Writes the policy of sites that require secure aggregation, with all their fingerprints.

    Args:
        sites: folder with the state of each site.
        names: the names of the sites.
        **policy: other settings of the policy.
    """
    path = sites / "policy.yaml"
    marks = {name: identity(sites / name, name).fingerprint for name in names}
    tree = {"secure_required": True, "peers": marks, **policy}
    path.write_text(write_yaml(tree))
    return path


def enrol(invitation: Path, state: Path) -> None:
    """Joins a site whose operator and whose folder are both on this machine."""
    request = joining.join(invitation, state, state / "own.request")
    home, own = invitation.parents[1], joining.fingerprints(state)["next"]
    joining.install(admitting.admit(home, request, lambda site, mark: mark == own), state)
    request.unlink()


def rows(folder: Path) -> None:
    """Writes the bundled scenes: a parquet file for each site, and ``all.parquet`` for all."""
    from fedvlm.data.scenes import scenes

    folder.mkdir(parents=True)
    table = scenes(style="mixed", strength=1.0, sites=len(SITES), rows=48).to_pandas()
    table["site"] = table["site"].map({f"site-{k}": name for k, name in enumerate(SITES)})
    table.to_parquet(folder / "all.parquet", index=False)
    for name in SITES:
        table[table["site"] == name].to_parquet(folder / f"{name}.parquet", index=False)


def loopback(sites: Sequence[str], name: str = "fedvlm") -> Project:
    """Describes a federation whose server is this machine, on free ports."""
    port, admin_port = free_ports(2)
    server = Server(address="localhost", port=port, admin_port=admin_port)
    return Project(name=name, server=server, sites=list(sites))


def free_ports(count: int) -> list[int]:
    """Finds ports without a listener."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Started:
    """Runs ``fedvlm`` commands as child processes, and ends them on leaving the context."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            command = [sys.executable, "-m", "fedvlm", *words]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
