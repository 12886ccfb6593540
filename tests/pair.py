"""Both engines prepared for one run, and its rounds on each, without scoring or stored results."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

import smallest
from fedvlm.algorithms.table import find, of_run
from fedvlm.config import load
from fedvlm.engines.base import Models
from fedvlm.engines.compress import compression
from fedvlm.engines.wire import Forms, Task
from fedvlm.rounds.fold import Fold
from fedvlm.rounds.prepare import prepare
from fedvlm.rounds.schedule import plan, standing
from fedvlm.tree import products

NAMES = ("reference", "cohort")
TOLERANCE = 1e-7
EXACT = "model.dtype=float64"


class Kept:
    """The part of a run's folder that an engine needs: the kept states, in memory."""

    def __init__(self, folder):
        self.folder, self.states = Path(folder), {}

    def personal(self, clients):
        return [dict(self.states.get(client, {})) for client in clients]

    def keep(self, round_, position, kept):
        self.states |= kept


@dataclass
class Played:
    """The results of an engine's rounds.

    Attributes:
        uploads: (round, client) -> upload.
        losses: (round, client) -> training loss.
        ends: (round, client) -> adapter at the end of training.
        kept: client -> kept state after the last round.
        state: state of the server after the last round.
        answers: model -> client -> its answers to held-out rows.
    """

    uploads: dict = field(default_factory=dict)
    losses: dict = field(default_factory=dict)
    ends: dict = field(default_factory=dict)
    kept: dict = field(default_factory=dict)
    state: dict = field(default_factory=dict)
    answers: dict = field(default_factory=dict)


def engines(settings, *overrides, folder):
    """Both engines of a run, each with its own model."""
    found = []
    for name in NAMES:
        config = load(settings, *overrides, f"engine.name={name}", f"output={folder / name}")
        engine, partition, _ = prepare(config, store=Kept(folder))
        found.append((engine, partition))
    return found


def prepared(folder, **scenes):
    """Settings of a small run, both engines for it, and a folder.

    An algorithm changes neither the model nor its rows, so that tests of many share this. The same
    holds for settings of training.

    Args:
        folder: the folder.
        scenes: settings of the scenes that differ from the usual ones.
    """
    settings = {
        "model": {"name": smallest.model()},
        "data": {"scenes": {"style": "mixed", "sites": 3, "rows": 16, **scenes}},
        "partition": {"min_rows": 4},
        "train": {"rounds": 2, "local_steps": 2, "batch_size": 4, "lr": 0.001},
        "eval": {"every": 0, "max_rows": 2, "max_new_tokens": 3},
        "lora": {"rank": 2, "alpha": 4},
    }
    return settings, engines(settings, EXACT, folder=folder), folder


def switched(engine, partition, settings, *overrides, folder):
    """The same engine for a run with another algorithm, or other settings of training."""
    config = load(settings, *overrides, f"output={folder}")
    entry = find(config.algorithm.name)
    assert not entry.pools, "the algorithm needs other rows than the engine has"
    assert not entry.spare, "the algorithm needs another adapter than the engine has"
    engine.config, engine.store = config, Kept(folder)
    engine.algorithm, engine.stages = of_run(config), compression(config.wire)
    engine.forms = Forms(engine.algorithm, engine.adapter, engine.stages)
    return engine, partition


def play(engine, partition):
    """Runs all rounds of the engine, and lets its models answer at the end."""
    algorithm, weights, found = engine.algorithm, partition.weights, Played()
    found.state = algorithm.init(engine.adapter)
    forms = Forms(algorithm, engine.adapter, engine.stages)
    if find(engine.config.algorithm.name).pools:
        weights = engine.partition.weights
    for round_ in plan(engine.config, algorithm, tuple(weights)):
        visits = round_.visits(weights)
        down = {c: algorithm.send(found.state, v) for c, v in visits.items()}
        fold = Fold(visits, down, forms)
        for reply in engine.train([Task(v, down[c], True) for c, v in visits.items()]):
            assert fold.add(reply), fold.rejected
            key = round_.number, reply.client
            found.uploads[key], found.losses[key] = reply.upload, reply.loss
        found.ends |= {(round_.number, c): dict(tree) for c, tree in engine.ended.items()}
        found.state = fold.update(found.state, round_.number)
    last = standing(engine.config, algorithm)
    visits = [last.visit(c) for c in weights]
    for kind in ("global", "personal"):
        models = Models(kind, [(v, algorithm.send(found.state, v)) for v in visits])
        found.answers[kind] = engine.answer(kind, models)
    found.kept = engine.store.states
    return found


def furthest(ours, theirs):
    """The largest difference of two mappings of trees."""
    assert ours.keys() == theirs.keys()
    most = 0.0
    for key, tree in theirs.items():
        assert ours[key].keys() == tree.keys()
        for name, tensor in tree.items():
            assert ours[key][name].dtype == tensor.dtype
            gap = (ours[key][name].double() - tensor.double()).abs().max().item()
            most = max(most, gap) if tensor.numel() else most
    return most


def assert_same(reference, cohort, tolerance, *, factors=True):
    """Asserts equal uploads, kept states, adapters, server states, losses and answers.

    Args:
        reference: the results of one engine.
        cohort: the results of the other engine.
        tolerance: the largest difference of a tensor's element.
        factors: whether to compare factors; else the products B A, whose factors are not unique.
    """
    moved = [t for tree in reference.ends.values() for n, t in tree.items() if "lora_B" in n]
    assert any(t.abs().max() > 1e-3 for t in moved)
    pairs = [(cohort.ends, reference.ends)]
    if factors:
        pairs += [(cohort.uploads, reference.uploads), (cohort.kept, reference.kept)]
        pairs += [({"": cohort.state}, {"": reference.state})]
    else:
        pairs = [({k: products(t) for k, t in side.items()} for side in pairs[0])]
    for ours, theirs in pairs:
        assert furthest(ours, theirs) <= tolerance
    assert cohort.losses == pytest.approx(reference.losses, abs=1e-4)
    for kind, found in reference.answers.items():
        assert cohort.answers[kind].keys() == found.keys()
        for client, answers in found.items():
            assert answers
            for answer, other in zip(cohort.answers[kind][client], answers, strict=True):
                assert answer["prediction"] == other["prediction"]
                assert answer["loss"] == pytest.approx(other["loss"], abs=1e-3)
                assert answer["weight"] == other["weight"]
