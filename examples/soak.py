"""Hours of a federation under random kills and stalls, with its memory and handles sampled.

    python examples/soak.py FOLDER [--minutes 120] [--every 240] [--period 15] [--seed 0]

A server and five sites as real processes on this machine, with mutual TLS, secure aggregation,
pinned keys, and numbers for Prometheus. A seed chooses the faults: a site is killed, all its
processes at once, and started again by the same command, as systemd does it; or a site is stopped
(SIGSTOP) for 20 to 60 s; or the server is killed and started again, and `deploy run` goes on. In
a quiet part nothing happens, so that processes grow old.

FOLDER gets ``samples.csv`` (every 10 s: memory, handles, threads and processor time of each
process), ``faults.json`` and everything else; ``soaked.py`` reads them, prints tables, draws
``soak.png``, and fails unless no round was lost and nothing grows. Linux only; not part of the
tests, because it needs its time.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import soaked

from fedvlm import config as configs
from fedvlm.data.scenes import scenes
from fedvlm.deploy.nvflare.demo import SETTINGS, Started, enrol, free_ports, loopback, pinned
from fedvlm.deploy.nvflare.processes import MARK
from fedvlm.deploy.nvflare.project import provision
from fedvlm.documents import write_yaml
from fedvlm.store import files
from fedvlm.store.run import METRICS, Store, is_done

SITES = tuple(f"site-{k}" for k in range(5))
MORE = ("wire.secure=true", "train.local_steps=1", "eval.max_rows=10")
PATIENCE = 900.0  # seconds for anything, on a machine that others keep busy
EVERY = 10.0  # seconds between two samples
SUSPENDED = 40.0  # seconds without a sample: the machine has stopped everything, or nearly so
QUIET = (0.4, 0.65)  # shares of the time; no fault between them
SERVERS = 3  # kills of the server
SHARE = 0.9  # of the rounds that the time would allow without faults
AGAIN = 5.0  # seconds from the end of a service to its next start, RestartSec of the units
ROLES = {
    "site start": "site: command",
    "deploy server": "server: command",
    "deploy run": "deploy run",
    "site check": "site: check",
    "client.client_train": "site: NVFlare",
    "client.worker_process": "site: job",
    "fedvlm.deploy.worker": "site: worker",
    "server.server_train": "server: NVFlare",
    "server.runner_process": "server: job",
}
"""Part of a command -> the role of its process."""


@dataclass
class Fault:
    """One fault.

    Attributes:
        at: seconds after the first round.
        kind: ``kill``, ``stall`` or ``server``.
        site: its name, or ``server``.
        seconds: the time until it is started again, or continued.
    """

    at: float
    kind: str
    site: str
    seconds: float


def planned(seed: int, seconds: float, every: float) -> list[Fault]:
    """The faults of a soak: a function of its arguments."""
    chance, found, at = random.Random(seed), [], 0.0
    while (at := at + every * chance.uniform(0.75, 1.25)) < seconds - every / 2:
        if not QUIET[0] < at / seconds < QUIET[1]:
            kind, site = chance.choice(["kill", "stall"]), chance.choice(SITES)
            away = chance.uniform(2, 15) if kind == "kill" else chance.uniform(20, 60)
            found.append(Fault(round(at, 1), kind, site, round(away, 1)))
    for k in range(min(SERVERS, len(found) // 3)):
        one = found[len(found) * (2 * k + 1) // (2 * SERVERS)]
        one.kind, one.site, one.seconds = "server", "server", AGAIN
    return found


class Soak:
    """A federation, its run, its faults, and the samples of its processes."""

    def __init__(self, folder: Path, started: Started, rounds: int):
        self.folder, self.started = folder, started
        self.home, self.run = folder / "federation", folder / "run"
        self.config = str(folder / "config.yaml")
        self.seen: list[dict[str, Any]] = []
        self._down: set[str] = set()  # services that are meant to be away
        (folder / "data").mkdir(parents=True)
        table = scenes(style="mixed", strength=1.0, sites=len(SITES), rows=80).to_pandas()
        for site in SITES:
            table[table["site"] == site].to_parquet(self._data(site), index=False)
        settings = (
            f"output={self.run}",
            f"data.path={self._data(SITES[0])}",
            f"train.rounds={rounds}",
        )
        files.write_text(
            Path(self.config), json.dumps(configs.load(SETTINGS, *MORE, *settings).model_dump())
        )
        kits = provision(loopback(SITES, "soak"), self.home)
        for site in SITES:
            enrol(kits[site], self._state(site))
        self.ports = dict(zip(("server", *SITES), free_ports(1 + len(SITES)), strict=True))
        for site in SITES:
            own = {"metrics": f"127.0.0.1:{self.ports[site]}", "train_rows": 4}  # small rounds
            pinned(folder / "sites", SITES, **own).rename(self._policy(site))
        jobs = [
            {"job_name": f"fedvlm-{kind}", "static_configs": [{"targets": targets}]}
            for kind, targets in (
                ("server", [f"127.0.0.1:{self.ports['server']}"]),
                ("site", [f"127.0.0.1:{self.ports[site]}" for site in SITES]),
            )
        ]
        text = write_yaml({"global": {"scrape_interval": "10s"}, "scrape_configs": jobs})
        files.write_text(folder / "prometheus.yml", text)

    def _data(self, site: str) -> Path:
        return self.folder / "data" / f"{site}.parquet"

    def _state(self, site: str) -> Path:
        return self.folder / "sites" / site

    def _policy(self, site: str) -> Path:
        return self.folder / f"{site}.yml"

    # -- services

    def serve(self, name: str) -> None:
        """Starts the server or a site, by the same words each time."""
        if name == "server":
            words = ["deploy", "server", "-f", str(self.home)]
            words += ["--metrics", str(self.ports["server"])]
        else:
            words = ["site", "start", "--data", str(self._data(name))]
            words += ["--state", str(self._state(name)), "--policy", str(self._policy(name))]
        self.started.start(name, *words)

    def begin(self, *words: str) -> None:
        """Gives the command ``fedvlm deploy run``."""
        limits = ("--round-deadline", "120", "--min-sites", "3", "--wait", "300")
        self.started.start("run", "deploy", "run", *words, "-f", str(self.home), *limits)

    def processes(self, name: str) -> Iterator[psutil.Process]:
        """All processes of a service: what systemd finds in its control group."""
        folder = self.home / "server" if name == "server" else self._state(name) / "nvflare"
        above = self.started.processes[name]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                own = process.pid == above.pid or process.ppid() == above.pid
                if own or process.environ().get(MARK) == str(folder):
                    yield process

    def signal(self, name: str, number: int) -> int:
        """Sends a signal to all processes of a service, its command first."""
        sent = 0
        for process in [psutil.Process(self.started.processes[name].pid), *self.processes(name)]:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
                sent += 1
        return sent

    def supervise(self) -> None:
        """Starts services again that have ended by themselves; the run, too, after the server."""
        for name, process in list(self.started.processes.items()):
            if process.poll() is None or name in self._down or is_done(self.run):
                continue
            self.note(event="ended", service=name, code=process.returncode)
            time.sleep(AGAIN)
            if name == "run":
                self.begin(*(("--resume", str(self.run)) if self.newest() else (self.config,)))
            else:
                self.serve(name)

    # -- what happens

    def note(self, **what: Any) -> None:
        """Keeps and prints what has happened."""
        self.seen.append({"time": time.time(), **what})
        files.write_text(self.folder / "faults.json", json.dumps(self.seen, indent=1))
        print(time.strftime("%H:%M:%S"), json.dumps(what), flush=True)

    def newest(self) -> dict[str, Any]:
        """The newest line of the run, without reading the lines before."""
        try:
            with open(self.run / METRICS, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
                return dict(json.loads(file.read().split(b"\n")[-2]))
        except (OSError, ValueError, IndexError):  # not there yet, or half written
            return {}

    def whole(self, after: int) -> bool:
        """Whether all five sites are in the newest sum, which is that of a later round."""
        line = self.newest()
        return line.get("round", 0) > after and line.get("secure", {}).get("clients") == list(SITES)

    def wait(self, what: Callable[[], bool], patience: float) -> bool:
        """Waits, and keeps services running meanwhile. Whether it came about.

        Time in which this machine suspends its processes is no part of the patience.
        """
        while not what() and not is_done(self.run):
            if patience < 0:
                return False
            began = time.monotonic()
            self.supervise()
            time.sleep(0.5)
            patience -= min(time.monotonic() - began, 10.0)
        return True

    def commit(self, fault: Fault) -> None:
        """Lets a fault happen, and waits until all sites take part again."""
        before, began = self.newest().get("round", 0), time.monotonic()
        self._down.add(fault.site)
        if fault.kind == "stall":
            hit = self.signal(fault.site, signal.SIGSTOP)
            time.sleep(fault.seconds)
            self.signal(fault.site, signal.SIGCONT)
        else:
            hit = self.signal(fault.site, signal.SIGKILL)
            self.started.processes[fault.site].wait()
            time.sleep(fault.seconds)
            self.serve(fault.site)
        self._down.clear()
        after = self.newest().get("round", 0) + 1  # this round may have begun before
        well = self.wait(lambda: self.whole(after), PATIENCE)
        back = time.monotonic() - began if well else None
        self.note(event="fault", **asdict(fault), round=before, processes=hit, back=back)

    def sample(self, stop: threading.Event) -> None:
        """Writes a line for every process, until the end."""
        with open(self.folder / "samples.csv", "w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(soaked.COLUMNS)
            known: dict[tuple[int, float], tuple[str, str]] = {}
            last = time.time()
            while not stop.wait(EVERY):
                now, names = time.time(), set(self.started.processes)
                if now - last > SUSPENDED:
                    self.note(event="suspended", seconds=round(now - last - EVERY))
                last = now
                for process in psutil.process_iter():
                    with contextlib.suppress(psutil.Error, StopIteration):
                        key = (process.pid, process.create_time())
                        service, role = known.get(key) or self._known(process)
                        if now - key[1] > EVERY:  # its command will not change any more
                            known[key] = service, role
                        if service in names:
                            with process.oneshot():
                                size, times = process.memory_info().rss, process.cpu_times()
                                most = process.num_fds(), process.num_threads()
                            used = round(times.user + times.system, 2)
                            age = round(now - key[1], 1)
                            row = (round(now, 1), service, role, key[0], age, size, *most, used)
                            lines.writerow(row)
                file.flush()

    def _known(self, process: psutil.Process) -> tuple[str, str]:
        """The service and the role of a process; ``("", "")`` for those of others."""
        words = " ".join(process.cmdline())
        ours = str(self.folder) in words or str(self.folder) in str(process.environ())
        if process.pid == os.getpid() or not ours:
            return "", ""
        role = next((role for part, role in ROLES.items() if part in words), "other")
        for name in ("server", *SITES):
            folder = self.home / "server" if name == "server" else self._state(name)
            mark = str(process.environ().get(MARK, ""))
            if mark.startswith(str(folder)) or f"--state {folder} " in f"{words} ":
                return name, role
        return ("run", role) if role == "deploy run" else ("server", role)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    asked.add_argument("folder", type=Path)
    asked.add_argument("--minutes", type=float, default=120)
    asked.add_argument("--every", type=float, default=240, help="mean seconds between faults")
    asked.add_argument("--period", type=float, default=15, help="least seconds of a round")
    asked.add_argument("--seed", type=int, default=0)
    given = asked.parse_args()
    home, seconds = given.folder.absolute(), given.minutes * 60
    home.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    with Started(home) as started:
        soak = Soak(home, started, rounds := int(SHARE * seconds / given.period))
        pacing = str(Path(__file__).parent / "pacing")
        paths = filter(None, [pacing, os.environ.get("PYTHONPATH")])
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.environ["PACE"] = f"{time.time() + 60} {given.period}"
        for name in ("server", *SITES):
            soak.serve(name)
        soak.begin(soak.config)
        stop = threading.Event()
        sampling = threading.Thread(target=soak.sample, args=(stop,))
        sampling.start()
        try:
            if not soak.wait(lambda: soak.whole(0), PATIENCE):
                raise SystemExit(f"no round of all sites; see {home / 'run.log'}")
            soak.note(event="begun", rounds=rounds, arguments=vars(given) | {"folder": str(home)})
            began = time.monotonic()
            for fault in planned(given.seed, SHARE * seconds, given.every):
                soak.wait(lambda at=fault.at: time.monotonic() > began + at, seconds)
                if not is_done(soak.run):
                    soak.commit(fault)
            soak.wait(lambda: False, seconds + PATIENCE)
            soak.note(event="done", finished=is_done(soak.run), rounds=len(Store(soak.run).lines()))
            code = soak.started.processes["run"].wait(PATIENCE)
            soak.note(event="over", code=code)
        finally:
            stop.set()
            sampling.join()
    soaked.main(home)


if __name__ == "__main__":
    sys.exit(main())
