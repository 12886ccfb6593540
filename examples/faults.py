"""Kills everything in turn, in a federation of real processes on this machine, and sees it recover.

    python examples/faults.py [FOLDER]

A server and three sites, mutual TLS. In the middle of training: kill -9 of a worker, of a site's
NVFlare process, of the server (started again; ``deploy run --resume``), and of a whole site
(started again 15 s later). Fails unless the run finishes, unless all rounds up to the site's
absence are those of one process, to the bit, and unless the site trains again. Prints what was
seen, and how long each took. Some minutes on two cores; Linux only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedvlm
from fedvlm import config as configs
from fedvlm.deploy.nvflare.demo import SETTINGS, SITES, Started, enrol, loopback, rows
from fedvlm.deploy.nvflare.processes import MARK
from fedvlm.deploy.nvflare.project import provision
from fedvlm.store import files
from fedvlm.store import run as store

ROUNDS = 12
MORE = ("train.local_steps=40", f"train.rounds={ROUNDS}", "eval.max_rows=10")
AWAY = 15.0  # seconds until a site that was killed is started again
PATIENCE = 300.0  # seconds for anything
WORKER, JOB = "fedvlm.deploy.worker", "client.worker_process"


class Faults:
    """A federation, its run, and what happens to both."""

    def __init__(self, folder: Path, started: Started):
        self.folder, self.started = folder, started
        rows(folder / "data")
        files.write_text(folder / "policy.yml", "score_step: 0\n")  # losses are compared exactly
        data = folder / "data" / "all.parquet"
        self.settings = configs.load(
            SETTINGS, *MORE, f"output={folder / 'run'}", f"data.path={data}"
        )
        files.write_text(folder / "config.yaml", json.dumps(self.settings.model_dump()))
        self.kits = provision(loopback(SITES, "faults"), folder / "federation")

    # -- processes

    def serve(self) -> None:
        self.started.start("server", "deploy", "server", "-f", str(self.folder / "federation"))

    def join(self, site: str) -> None:
        data = str(self.folder / "data" / f"{site}.parquet")
        if not (self.state(site) / "keys").exists():
            enrol(self.kits[site], self.state(site))
        words = ("--data", data, "--state", str(self.state(site)))
        words += ("--policy", str(self.folder / "policy.yml"))
        self.started.start(site, "site", "start", *words)

    def run(self, *words: str) -> subprocess.Popen[bytes]:
        more = ("-f", str(self.folder / "federation"), "--round-deadline", "60")
        self.started.start("run", "deploy", "run", *words, *more)
        return self.started.processes["run"]

    def state(self, site: str) -> Path:
        return self.folder / "sites" / site

    def kill(self, mark: Path, part: str) -> None:
        """Kills the process of a site, or of the server, that has this in its command."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().decode().replace("\0", " ")
                own = f"{MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if own and part in words and "multiprocessing" not in words:
                os.kill(int(path.name), signal.SIGKILL)
                return
        raise SystemExit(f"no process of {mark} has {part} in its command")

    # -- what is seen

    def events(self) -> list[dict[str, Any]]:
        """All jobs' events, in order."""
        paths = (self.folder / "federation" / "runs").glob("*/events.jsonl")
        return sorted((e for p in paths for e in files.read_lines(p)), key=lambda e: e["time"])

    def lines(self) -> list[dict[str, Any]]:
        return store.Store(self.folder / "run").lines()

    def training(self, number: int) -> None:
        """Waits until a round has been under way for a moment."""
        wait(lambda: len(self.lines()) == number, f"the start of round {number}")
        time.sleep(0.7)

    def over(self, number: int) -> float:
        """Waits for the end of a round; when it was."""
        wait(lambda: len(self.lines()) > number, f"the end of round {number}")
        return time.time()


def wait(what: Callable[[], Any], said: str, patience: float = PATIENCE) -> None:
    until = time.monotonic() + patience
    while not what():
        if time.monotonic() > until:
            raise SystemExit(f"waited {patience:.0f} s for {said}")
        time.sleep(0.05)


def main() -> None:
    home = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="faults-"))
    home.mkdir(parents=True, exist_ok=True)
    print(f"everything is in {home}")
    with Started(home) as started:
        faults = Faults(home, started)
        faults.serve()
        for site in SITES:
            faults.join(site)
        follower = faults.run(str(home / "config.yaml"))
        table = [("nothing", undisturbed(faults))]
        table.append(("a worker in a training step", kill_a_worker(faults)))
        table.append(("a site's NVFlare process for the run", kill_a_job_process(faults)))
        seen, follower = kill_the_server(faults, follower)
        table.append(("the server, started again; `--resume`", seen))
        table.append((f"a whole site, back after {AWAY:.0f} s", kill_a_site(faults)))
        if code := follower.wait(PATIENCE):
            raise SystemExit(f"the run ended with {code}; see {home / 'run.log'}")
        check(faults)
    print("\n| killed | round under way | its end, s after | seen |\n| --- | --- | --- | --- |")
    for what, (number, seconds, seen) in table:
        print(f"| {what} | {number} | {seconds:.1f} | {seen} |")


Seen = tuple[int, float, str]  # the round under way, seconds to its end, what was seen


def undisturbed(faults: Faults) -> Seen:
    began = faults.over(1)
    return 2, faults.over(2) - began, "a round without a fault"


def kill_a_worker(faults: Faults) -> Seen:
    faults.training(3)
    began = time.time()
    faults.kill(faults.state("north") / "nvflare", WORKER)
    seconds = faults.over(3) - began
    log = (faults.state("north") / "site.log").read_text()
    assert "the worker died" in log, "the site's log says what happened"
    return 3, seconds, "another worker did the round again"


def kill_a_job_process(faults: Faults) -> Seen:
    faults.training(5)
    began = time.time()
    faults.kill(faults.state("south") / "nvflare", JOB)
    seconds = faults.over(5) - began
    jobs = sum(e["event"] == "begun" for e in faults.events())
    return 5, seconds, f"the job was aborted; job {jobs} did the round again"


def kill_the_server(
    faults: Faults, follower: subprocess.Popen[bytes]
) -> tuple[Seen, subprocess.Popen[bytes]]:
    faults.training(7)
    began = time.time()
    faults.started.processes["server"].kill()
    code = follower.wait(PATIENCE)
    assert code == 2, f"`deploy run` says that the server is gone, and ends with 2, not {code}"
    faults.serve()
    follower = faults.run("--resume", str(faults.folder / "run"))
    seconds = faults.over(7) - began
    return (7, seconds, "`deploy run` ended with 2; the new one went on at that round"), follower


def kill_a_site(faults: Faults) -> Seen:
    faults.training(9)
    began = time.time()
    faults.started.processes["west"].kill()
    time.sleep(AWAY)
    faults.join("west")
    seconds = faults.over(9) - began
    wait(lambda: "west" in faults.lines()[-1].get("train_loss", {}), "west to train again")
    back = time.time() - began
    missed = [line["round"] for line in faults.lines() if line.get("missing")]
    return 9, seconds, f"left out of rounds {missed}; trained again {back:.0f} s after"


def check(faults: Faults) -> None:
    """Nothing is lost: the rounds before a site was away are those of one process."""
    lines = faults.lines()
    assert [line["round"] for line in lines] == list(range(ROUNDS + 2)), "the last is the end"
    assert not [line for line in lines if line.get("rejected")]
    assert {site for line in lines for site in line.get("missing", ())} <= {"west"}
    assert not [line["round"] for line in lines[:9] if line.get("missing")]
    output = f"output={faults.folder / 'here'}"
    here = fedvlm.run(faults.settings, output, "train.rounds=9", report=False)
    same = [line["train_loss"] for line in store.Store(here.folder).lines()[1:9]]
    assert [line["train_loss"] for line in lines[1:9]] == same, "as in one process, to the bit"
    assert lines[-2]["train_loss"].keys() == set(SITES), "nobody trains in the last line"


if __name__ == "__main__":
    main()
