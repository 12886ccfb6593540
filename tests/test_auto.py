"""Local tuning at the end, and ``auto``: what clients ask for, choose and end with."""

from __future__ import annotations

import pytest
import torch

from fedvlm import simulate
from fedvlm.algorithms.auto import auto
from fedvlm.algorithms.base import (
    NOBODY,
    Local,
    Score,
    Sent,
    Train,
    Trained,
    Validation,
    Visit,
    step,
)
from fedvlm.algorithms.server import late_mean
from fedvlm.algorithms.sharing import alternating
from fedvlm.algorithms.tuning import stopped, tuned
from fedvlm.tree import part
from toy import FEDAVG, INITIAL, A, B, clients, close


def told(losses):
    """Validation by a look-up: the adapter's first value of A -> its loss, and how often wrong."""
    return lambda tree: Validation(*losses[round(tree[A][0, 0].item())])


def played(algorithm, local, *, moves=(), scores=None):
    """Runs a client's program: each stretch ends with A all equal to the next of ``moves``.

    Returns:
        Its requests, and what it sent.
    """
    ends, asks, program = iter(moves), [], algorithm.work(local)
    ask = step(program)
    while not isinstance(ask, Sent):
        asks.append(ask)
        if isinstance(ask, Score):
            ask = step(program, tuple(map(scores, ask.trees)) if scores else ())
        else:
            value = next(ends)
            end = {n: torch.full_like(t, value) for n, t in ask.begin.items()}
            ask = step(program, Trained(end, {"A": 1.0, "B": 1.0}))
    return asks, ask


def filled(value):
    return {A: torch.full((2, 5), float(value))}


LAST = Visit("a", 1.0, round=9, final=True)


def test_tuning_that_stops_early_keeps_the_adapter_of_the_lowest_validation_loss():
    algorithm = stopped(FEDAVG, steps=7, checks=3)
    local = Local(LAST, filled(0), {}, {}, 5)
    for losses, best in (
        ((3.0, 1.0, 2.0, 4.0), 1),
        ((1.0, 2.0, 3.0, 4.0), 0),
        ((4.0, 3.0, 2.0, 1.0), 3),
        ((), 3),
    ):
        scores = told([(loss, 0.5) for loss in losses]) if losses else None
        asks, sent = played(algorithm, local, moves=(1, 2, 3), scores=scores)
        assert [ask.steps for ask in asks if isinstance(ask, Train)] == [3, 2, 2]
        assert not any(ask.resume for ask in asks if isinstance(ask, Train))
        assert not sent.up
        assert sent.keep[A][0, 0] == best


def test_auto_ends_with_the_best_mixture_of_the_mean_over_its_tuning_and_the_servers_mean():
    algorithm = auto(steps=9, checks=3)
    state = algorithm.init({A: torch.zeros(2, 5), B: torch.zeros(7, 2)})
    for number, value in enumerate((4.0, 8.0), 1):
        mean = {A: torch.full((2, 5), value), B: torch.full((7, 2), -value)}
        state = {**state, **algorithm.server.update(state, mean, number)}
    weight = (2 - 1) / (2 + 3)  # of the first of two rounds, see Shamir and Zhang
    late = weight * 4 + (1 - weight) * 8
    down = algorithm.send(state, LAST)
    assert torch.allclose(down[A], torch.full((2, 5), late))
    mine = {A: torch.full((2, 5), 0.0), B: torch.full((7, 2), 0.0)}
    for best in range(5):
        merit = iter([*[0.0, 1.0, 1.0, 1.0, 1.0], *[float(k != best) for k in range(5)]])
        local = Local(LAST, algorithm.model({}, down, mine), down, mine, 5)
        moves = (6.0, 0.0, 2.0)
        asks, sent = played(
            algorithm,
            local,
            moves=moves,
            scores=lambda tree, merit=merit: Validation(next(merit), 0.0),
        )
        kinds = [type(ask) for ask in asks]
        assert kinds == [Score, Train, Train, Train, Score], "it chooses, tunes, and chooses"
        assert [ask.steps for ask in asks[1:4]] == [3, 3, 3]
        assert [ask.resume for ask in asks[1:4]] == [False, True, True]
        begun = asks[1].begin[A][0, 0].item()
        assert begun == pytest.approx(late), "the first mixture: the download"
        tuned_mean = (late + 6 + 0 + 2) / 4, (-late + 6 + 0 + 2) / 4
        tried = [(t[A][0, 0].item(), t[B][0, 0].item()) for t in asks[4].trees]
        half = (late + tuned_mean[0]) / 2, (-late + tuned_mean[1]) / 2
        wanted = [(late, -late), (tuned_mean[0], -late), (late, tuned_mean[1]), half, tuned_mean]
        assert torch.allclose(torch.tensor(tried), torch.tensor(wanted))
        assert not sent.up
        model = algorithm.model({}, down, sent.keep)
        assert all(torch.equal(t, asks[4].trees[best][n]) for n, t in model.items())


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_the_mean_of_the_rounds_weighs_them_by_a_polynomial(rounds):
    algorithm = late_mean(tuned(FEDAVG, 1), power=1)
    state = algorithm.init({B: torch.tensor([[9.0]])})
    for n in range(1, rounds + 1):
        changes = algorithm.server.update(state, {B: torch.tensor([[float(n)]])}, n)
        state = {**state, **changes}
    weights = range(1, rounds + 1)  # with power 1, exactly the number of the round
    late = sum(n * w for n, w in zip(range(1, rounds + 1), weights, strict=True)) / sum(weights)
    assert algorithm.send(state, LAST)[B].item() == pytest.approx(late)
    assert algorithm.send(state, NOBODY)[B].item() == rounds


def test_the_late_mean_is_of_every_factor_where_rounds_alternate():
    """RoLoRA sends B in odd rounds and A in even ones; the mean has both."""
    run = simulate(late_mean(tuned(alternating(), 1)), clients(), INITIAL)
    states = [run.run().state for _ in range(4)]
    late = part(run.state, "late")
    assert not close(late, INITIAL), "both factors have moved"
    assert all(not torch.equal(late[n], INITIAL[n]) for n in (A, B))
    between = [torch.stack([s[n] for s in states]) for n in (A, B)]
    for n, seen in zip((A, B), between, strict=True):
        assert (late[n] >= seen.amin(0) - 1e-6).all()
        assert (late[n] <= seen.amax(0) + 1e-6).all()


def test_auto_keeps_what_is_wrong_less_often_where_a_client_had_no_factors_of_its_own():
    """Of the download, and the mean over the second half of its tuning."""
    algorithm = auto(steps=9, checks=3)
    down = algorithm.send({f"late/{A}": torch.full((2, 5), 7.0)}, LAST)
    local = Local(LAST, algorithm.model({}, down, {}), down, {}, 5)
    for scores, kept in (
        (None, 1),
        ({7: (0.1, 0.5), 1: (9.0, 0.4)}, 1),
        ({7: (9.0, 0.5), 1: (0.1, 0.6)}, 7),
        ({7: (0.2, 0.5), 1: (0.1, 0.5)}, 1),
    ):
        asks, sent = played(algorithm, local, moves=(6, 0, 2), scores=scores and told(scores))
        tried = asks[-1].trees
        assert [t[A][0, 0] for t in tried] == [7, (0 + 2) / 2]
        assert algorithm.model({}, down, sent.keep)[A][0, 0] == kept


def test_auto_chooses_in_a_clients_second_round_and_in_every_third_from_then_on():
    algorithm = auto(steps=9, checks=3)
    down, mine, chosen = algorithm.send(filled(10), Visit("a", 1.0)), {}, []
    for number in range(1, 9):
        local = Local(Visit("a", 1.0, round=number), algorithm.model({}, down, mine), down, mine, 5)
        scores = told({10: (5.0, 0), 2: (1.0, 0), 6: (3.0, 0)})  # the own A is the best
        asks, sent = played(algorithm, local, moves=(2,), scores=scores)
        mine = sent.keep
        chosen.append(number if isinstance(asks[0], Score) else 0)
        begun = asks[-1].begin[A][0, 0]
        assert begun == (10 if number == 1 else 2), "the server's, then the own A"
    assert chosen == [0, 2, 0, 0, 5, 0, 0, 8]
    local = Local(LAST, algorithm.model({}, filled(10), mine), filled(10), mine, 5)
    asks, _ = played(algorithm, local, moves=(2, 2, 2), scores=scores)
    assert isinstance(asks[0], Score), "before it tunes it always chooses"
    assert len(asks[0].trees) == 5


def test_autos_model_is_what_it_chose_and_nothing_is_chosen_while_it_is_scored():
    algorithm = auto(steps=9, checks=3)
    down, mine = (
        filled(10),
        {**filled(2), "chosen/start": torch.tensor(1), "chosen/rounds": torch.tensor(3)},
    )
    assert algorithm.model({}, down, mine)[A][0, 0] == 2
    assert algorithm.model({}, down, {**mine, "chosen/start": torch.tensor(0)})[A][0, 0] == 10


def test_auto_begins_at_the_servers_factors_where_less_than_half_take_part():
    algorithm = auto(steps=9, checks=3)
    own, down = filled(2), filled(10)
    for share, options in ((1.0, (10, 2, 10, 6, 2)), (0.5, (10, 2, 10, 6, 2)), (0.4, ())):
        visit = Visit("a", 1.0, share, 3)
        local = Local(visit, algorithm.model({}, down, own), down, own, 5)
        asks, sent = played(algorithm, local, moves=(5,))
        tried = [ask.trees for ask in asks if isinstance(ask, Score)]
        assert tuple(t[A][0, 0] for trees in tried for t in trees) == options
        assert asks[-1].begin[A][0, 0] == (6 if options else 10)
        assert sent.up[A][0, 0] == 5
        assert sent.keep == (sent.up if options else {})


def test_clients_of_a_round_are_sent_the_same_tensors_by_auto():
    """So that a message is written once, whatever the number of clients."""
    algorithm, state = auto(steps=9, checks=3), filled(1)
    one, other = (algorithm.send(state, Visit(name, 1.0, 0.3)) for name in "ab")
    assert one.keys() == other.keys() == {A}
    assert all(one[n] is t for n, t in other.items())
