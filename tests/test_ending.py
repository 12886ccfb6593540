"""The ending of a run: every algorithm's average over the rounds, and its local tuning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedvlm import ConfigError, simulate
from fedvlm.algorithms.base import Local, Sent, Train, Trained, Visit, step
from fedvlm.algorithms.ending import AVERAGE, EMA, ended, without
from fedvlm.algorithms.sharing import alternating
from fedvlm.algorithms.table import build
from fedvlm.config import load
from fedvlm.settings.method import AlgorithmConfig
from fedvlm.settings.train import TrainConfig
from fedvlm.tree import part
from toy import FEDAVG, INITIAL, LOCAL, A, B, clients, close


def visited(algorithm, local, *moves):
    """Runs a client's program: each stretch ends with all values equal to the next of ``moves``."""
    ends, asks, program = iter(moves), [], algorithm.work(local)
    ask = step(program)
    while not isinstance(ask, Sent):
        assert isinstance(ask, Train)
        asks.append(ask)
        value = next(ends)
        end = {n: torch.full_like(t, value) for n, t in ask.begin.items()}
        ask = step(program, Trained(end, {"A": 1.0, "B": 1.0}))
    return asks, ask


def at(round_, value, mine=None, final=False, steps=5):
    whole = {A: torch.full((2, 5), float(value)), B: torch.full((4, 2), float(value))}
    return Local(Visit("a", 1.0, 1.0, round_, final), whole, whole, mine or {}, steps)


def kept_after(algorithm, values):
    """The client's kept tensors when its model at the start of round ``t + 1`` is ``values[t]``."""
    mine = {}
    for round_, value in values.items():
        mine = visited(algorithm, at(round_ + 1, value, mine), 0.0)[1].keep
    return mine


def test_an_average_weighs_late_rounds_more_by_a_polynomial():
    algorithm = ended(FEDAVG, TrainConfig())
    mine = kept_after(algorithm, {0: 99.0, 1: 1.0, 2: 2.0, 3: 4.0})
    weights = [t * (t + 1) * (t + 2) for t in (1, 2, 3)]  # Shamir and Zhang, power 3
    wanted = sum(w * v for w, v in zip(weights, (1.0, 2.0, 4.0), strict=True)) / sum(weights)
    assert part(mine, AVERAGE)[A][0, 0].item() == pytest.approx(wanted), "the start has no part"


def test_an_exponential_average_moves_by_the_same_share_every_round():
    algorithm = ended(FEDAVG, TrainConfig(average="ema"))
    mine = kept_after(algorithm, {0: 99.0, 1: 1.0, 2: 2.0, 3: 4.0})
    second = 1 + EMA * (2 - 1)
    assert part(mine, AVERAGE)[B][0, 0].item() == pytest.approx(second + EMA * (4 - second))


@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_a_model_stands_for_the_rounds_since_the_visit_before(kind):
    """A client that misses rounds has the average of one that met its next model in each."""
    algorithm = ended(FEDAVG, TrainConfig(average=kind))
    missed = kept_after(algorithm, {0: 9.0, 1: 1.0, 4: 3.0})
    there = kept_after(algorithm, {0: 9.0, 1: 1.0, 2: 3.0, 3: 3.0, 4: 3.0})
    assert close(part(missed, AVERAGE), part(there, AVERAGE))


def test_the_final_model_is_the_average_and_nothing_is_sent_or_trained():
    algorithm = ended(FEDAVG, TrainConfig())
    mine = kept_after(algorithm, {0: 9.0, 1: 1.0, 2: 2.0})
    asks, sent = visited(algorithm, at(4, 4.0, mine, final=True, steps=0))
    assert not asks
    assert not sent.up
    model = algorithm.model({}, at(4, 8.0).down, sent.keep)
    expected = (6 * 1 + 24 * 2 + 60 * 4) / 90
    assert torch.allclose(model[A], torch.full((2, 5), expected))


@pytest.mark.parametrize(
    ("average", "wanted"), [("mean", (4 + 1 + 2 + 3 + 4 + 5) / 6), ("none", 5.0)]
)
def test_tuning_begins_at_the_average_and_ends_with_the_mean_of_its_points(average, wanted):
    algorithm = ended(FEDAVG, TrainConfig(finish_steps=7, average=average))
    asks, sent = visited(algorithm, at(2, 4.0, final=True, steps=7), 1, 2, 3, 4, 5)
    assert [ask.steps for ask in asks] == [2, 2, 1, 1, 1]
    assert [ask.resume for ask in asks] == [False, True, True, True, True]
    assert asks[0].begin[A][0, 0] == 4.0
    model = algorithm.model({}, at(2, 9.0).down, sent.keep)
    assert torch.allclose(model[B], torch.full((4, 2), wanted))


def test_the_algorithm_does_not_see_the_tensors_of_the_ending():
    seen = []

    def work(local):
        seen.append(set(local.mine))
        return (yield from LOCAL.work(local))

    algorithm = ended(replace(LOCAL, work=work), TrainConfig())
    run = simulate(algorithm, clients(2), INITIAL, rounds=3)
    assert set().union(*seen) <= {A, B}
    assert {A, B} < set(run.kept["c0"])
    assert set(without(run.kept["c0"])) == {A, B}
    before = run.model("c0")
    run.finish()
    assert not close(before, run.model("c0")), "the average differs from the last model"


def test_the_rounds_themselves_are_those_without_an_ending():
    plain = simulate(FEDAVG, clients(), INITIAL, rounds=4)
    run = simulate(ended(FEDAVG, TrainConfig()), clients(), INITIAL, rounds=4)
    assert close(plain.state, run.state, atol=0)
    assert close(plain.model("c1"), run.model("c1"), atol=0)


def test_an_average_holds_both_factors_where_rounds_alternate():
    run = simulate(ended(alternating(), TrainConfig()), clients(), INITIAL)
    states = [run.run().state for _ in range(4)]
    weights = [t * (t + 1) * (t + 2) for t in range(1, 5)]
    wanted = {
        n: sum(w * s[n] for w, s in zip(weights, states, strict=True)) / sum(weights)
        for n in INITIAL
    }
    assert close(run.finish().model("c0"), wanted)


def test_without_average_and_tuning_an_algorithm_is_unchanged():
    assert ended(FEDAVG, TrainConfig(average="none")) is FEDAVG
    own = build(AlgorithmConfig(name="plora"), None, TrainConfig(average="none"))
    assert not own.final


def test_rounds_of_few_clients_end_with_tuning_and_other_rounds_with_the_average_alone():
    assert TrainConfig().tuning == 0
    few = TrainConfig(clients_per_round=3)
    assert few.tuning == 20
    assert TrainConfig(clients_per_round=3, finish_steps=0).tuning == 0


def test_pooled_rows_take_the_steps_of_all_clients_and_have_no_local_tuning():
    from fedvlm.data.pool import as_long

    config = load({"train": {"rounds": 10, "local_steps": 5, "finish_steps": 20}})
    pooled = as_long(config, 4).train
    assert pooled.rounds * pooled.local_steps == 4 * (10 * 5 + 20)
    assert pooled.tuning == 0


def test_an_unknown_average_is_refused():
    with pytest.raises(ConfigError, match="average"):
        load({"train": {"average": "median"}})
