"""Federated rounds on clients whose loss is a formula: what an algorithm computes, without a model.

Phases run as in the engines, with their own ``Extras``, by plain SGD.
"""

from __future__ import annotations

import torch

from fedvlm.algorithms.sharing import sharing
from fedvlm.algorithms.table import Client, Upload, Work
from fedvlm.engines.extras import Extras
from fedvlm.tree import Mean, cut, pad, rank

A = "base_model.model.layers.0.q_proj.lora_A.weight"
B = "base_model.model.layers.0.q_proj.lora_B.weight"


def adapter(ranks=2, out=4, into=5, seed=0):
    """A random A and a zero B."""
    g = torch.Generator().manual_seed(seed)
    return {A: torch.randn(ranks, into, generator=g), B: torch.zeros(out, ranks)}


def pull(target, strength=1.0):
    """The gradient of ``strength / 2 * |w - target|^2``."""
    return lambda name, now: strength * (now - target[name])


FEDAVG = sharing({"": "AB"})
LOCAL = sharing({})
INITIAL = adapter()


def target(seed):
    g = torch.Generator().manual_seed(100 + seed)
    return {n: torch.randn(t.shape, generator=g) for n, t in INITIAL.items()}


def clients(count=3):
    """Clients with different optima and numbers of examples."""
    return {f"c{k}": (1.0 + k, pull(target(k))) for k in range(count)}


def masked(gradient, ranks):
    """The first ranks' own, and none in the others, which are zero in both factors."""

    def found(name, now):
        own = {name: gradient(name, cut({name: now}, 0, 2)[name])}
        return pad(cut(own, 0, ranks), 0, rank({name: now}) - ranks)[name]

    return found


def with_spare(count=3):
    """Clients whose adapter has more than the two ranks that they train."""
    return {c: (weight, masked(g, 2)) for c, (weight, g) in clients(count).items()}


def close(one, other, atol=1e-6):
    return all(torch.allclose(one[n], t, atol=atol) for n, t in other.items())


def train(algorithm, start, down, mine, gradient, *, lr=0.1, steps=1):
    """One client's phases; its work."""
    params = {n: torch.nn.Parameter(t.clone()) for n, t in start.items()}
    ends, paths = [], []
    for phase in algorithm.phases:
        if phase.begin:
            begun = phase.begin(down, mine, {n: p.detach().clone() for n, p in params.items()})
            for n, p in params.items():
                p.data.copy_(begun[n])
        trained = {n: p for n, p in params.items() if phase.trains(n)}
        extras, optimizer = (
            Extras(phase, [(down, mine)], trained),
            torch.optim.SGD(params.values(), lr),
        )
        count = phase.steps or steps
        for _ in range(count):
            optimizer.zero_grad()
            for n, p in trained.items():
                p.grad = gradient(n, p.detach()).clone()
            extras.before()
            optimizer.step()
            extras.after()
        ends.append({n: p.detach().clone() for n, p in params.items()})
        paths.append({"A": lr * count, "B": lr * count})
    return Work(down, mine, tuple(ends), tuple(paths), start)


class Federation:
    """Rounds of an algorithm on named clients.

    Args:
        algorithm: what they run.
        clients: name -> (examples, gradient).
        initial: the common adapter.
    """

    def __init__(self, algorithm, clients, initial, **training):
        self.algorithm, self.clients, self.initial = algorithm, clients, initial
        self.state, self.kept = algorithm.init(initial), {c: {} for c in clients}
        self.training, self.round = training, 0
        self.works, self.uploads, self.messages = {}, {}, {}

    def run(self, rounds=1, cohort=None):
        """Some rounds with these clients, all unless named."""
        for _ in range(rounds):
            self.round += 1
            one, mean, uploads = self.algorithm.at(self.round), Mean(), []
            names = cohort or list(self.clients)
            share = sum(self.clients[c][0] for c in names) / sum(
                w for w, _ in self.clients.values()
            )
            for name in names:
                weight, gradient = self.clients[name]
                client = Client(name, weight, share)
                down = one.download(self.state, client)
                start = one.start(self.initial, down, self.kept[name])
                work = train(one, start, down, self.kept[name], gradient, **self.training)
                self.messages[name], self.kept[name] = one.finish(work)
                upload = one.decode(self.messages[name], down)
                self.works[name], self.uploads[name] = work, upload
                uploads.append(Upload(client, upload))
                if upload and not one.gather:
                    mean.add(one.lift(upload, client), weight)
            if one.gather:
                self.state = one.gather(self.state, uploads)
            elif mean.total:
                self.state = one.update(self.state, mean.tree())
        return self

    def model(self, name=""):
        """A client's model now; the global one of nobody."""
        client = Client(name, self.clients[name][0] if name else 1.0)
        down = self.algorithm.download(self.state, client)
        return self.algorithm.start(self.initial, down, self.kept.get(name, {}))
