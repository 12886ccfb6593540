"""Kills sites in every step of a secure sum, among five sites over NVFlare, and sees it recover.

    python examples/faults_secure.py [FOLDER]

A server and five sites as real processes on this machine, with mutual TLS, secure aggregation and
pinned keys. A site is killed with SIGKILL, all its processes at once, when it is asked for a step
or when its answer has not left: keys, shares, masked upload, consent, shares of the others. It is
started again, and takes part again. The step 'agree' is asked only where a site has dropped out
before it, so two sites die in that round, and it is void.

Fails unless each round has the sum that the rules give, and the run goes on afterwards. Prints what
was seen. About ten minutes on two idle cores; Linux only.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedvlm import config as configs
from fedvlm.data.scenes import scenes
from fedvlm.deploy.nvflare.demo import SETTINGS, Started, enrol, loopback, pinned
from fedvlm.deploy.nvflare.project import provision
from fedvlm.store import files
from fedvlm.store import run as store

SITES = tuple(f"site-{k}" for k in range(5))
ROUNDS = 1000  # more than the faults need; the run is ended after them
PATIENCE = 300.0  # seconds for anything
MORE = ("wire.secure=true", "train.local_steps=20", f"train.rounds={ROUNDS}", "eval.max_rows=10")
FAULTS: tuple[dict[str, tuple[str, str]], ...] = (
    {"site-1": ("keys", "asked")},
    {"site-2": ("keys", "ready")},
    {"site-3": ("share", "asked")},
    {"site-4": ("share", "ready")},
    {"site-1": ("mask", "asked")},
    {"site-2": ("mask", "ready")},
    {"site-3": ("unmask", "asked")},
    {"site-4": ("unmask", "ready")},
    {"site-1": ("mask", "asked"), "site-2": ("agree", "asked")},
)
"""Site -> the step and the moment at which it dies. Each entry is one round."""
UPLOADED = ("unmask", "agree")
"""A site that dies in one of these steps has uploaded."""


class Federation:
    """The processes of a federation, and what they write."""

    def __init__(self, folder: Path, started: Started):
        self.folder, self.started = folder, started
        (folder / "data").mkdir(parents=True)
        table = scenes(style="mixed", strength=1.0, sites=len(SITES), rows=80).to_pandas()
        for site in SITES:
            table[table["site"] == site].to_parquet(self.data(site), index=False)
        table.to_parquet(self.data("all"), index=False)
        own = (f"output={folder / 'run'}", f"data.path={self.data('all')}")
        config = configs.load(SETTINGS, *MORE, *own)
        files.write_text(folder / "config.yaml", json.dumps(config.model_dump()))
        kits = provision(loopback(SITES, "faults"), folder / "federation")
        for site in SITES:
            enrol(kits[site], self.state(site))
        self.policy = pinned(folder / "sites", SITES)

    def data(self, name: str) -> Path:
        return self.folder / "data" / f"{name}.parquet"

    def state(self, site: str) -> Path:
        return self.folder / "sites" / site

    def join(self, site: str) -> None:
        words = ("--data", str(self.data(site)), "--state", str(self.state(site)))
        self.started.start(site, "site", "start", *words, "--policy", str(self.policy))

    def begin(self) -> None:
        home = ("-f", str(self.folder / "federation"))
        self.started.start("server", "deploy", "server", *home)
        for site in SITES:
            self.join(site)
        limits = ("--round-deadline", "60", "--min-sites", "3", "--wait", f"{PATIENCE:.0f}")
        self.started.start("run", "deploy", "run", str(self.folder / "config.yaml"), *home, *limits)

    def sums(self) -> dict[int, dict[str, Any]]:
        """Round -> what is known of its sum."""
        lines = store.Store(self.folder / "run").lines() if (self.folder / "run").exists() else []
        return {line["round"]: line["secure"] for line in lines if "secure" in line}

    def whole(self, after: int = 0) -> bool:
        """Whether all five sites are in the newest sum, which is that of a later round."""
        sums = self.sums()
        newest = max(sums, default=0)
        return newest > after and sums[newest].get("clients") == list(SITES)

    def wait(self, what: Any, said: str) -> None:
        until = time.monotonic() + PATIENCE
        while not what():
            if self.started.processes["run"].poll() is not None:
                raise SystemExit(f"the run ended before {said}; see {self.folder / 'run.log'}")
            if time.monotonic() > until:
                raise SystemExit(f"waited {PATIENCE:.0f} s for {said}")
            time.sleep(0.05)

    def fault(self, dying: dict[str, tuple[str, str]]) -> tuple[int, dict[str, Any], float]:
        """Kills sites in one round.

        Returns:
            The round, its sum, and the seconds until all sites were in a sum again.
        """
        self.wait(self.whole, "a sum of all sites")
        for site, (step, moment) in dying.items():
            told = json.dumps({"step": step, "moment": moment})
            files.write_text(self.state(site) / "fault.json", told)
        for site, (step, moment) in dying.items():
            process = self.started.processes[site]
            self.wait(lambda p=process: p.poll() is not None, f"{site} to die: {step}, {moment}")
        began, before = time.monotonic(), max(self.sums())
        self.wait(lambda: max(self.sums()) > before, "the end of the round")
        for site in dying:
            self.join(site)
        self.wait(lambda: self.whole(before + 1), "the killed sites to take part again")
        return before + 1, self.sums()[before + 1], time.monotonic() - began


def expected(dying: dict[str, tuple[str, str]]) -> list[str] | None:
    """The sites in the sum of a round; None: it is void."""
    if len(dying) > 1:
        return None
    return [s for s in SITES if s not in dying or dying[s][0] in UPLOADED]


def main() -> None:
    home = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent / "dying"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    print(f"everything is in {home}")
    print("| killed | in the sum | all sites in a sum again |\n| --- | --- | --- |", flush=True)
    wrong = []
    with Started(home) as started:
        federation = Federation(home, started)
        federation.begin()
        for dying in FAULTS:
            round_, found, seconds = federation.fault(dying)
            told = ", ".join(f"{s}: {step}, {moment}" for s, (step, moment) in dying.items())
            clients = None if found.get("void") else found["clients"]
            if clients != expected(dying):
                wrong.append(f"round {round_}: {told}: {found}")
            seen = f"void: {found['void']}" if clients is None else f"{len(clients)} of 5"
            print(f"| {told} | {seen} | {seconds:.0f} s after |", flush=True)
        last = max(federation.sums())
        federation.wait(lambda: max(federation.sums()) >= last + 3, "three more rounds")
    voids = [number for number, found in federation.sums().items() if found.get("void")]
    print(f"{len(federation.sums())} rounds; void: {voids}")
    if wrong or len(voids) != 1:
        raise SystemExit("\n".join(["not as expected:", *wrong]))


if __name__ == "__main__":
    main()
