"""A secure sum among sites in one process, with hooks for sites that fail and servers that lie."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np

from fedvlm.privacy.blind.client import Client
from fedvlm.privacy.blind.collector import Collector
from fedvlm.privacy.blind.encoding import HEAD, Encoding
from fedvlm.privacy.blind.identity import Identity
from fedvlm.privacy.blind.messages import Context, Withheld

STEPS = ("advertise", "share", "mask", "agree", "unmask")
CONTEXT = Context("run", 3, 1, "c" * 64, "d" * 32, 100.0)
BOUND = 4.0


class Veiled:
    """Sites with pinned peers, and a server.

    Args:
        count: the number of sites.
        size: the number of values of an upload.
        least: fewest sites that a site accepts.
        contexts: site -> its own view of the round, where it differs.
        pins: site -> its pins, where they differ.
        record: called with the site and the fact that it records.
    """

    def __init__(self, count=5, size=200, *, least=3, contexts=None, pins=None, record=None):
        self.names = [f"site-{k}" for k in range(count)]
        self.identities = {n: Identity(n) for n in self.names}
        marks = {n: one.fingerprint for n, one in self.identities.items()}
        record = record or (lambda site, fact: None)
        self.clients = {
            n: Client(
                self.identities[n],
                (contexts or {}).get(n, CONTEXT),
                (pins or {}).get(n, marks),
                least,
                lambda fact, n=n: record(n, fact),
            )
            for n in self.names
        }
        generator = np.random.default_rng(7)
        self.values = {n: generator.normal(0, 0.02, size) for n in self.names}
        self.weights = {n: (k + 1) / count for k, n in enumerate(self.names)}
        self.collector = Collector(CONTEXT, HEAD + size)
        self.blobs, self.refused, self.gone = {}, {}, set()
        self.lies = {}  # step -> function of the messages that changes them

    def run(self, dead=()):
        """All five steps; ``dead`` has ``(step, site)`` for sites that are killed in a step."""
        for step in STEPS:
            self.step(step, dead)
        return self.collector.opened()

    def step(self, step, dead=()):
        take = {
            "advertise": self.collector.advertised,
            "share": self.collector.shared,
            "mask": self.collector.masked,
            "agree": self.collector.agreed,
            "unmask": self.collector.unmasked,
        }[step]
        ask = getattr(self.collector, f"asks_{step}", lambda: dict.fromkeys(self.names))
        asked = copy.deepcopy(ask())
        asked = self.lies.get(step, lambda messages: messages)(asked)
        self.gone |= {site for when, site in dead if when == step}
        for site, message in asked.items():
            if site in self.gone:
                continue
            try:
                answer = self.answered(step, site, message)
            except Withheld as why:
                self.refused[site] = str(why)
                self.gone.add(site)
                continue
            take(site, *answer) if step == "mask" else take(site, answer)

    def answered(self, step, site, message):
        client = self.clients[site]
        if step == "advertise":
            return client.advertise()
        if step == "mask":
            told, self.blobs[site] = client.mask(message, lambda: self.numbers(site))
            return told, self.blobs[site]
        return getattr(client, step)(message)

    def numbers(self, site):
        encoding = Encoding(self.clients[site].sites, BOUND)
        return encoding.encoded(self.values[site], self.weights[site])

    def mean(self, outcome):
        """The mean that the server opens."""
        total, sites = outcome
        values, weight = Encoding(self.collector.sites, BOUND).decoded(total, len(sites))
        return values / weight

    def plain(self, sites):
        """The plain weighted mean."""
        weight = sum(self.weights[n] for n in sites)
        return sum(self.weights[n] * self.values[n] for n in sites) / weight


def other(**changes):
    """The context of the round with changes."""
    return replace(CONTEXT, **changes)
