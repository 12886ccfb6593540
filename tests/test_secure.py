"""Secure aggregation in whole runs: the same mean for every algorithm, and refusals by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import fedvlm
from fedvlm.algorithms.base import Gathered, Visit
from fedvlm.algorithms.sharing import sharing
from fedvlm.algorithms.table import TABLE, of_run, spare_ranks
from fedvlm.cli.live import describe
from fedvlm.engines.blinded import Blinded
from fedvlm.engines.summand import Summand, Summed
from fedvlm.engines.wire import Reply
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.planning.footprint import Exchanges
from fedvlm.rounds import secure
from fedvlm.rounds.schedule import plan
from fedvlm.store import files
from fedvlm.store.run import Store
from formulas import Formulas, drive
from toy import FEDAVG, INITIAL, A, B, clients
from toy import adapter as widened

pytestmark = pytest.mark.usefixtures("no_pictures")


def settings(name, **sections):
    """Three rounds of three clients whose loss is a formula."""
    tree = {"algorithm": {"name": name}, "lora": {"rank": 2}, "train": {"rounds": 3}}
    if name == "scaffold":
        tree["train"]["optimizer"] = "sgd"
    if name == "share":
        tree["algorithm"]["share"] = {"": "AB"}
    return tree | sections


SECURE = {"wire": {"secure": True, "bound": 64.0}}
MEAN = {"aggregate": {"kind": "mean"}}
SUMS = [n for n, e in TABLE.items() if not e.pools and n not in ("share", "hetlora")]
SUMS = [n for n in SUMS if not isinstance(of_run(fedvlm.load_config(settings(n))).server, Gathered)]
OTHERS = sorted(TABLE.keys() - set(SUMS) - {"share", "hetlora"})


def ended(tmp_path, name, **sections):
    """The server's state after a run, and the lines of metrics."""
    folder = tmp_path / ("secure" if "wire" in sections else "plain")
    config = fedvlm.load_config(settings(name, **sections), f"output={folder}")
    drive(config, spare=spare_ranks(name, config.lora))
    return Store(folder).server(), files.read_lines(folder / "metrics.jsonl")


@pytest.mark.parametrize("name", SUMS)
def test_a_secure_sum_gives_the_plain_mean(tmp_path, name):
    plain, _ = ended(tmp_path, name, **MEAN)
    found, lines = ended(tmp_path, name, **SECURE)
    assert found.keys() == plain.keys()
    for key, tensor in plain.items():
        assert torch.allclose(found[key], tensor, atol=2e-5), key
        assert found[key].dtype == tensor.dtype
    told = [line["secure"] for line in lines[1:]]
    assert all(one["clients"] == ["c0", "c1", "c2"] for one in told)
    assert all(one["loss"] == pytest.approx(1.0, abs=1e-4) for one in told)
    assert all(line["train_loss"] == {} and "missing" not in line for line in lines[1:])
    assert [line["bytes_up"] for line in lines[1:]] == planned_bytes(name)


def planned_bytes(name):
    """The bytes by round and client that a dry run shows."""
    config, names = fedvlm.load_config(settings(name, **SECURE)), ("c0", "c1", "c2")
    algorithm = of_run(config)
    adapter = widened(2 + spare_ranks(name, config.lora))
    shapes = {n: t.to("meta") for n, t in adapter.items()}
    exchanges = Exchanges(config, algorithm, shapes, names)
    rounds = plan(config, algorithm, names)
    weights = dict.fromkeys(names, 1.0)
    return [
        {client: exchanges.of(visit, 1).up for client, visit in round_.visits(weights).items()}
        for round_ in rounds
    ]


@pytest.mark.parametrize("name", OTHERS)
def test_an_algorithm_without_a_mean_is_refused_by_name_before_round_1(tmp_path, name):
    with pytest.raises(ConfigError, match=f"algorithm.name={name.replace('+', '.')}"):
        ended(tmp_path, name, **SECURE)
    assert not (tmp_path / "secure" / "metrics.jsonl").exists()


def test_the_table_has_both_kinds():
    assert len(SUMS) >= 20
    assert {"similar", "clustered", "fedlease", "fedtree", "centralized"} <= set(OTHERS)


@pytest.mark.parametrize("kind", ["int8", "topk", "bf16"])
def test_compression_is_refused_by_name(kind):
    with pytest.raises(ConfigError, match=f"secure needs compress=none .got {kind}"):
        fedvlm.load_config({"wire": {"secure": True, "compress": kind}})


@pytest.mark.parametrize("kind", ["norm", "trimmed"])
def test_an_aggregate_of_single_uploads_is_refused_by_name(kind):
    with pytest.raises(ConfigError, match=f"aggregate.kind={kind} compares single uploads"):
        fedvlm.load_config({"wire": {"secure": True}, "aggregate": {"kind": kind}})


def test_the_aggregate_becomes_the_mean_and_the_run_says_so(capsys):
    config = fedvlm.load_config({}, "wire.secure=true")
    assert config.aggregate.kind == "mean"
    assert fedvlm.load_config(config) == config
    assert fedvlm.load_config({}).aggregate.kind == "norm"
    from fedvlm.cli.live import Plain

    with Plain().started(config):
        pass
    assert "aggregate.kind=mean" in capsys.readouterr().out


def test_unequal_ranks_are_refused_by_name():
    config = fedvlm.load_config({"wire": {"secure": True}, "lora": {"ranks": {"a": 2}}})
    with pytest.raises(ConfigError, match=r"lora.ranks gives them different"):
        secure.check(config, of_run(config))


def test_privacy_of_whole_clients_is_refused_by_name():
    tree = {"wire": {"secure": True}, "privacy": {"unit": "client", "epsilon": 8, "delta": 1e-3}}
    config = fedvlm.load_config(tree)
    with pytest.raises(ConfigError, match=r"privacy.unit=client clips single uploads"):
        secure.check(config, of_run(config))


@pytest.mark.parametrize("clients", [1, 2, 65])
def test_too_few_or_too_many_clients_are_refused(clients):
    config = fedvlm.load_config({"wire": {"secure": True}})
    with pytest.raises(ConfigError, match=f"3 to 64 clients in a round, but there are {clients}"):
        secure.check(config, of_run(config), clients)


def test_an_algorithm_with_a_download_for_each_client_is_refused(tmp_path):
    told = sharing({"": "AB"})

    def send(state, visit):
        return {**state, "who": torch.tensor(float(len(visit.client)))}

    from dataclasses import replace

    config = fedvlm.load_config(settings("lora", **SECURE))
    engine = Formulas(config, Store(tmp_path))
    engine.algorithm = replace(told, send=send)
    weights = {"a": 1.0, "bb": 1.0, "ccc": 1.0}
    with pytest.raises(ConfigError, match=r"algorithm.name=lora sends different ones"):
        secure.secured(engine, config, weights, INITIAL)


def test_a_bound_without_a_sum_is_refused():
    with pytest.raises(ConfigError, match="bound=8 has no meaning without secure"):
        fedvlm.load_config({"wire": {"bound": 8.0}})


# -- the values in a sum


def summand(**settings):
    return Summand(FEDAVG, INITIAL, Visit("a", 10.0, round=1), INITIAL, **settings)


def test_a_client_with_more_examples_than_the_unit_has_weight_1():
    values, weight = summand().values(INITIAL, Visit("a", 50.0), 10.0, 2.0)
    assert weight == 1.0
    assert values[-1] == 2.0 / 64
    assert not values[:-1].any()


def test_a_loss_does_not_leave_its_range():
    for loss in (1e9, -1e9):
        values, _ = summand().values(INITIAL, Visit("a", 1.0), 10.0, loss)
        assert abs(values[-1]) == 1.0


def test_the_norm_is_checked_at_the_client_and_on_the_mean():
    one = summand(max_norm=1.0)
    far = {**INITIAL, B: INITIAL[B] + 1.0}
    with pytest.raises(FedVLMError, match=r"by a norm above wire.max_norm=1; the site.s log"):
        one.values(far, Visit("a", 1.0), 1.0, 0.0)
    values = np.zeros(one.size)
    values[0] = 1.5
    with pytest.raises(ValueError, match=r"the mean differs from the download by a norm of 1.5"):
        one.mean(values, 1.0)
    assert one.mean(values, 2.0)[0][A].shape == INITIAL[A].shape


# -- rounds without a sum


class Broken(Formulas):
    """An engine of which some clients never answer in round 2."""

    def train(self, tasks):
        for reply in super().train(tasks):
            if tasks[0].round != 2 or reply.client == "c0":
                yield reply


def test_a_void_round_changes_nothing_and_the_next_one_has_a_sum(tmp_path, monkeypatch):
    monkeypatch.setattr("formulas.Formulas", Broken)
    _, lines = ended(tmp_path, "lora", **SECURE)
    told = [line["secure"] for line in lines[1:]]
    assert told[0]["clients"] == told[2]["clients"] == ["c0", "c1", "c2"]
    assert "1 sites have uploaded, and at least 3 must" in told[1]["void"]
    assert lines[2]["missing"] == ["c1", "c2"]
    config = fedvlm.load_config(settings("lora"))
    assert "void: the secure sum of round 2" in describe(lines[2], config)
    assert "3 clients in the secure sum, loss 1.000" in describe(lines[3], config)


def test_a_run_ends_after_three_void_rounds():
    voids = secure.Voids()
    for line in ({"secure": {"void": "x"}}, {"secure": {"void": "x"}}, {"secure": {"clients": []}}):
        voids.after(line)
    voids.after({"secure": {"void": "x"}})
    voids.after({"secure": {"void": "x"}})
    with pytest.raises(FedVLMError, match="3 rounds in a row had no secure sum; the last reason"):
        voids.after({"secure": {"void": "too few"}})


def test_an_overflow_names_the_setting(tmp_path, monkeypatch):
    far = {c: (w, lambda name, now: now - 1e3) for c, (w, _) in clients().items()}
    monkeypatch.setattr("formulas.clients", lambda: far)
    with pytest.raises(FedVLMError, match=r"4 is the largest .wire.bound.: raise wire.bound"):
        ended(tmp_path, "lora", wire={"secure": True})


def test_the_round_loop_sees_no_upload_and_no_loss(tmp_path):
    config = fedvlm.load_config(settings("lora", **SECURE))
    engine = Blinded(Formulas(config, Store(tmp_path)), config)
    seen = []

    class Watched:
        def __getattr__(self, name):
            return getattr(engine, name)

        def train(self, tasks):
            for reply in engine.train(tasks):
                seen.append(reply)
                yield reply

    from fedvlm.engines.wire import Forms
    from fedvlm.rounds.federate import one_round
    from fedvlm.rounds.progress import Quiet
    from fedvlm.rounds.schedule import Round

    forms = Forms(engine.algorithm, engine.adapter)
    weights = {"c0": 1.0, "c1": 2.0, "c2": 3.0}
    round_ = Round(1, ("c0", "c1", "c2"), evaluate=False)
    args = weights, engine.adapter, (), Quiet(), forms
    one_round(round_, Watched(), *args, summed=True)
    assert [type(one) for one in seen] == [Reply] * 3 + [Summed]
    assert all(not one.upload and np.isnan(one.loss) for one in seen[:3])


def test_a_large_upload_takes_as_many_bytes_as_single_precision(tmp_path):
    config = fedvlm.load_config(settings("lora", **SECURE))
    engine = Blinded(Formulas(config, Store(tmp_path)), config)
    large = {n: torch.zeros(500, 500) for n in (A, B)}
    engine.adapter = large
    engine.algorithm = FEDAVG

    class Fixed(Formulas):
        def __init__(self):
            self.adapter, self.algorithm, self.stages = large, FEDAVG, ()

        def train(self, tasks):
            for task in tasks:
                yield Reply(task.client, large, 1.0, 1.0)

    engine.engine = Fixed()
    from fedvlm.engines.wire import Task

    tasks = [Task(Visit(f"c{k}", 1.0, round=1), large) for k in range(10)]
    *_, summed = engine.train(tasks)
    plain = 4 * 2 * 500 * 500
    assert max(summed.bytes_up.values()) <= 1.01 * plain
    assert json.dumps(list(summed.clients)) == json.dumps([f"c{k}" for k in range(10)])
