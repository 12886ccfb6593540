"""``python killed.py STATE KILLS``: a site that trains, and is killed at random moments.

A kill comes after none to three replies, and then at a random moment of the next rounds.

The site's real code does a round, except that "training" draws 16 random bytes, and that the
accountant, which takes most of the time, finds every sum to be 0. The reply goes into a pipe, as
over a network. The output is JSON: round -> the distinct replies that arrived, round -> its
charges, and for each kill the number of its rounds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import torch

from fedvlm.algorithms.base import Visit
from fedvlm.config import load
from fedvlm.deploy.account import Account
from fedvlm.deploy.ledger import Ledger
from fedvlm.deploy.policy import Policy
from fedvlm.deploy.site import Site
from fedvlm.deploy.sitestore import SiteStore
from fedvlm.deploy.spending import Spending
from fedvlm.engines.wire import Reply
from fedvlm.privacy import accountant
from fedvlm.privacy.plan import planned

ROUNDS = 3000
PRIVACY = load({"privacy": {"unit": "row", "epsilon": 1e3, "delta": 1e-3, "noise": 50}}).privacy


class Engine:
    """Trains nothing: its upload is random."""

    def __init__(self, store):
        self.ended, self.store = {}, store

    def train(self, tasks):
        drawn = torch.frombuffer(bytearray(os.urandom(16)), dtype=torch.uint8)
        self.ended["s"], self.store.fresh = {}, {}
        yield Reply("s", {"drawn": drawn}, 1, 0.0)


def opened(state):
    """A site's client of a run, as after its start."""
    site = object.__new__(Site)
    site.name, site.policy, site.folder, site.private = "s", Policy(), state / "runs" / "r", True
    site.folder.mkdir(parents=True, exist_ok=True)
    site.ledger, site.store = Ledger(site.folder), SiteStore(site.folder)
    site.engine = Engine(site.store)
    site._visit = lambda round_, sampled: Visit("s", 1.0, sampled, round_)
    rows = datasets.Dataset.from_dict({"image_hash": [f"picture {n}" for n in range(100)]})
    steps = dict.fromkeys(range(1, ROUNDS), 1)
    site.account = Account(state, "r", planned(PRIVACY, 100, 10, ROUNDS), steps, site.policy)
    site.account.open(PRIVACY, rows, np.arange(100))
    return site


def work(state, pipe, first):
    """Trains rounds from ``first`` on, and sends each reply, until the process is killed."""
    site = opened(state)
    for round_ in range(first, ROUNDS):
        done = site.train(round_, {"down": torch.tensor([round_])})
        reply = [round_, done.trees["upload"]["drawn"].numpy().tobytes().hex()]
        os.write(pipe, (json.dumps(reply) + "\n").encode())


def main(state, kills):
    accountant._epsilon = lambda spends, delta: 0.0
    warm = opened(state.with_name("warm"))  # libraries load on first use
    began = time.perf_counter()
    warm.train(1, {"down": torch.ones(1)})
    usual = time.perf_counter() - began
    arrived, first, chance, counts = set(), 1, random.Random(), []
    for kill in range(kills):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            work(state, write, first)
        os.close(write)
        with os.fdopen(read) as replies:
            whole = [replies.readline() for _ in range(kill % 4)]  # however slow the machine is
            time.sleep(usual * chance.uniform(0, 2))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found = [json.loads(line) for line in (*whole, *replies) if line.endswith("\n")]
        counts.append(len(found))
        arrived |= {tuple(reply) for reply in found}
        first = max([first, *(round_ for round_, _ in found)])  # asked again, and then on
    spending = Spending(state)
    with spending.locked():
        charges = spending.charges()
    by_round = Counter(charge.round for charge in charges)
    drawn = Counter(round_ for round_, _ in arrived)
    print(json.dumps({"arrived": drawn, "charged": by_round, "rounds": counts}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
