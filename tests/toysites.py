"""Five sites whose loss is a formula, behind real workers and the real state of a site."""

from __future__ import annotations

import copy

from fedvlm import simulate
from fedvlm.algorithms.table import of_run
from fedvlm.config import load
from fedvlm.deploy import peers
from fedvlm.deploy.ledger import Ledger
from fedvlm.deploy.policy import read_policy
from fedvlm.deploy.site import Site
from fedvlm.deploy.sitestore import SiteStore
from fedvlm.deploy.worker import Worker
from fedvlm.engines.wire import Forms, Reply
from fedvlm.metrics import measured
from fedvlm.store import files
from sites import LOCK, Here, deployed, written
from toy import adapter, pull, target

FIVE = tuple(f"site-{k}" for k in range(5))
SETTINGS = {
    "algorithm": {"name": "lora"},
    "train": {"rounds": 2, "average": "none"},
    "eval": {"every": 0},
    "lora": {"rank": 2, "alpha": 4},
    "wire": {"secure": True},
    "aggregate": {"kind": "mean"},
}


class Engine:
    """One client of :func:`fedvlm.simulate` as the engine of a site."""

    def __init__(self, name, config, store, far=1.0):
        self.name, self.store = name, store
        self.adapter, self.algorithm = adapter(config.lora.rank), of_run(config)
        self.forms, self.ended = Forms(self.algorithm, self.adapter), {}
        number = FIVE.index(name)
        self.weight, self.measured = 10.0 * (1 + number), measured(config.objective.name)
        known = {name: (self.weight, pull({n: far * t for n, t in target(number).items()}))}
        self.run = simulate(self.algorithm, known, self.adapter, steps=2)

    def train(self, tasks):
        (task,) = tasks
        self.forms.check_download(task.visit, task.down)
        (self.run.kept[self.name],) = self.store.personal([self.name])
        sent = self.run._work(task.visit, task.down)
        self.ended[self.name] = {**self.adapter, **sent.up}
        self.store.keep(task.round, 0, {self.name: sent.keep})
        yield Reply(self.name, sent.up, self.weight, 1.0 + FIVE.index(self.name))

    def score(self, models):
        return {self.name: {**dict.fromkeys(self.measured, 0.5), "examples": 10}}

    def answer(self, name, models):
        return {}

    def export(self, models, folders):
        pass


class ToySite(Site):
    """A site with this engine."""

    private = False
    account = None

    def __init__(self, name, config, folder, policy, far):
        policy.check(config)
        self.ledger = Ledger(folder)
        self.ledger.begin(folder.name, config)
        self.name, self.policy, self.folder, self.config = name, policy, folder, config
        self.store = SiteStore(folder)
        self.engine = Engine(name, config, self.store, far)
        self.rows = {"train": int(self.engine.weight), "val": 2, "test": 10}
        self.algorithm = self.engine.algorithm

    def adapter_files(self):
        return {}, self.engine.adapter


class ToyWorker(Worker):
    """The worker of such a site; the optimum of its rows is ``far`` times as far."""

    far = 1.0

    def _open(self, asked):
        from pathlib import Path

        run, config = asked["run"], load(asked["config"])
        if self.site is None:
            folder = Path(self.own["state"]) / "runs" / run
            folder.mkdir(parents=True, exist_ok=True)
            policy = read_policy(self.own["policy"])
            self.site = ToySite(self.own["name"], config, folder, policy, self.far)
            self.blind = self._part(self.site, run, config)
        return self.site.described()


class Five(Here):
    """Five sites that pin one another's keys, with hooks for deaths and lies.

    Attributes:
        killed: ``(round, step, site)``: the site's process is killed when it is asked, and another
            one takes its place, as a supervisor does it.
        lies: ``(round, step) -> function`` of site, header and body, that changes a request.
        seen: the answers, as ``(site, round, step, header, body)``.
    """

    def __init__(self, state, **policy):
        marks = {s: peers.identity(state / s, s).fingerprint for s in FIVE}
        path = written(state / "policy.yml", **{"peers": marks} | policy)
        super().__init__(state, state, path, FIVE)
        self.workers = {s: ToyWorker(own) for s, own in self.own.items()}
        self.killed, self.lies, self.seen, self.opening = set(), {}, [], None

    def __call__(self, site, header, blob, limit):
        step, round_ = header.get("step", header["do"]), header.get("round")
        if header["do"] == "open":
            self.opening = header
        if lie := self.lies.get((round_, step)):
            header, blob = lie(site, copy.deepcopy(header), blob)
        if (round_, step, site) in self.killed:
            self.killed.remove((round_, step, site))
            self.restart(site)
        answer = super().__call__(site, header, blob, limit)
        self.seen.append((site, round_, step, *answer))
        return answer

    def restart(self, site):
        self.workers[site] = ToyWorker(self.own[site])
        with LOCK:
            answer, _ = self.workers[site].perform(copy.deepcopy(self.opening), b"")
        assert "error" not in answer, answer

    def refusals(self, round_=None):
        """Site -> the message of its last refusal, of one round or of all."""
        found = [(s, r, h["message"]) for s, r, _, h, _ in self.seen if h.get("error") == "refused"]
        return {s: message for s, r, message in found if round_ in (None, r)}


def config(*overrides):
    return load(SETTINGS, *overrides)


def run(call, settings, folder, **limits):
    """A run; returns its lines of metrics and its events."""
    events = []
    deployed(call, settings, folder, events=events, sites=FIVE, at_once=5, **limits)
    return files.read_lines(folder / "metrics.jsonl"), events
