"""DP-SGD in both engines: samples, clipped gradients of units, noise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import families
import fedvlm
import smallest
from fedvlm.engines.wire import Task
from fedvlm.errors import FedVLMError
from fedvlm.models import lora
from fedvlm.models.runs import Runs
from fedvlm.privacy import chance as chances
from fedvlm.privacy.chance import Seeded, System, gaussian, poisson, some
from fedvlm.privacy.plan import Plan
from fedvlm.rounds.prepare import prepare
from pair import EXACT, TOLERANCE, Kept, assert_same, engines, furthest, play, switched

pytestmark = pytest.mark.usefixtures("no_pictures")

PRIVATE = {"unit": "row", "epsilon": 8, "delta": 1e-3}
NO_NOISE = Plan(units=2, batch=2, noise=0.0, clip=1e9, delta=1e-3, budget=8.0)


@pytest.fixture
def private(small):
    """Settings of a small private run."""
    small["eval"] |= {"every": 0, "max_rows": 2, "max_new_tokens": 3}
    small["train"] |= {"lr": 0.001}
    return small | {"privacy": dict(PRIVATE)}


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Settings of a small private run, both engines for it, and a folder."""
    settings = {
        "model": {"name": smallest.model()},
        "data": {"scenes": {"style": "mixed", "sites": 2, "rows": 16}},
        "partition": {"min_rows": 4},
        "algorithm": {"name": "ffa"},
        "train": {"rounds": 2, "local_steps": 2, "batch_size": 4, "lr": 0.001},
        "eval": {"every": 0, "max_rows": 2, "max_new_tokens": 3},
        "lora": {"rank": 2, "alpha": 4},
        "privacy": PRIVATE,
    }
    folder = tmp_path_factory.mktemp("private")
    return settings, engines(settings, EXACT, folder=folder), folder


def played(engine, partition, seed=7):
    engine.chance = Seeded(seed)
    return play(engine, partition)


SETTINGS = {
    "by ffa": ["algorithm.name=ffa"],
    "by plora, with its ending": ["algorithm.name=plora", "train.average=mean"],
    "by rolora": ["algorithm.name=rolora"],
    "with unequal ranks": ["algorithm.name=plora", "lora.ranks={site-0: 1}"],
    "with a proximal term": ["algorithm.name=plora", "algorithm.prox_mu=0.5"],
    "in passes of two units": ["engine.micro_batch=2"],
    "with little clipping": ["privacy.clip=50"],
    "with decay, and limits after the noise": ["train.weight_decay=0.1", "train.max_grad_norm=0.1"],
    "by sgd": ["train.optimizer=sgd", "train.lr=0.1"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_both_engines_take_the_same_private_steps(sides, name):
    settings, pair, folder = sides
    both = [switched(*side, settings, EXACT, *SETTINGS[name], folder=folder) for side in pair]
    assert_same(*(played(*side) for side in both), TOLERANCE)


@pytest.mark.parametrize(
    "rule",
    [
        ["lora.dropout=0.2"],
        ["objective.name=dpo"],
        ["privacy.unit=question", "privacy.unit_rows=2", "data.scenes.rows=30"],
    ],
    ids=["dropout", "preferences", "groups of rows"],
)
def test_both_engines_take_the_same_private_steps_on_other_batches(private, tmp_path, rule):
    private["data"]["scenes"]["sites"] = 2
    both = engines(private, EXACT, *rule, folder=tmp_path)
    assert_same(*(played(*side) for side in both), TOLERANCE)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_without_clipping_and_noise_a_step_on_all_units_is_a_plain_step(small, tmp_path, objective):
    """A plain step weighs rows by their tokens; with one token each, or pairs, it does not."""
    small["train"] |= {"rounds": 1, "lr": 0.1, "batch_size": 20, "optimizer": "sgd"}
    small["data"]["scenes"] |= {"sites": 2, "rows": 10}
    small["eval"] |= {"max_rows": 1}
    for engine, partition in engines(small, EXACT, f"objective.name={objective}", folder=tmp_path):
        plain = play(engine, partition)
        if objective == "sft":
            weight = engine.objective.weight
            by_row = {c: s.train for c, s in partition.splits.items()}
            features = engine.collator.features
            counts = {c: {weight(features(int(i))) for i in rows} for c, rows in by_row.items()}
            if any(len(kinds) > 1 for kinds in counts.values()):
                continue  # rows of unequal weights: the pairs below show the equality
        engine.plans = {
            client: dataclasses.replace(NO_NOISE, units=len(s.train), batch=len(s.train))
            for client, s in partition.splits.items()
        }
        engine.store = Kept(tmp_path)
        private = play(engine, partition)
        assert furthest(private.ends, plain.ends) < TOLERANCE
        assert private.losses == pytest.approx(plain.losses)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_stack_gives_every_units_gradient_as_autograd_does(private, tmp_path, family):
    private["model"] = {"name": families.folder(family), "device": "cpu"}
    private["data"]["scenes"] |= {"rows": 8, "sites": 2}
    (slow, _), (fast, _) = engines(private, EXACT, folder=tmp_path)
    adapter = {n: t + 0.01 * torch.randn(t.shape).to(t) for n, t in slow.adapter.items()}
    units = fast.units("site-0")[:4]
    stacked, losses = fast._gradients(units, adapter, lambda name: True)
    lora.write(slow.params, adapter)
    for p in slow.params.values():
        p.requires_grad_(True)
    for k, rows in enumerate(units):
        slow.model.zero_grad()
        terms = slow._terms(rows)
        loss = (terms.loss / terms.weight).mean()
        loss.backward()
        ours = torch.cat([stacked[n][k].flatten() for n in slow.params])
        theirs = torch.cat([p.grad.flatten() for p in slow.params.values()])
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm()
        assert float(losses[k]) == pytest.approx(loss.item(), rel=1e-10)


def test_a_units_gradient_has_at_most_the_clipping_norm(sides):
    settings, (_, (engine, partition)), folder = sides
    engine, _ = switched(engine, partition, settings, EXACT, folder=folder)
    unit = engine.units("site-0")[:1]
    for clip in (0.01, 1.0):
        total = {n: torch.zeros_like(t) for n, t in engine.adapter.items() if "lora_B" in n}
        engine._add(unit, engine.adapter, clip, total)
        norm = torch.cat([t.flatten() for t in total.values()]).norm()
        assert float(norm) == pytest.approx(clip)


def test_a_gradient_that_is_not_finite_adds_nothing(sides):
    settings, pair, folder = sides
    for engine, partition in pair:
        engine, _ = switched(engine, partition, settings, EXACT, folder=folder)
        broken = int(partition.splits["site-0"].train[0])
        terms, every = engine._terms, engine.units("site-0")

        def spoiled(rows, terms=terms, broken=broken):
            found = terms(rows)
            wrong = torch.tensor([int(i) == broken for i in rows])
            return dataclasses.replace(found, loss=torch.where(wrong, torch.nan, found.loss))

        client = Task(fedvlm.algorithms.base.Visit("site-0", 1.0, round=1), {}, True)
        plan = dataclasses.replace(NO_NOISE, units=len(every), batch=len(every), clip=1.0)
        results = []
        for units, change in ((every, spoiled), (every[1:], terms)):
            engine._units["site-0"], engine._terms = units, change
            engine.plans = {"site-0": plan, "site-1": plan}
            engine.plans["site-0"] = dataclasses.replace(plan, units=len(units), batch=len(units))
            (reply,) = engine.train([dataclasses.replace(client, down=dict(downloaded(engine)))])
            results.append(reply)
        del engine._terms
        engine._units.clear()
        scale = len(every) / len(every[1:])
        assert np.isfinite(results[0].loss)
        assert results[0].loss == pytest.approx(results[1].loss)
        assert scale > 1


def downloaded(engine):
    state = engine.algorithm.init(engine.adapter)
    return engine.algorithm.send(state, fedvlm.algorithms.base.Visit("site-0", 1.0, round=1))


def test_the_noise_has_the_deviation_of_the_plan(sides):
    """The largest part of 200,000 draws deviates by less than 1 % from what it should be."""
    settings, (_, (engine, partition)), folder = sides
    engine, _ = switched(engine, partition, settings, EXACT, folder=folder)
    engine.chance = System()
    plan = Plan(units=20, batch=4, noise=1.7, clip=0.3, delta=1e-3, budget=8.0)
    none, runs = torch.zeros(200_000, 1, dtype=torch.float64), Runs()
    runs.load([{"lora_B": none}], {"lora_B": none.device})
    engine._set_noisy(runs, {"lora_B": none}, plan)
    drawn = runs.trained["lora_B"].grad.numpy().ravel()
    assert drawn.std() == pytest.approx(1.7 * 0.3 / 4, rel=0.01)
    assert abs(drawn.mean()) < 5 * drawn.std() / np.sqrt(len(drawn))
    tail = np.mean(np.abs(drawn) > 2 * drawn.std())
    assert tail == pytest.approx(0.0455, abs=0.004), "it is not normal"


def test_samples_are_poisson_and_noise_is_the_systems(monkeypatch):
    sizes = [len(poisson(System(), 200, 0.1)) for _ in range(2000)]
    assert np.mean(sizes) == pytest.approx(20, abs=0.5)
    assert np.var(sizes) == pytest.approx(18, rel=0.2)
    asked = []
    monkeypatch.setattr(chances.os, "urandom", lambda n: asked.append(n) or b"\xff" * n)
    assert gaussian(System(), 3, 1.0).tolist() == pytest.approx([8.57167] * 2 + [0.0], abs=1e-4)
    assert asked == [16, 16]
    assert len(poisson(System(), 5, 1.0)) == 5, "a rate of 1 takes every unit"


def test_a_unit_gives_at_most_its_number_of_rows():
    rows = np.arange(10)
    found = [some(Seeded(k), rows, 3) for k in range(200)]
    assert {len(one) for one in found} == {3}
    assert np.mean(np.concatenate(found)) == pytest.approx(4.5, abs=0.5), "each row is as likely"
    assert some(Seeded(0), rows[:2], 3).tolist() == [0, 1]


def test_a_private_run_cannot_be_repeated_with_its_seed(private, tmp_path):
    private["data"]["scenes"]["sites"] = 2
    config = fedvlm.load_config(private, "train.rounds=1")
    ends = []
    for _ in range(2):
        engine, partition, _ = prepare(config, store=Kept(tmp_path))
        assert isinstance(engine.chance, System)
        ends.append(play(engine, partition).ends)
    assert furthest(*ends) > 1e-4


def test_an_algorithm_that_reads_validation_rows_is_refused_where_it_asks(sides):
    settings, ((engine, partition), _), folder = sides
    engine, _ = switched(engine, partition, settings, EXACT, folder=folder)
    with pytest.raises(FedVLMError, match="scores on validation rows, which have no noise"):
        engine._validated("site-0", [engine.adapter])
