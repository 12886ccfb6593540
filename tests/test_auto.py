"""``auto``: the votes of the clients, and the B with which they begin."""

from __future__ import annotations

import itertools

import pytest
import torch

from fedvlm import simulate
from fedvlm.algorithms.auto import CHOICE, DOUBTS, EVERY, FIRST, OWN, auto
from fedvlm.algorithms.base import Local, Score, Sent, Train, Trained, Validation, Visit, step
from fedvlm.algorithms.sharing import sharing
from fedvlm.tree import part, plain
from toy import FEDAVG, INITIAL, A, B, clients, close


def down(a, b, choice):
    whole = {A: torch.full((2, 5), float(a)), B: torch.full((4, 2), float(b))}
    return {**whole, CHOICE: torch.tensor(choice)}


def round_of(number, sent_down, mine, doubts=()):
    """A client's round; returns its requests and what it sent. Training adds 10 to each value."""
    begin = auto().model(INITIAL, sent_down, mine)
    program = auto().work(Local(Visit("a", 1.0, 1.0, number), begin, sent_down, mine, 5))
    asks, ask = [], step(program)
    while not isinstance(ask, Sent):
        asks.append(ask)
        if isinstance(ask, Score):
            ask = step(program, tuple(Validation(loss=0.0, doubt=d) for d in doubts))
        else:
            ask = step(program, Trained({n: t + 10 for n, t in ask.begin.items()}, {}))
    return asks, ask


@pytest.mark.parametrize("choice", range(len(OWN)))
def test_a_client_begins_with_the_chosen_b_and_with_the_servers_a(choice):
    mine = round_of(1, down(0, 0, choice), {})[1].keep
    assert mine.keys() == {B}, "A is not kept"
    asks, sent = round_of(3, down(1, 2, choice), mine)
    assert [type(ask) for ask in asks] == [Train], "no vote in this round"
    assert asks[0].begin[A][0, 0] == 1
    assert asks[0].begin[B][0, 0] == 2 + OWN[choice] * (10 - 2)
    assert sent.up.keys() == {A, B}
    new = auto().model(INITIAL, down(0, 0, choice), {})
    assert new[B][0, 0] == 0, "a client without an own B has the server's"


def test_clients_vote_every_few_rounds_and_the_rounds_between_cost_nothing():
    mine, voted = {}, []
    for number in range(1, 10):
        asks, sent = round_of(number, down(0, 0, 2), mine, (0.1, 0.2, 0.3))
        mine = sent.keep
        voted += [number] * any(isinstance(ask, Score) for ask in asks)
    assert voted == [FIRST, FIRST + EVERY, FIRST + 2 * EVERY]


def test_a_vote_holds_the_doubt_of_each_candidate_and_an_abstention_counts_nothing():
    mine = round_of(1, down(0, 0, 2), {})[1].keep
    asks, sent = round_of(FIRST, down(1, 2, 2), mine, (0.25, 0.5, 0.75))
    assert [tree[B][0, 0].item() for tree in asks[0].trees] == [2.0, 6.0, 10.0]
    assert {n: t.item() for n, t in part(sent.up, DOUBTS).items()} == {
        "0": 0.25,
        "1": 0.5,
        "2": 0.75,
        "3": 1.0,
    }
    for nothing in ({}, mine):  # no own B yet, or no validation rows
        vote = part(round_of(FIRST, down(1, 2, 2), nothing)[1].up, DOUBTS)
        assert vote["3"] == 0
        assert vote.keys() == {"0", "1", "2", "3"}, "the form of an upload does not tell"


def test_the_candidate_of_the_least_mean_doubt_is_chosen_and_kept_without_votes():
    algorithm = auto()
    state = algorithm.init(INITIAL)
    assert OWN[int(state[CHOICE])] == 1.0

    def after(state, doubts):
        mean = {**INITIAL, **{f"{DOUBTS}/{k}": torch.tensor(d) for k, d in enumerate(doubts)}}
        mean[f"{DOUBTS}/3"] = torch.tensor(float(any(doubts)))
        mean = dict(reversed(mean.items()))  # a message from the wire has no order
        return {**state, **algorithm.server.update(state, mean, 2)}

    state = after(state, (0.5, 0.2, 0.3))
    assert int(state[CHOICE]) == 1
    assert int(after(state, (0.0, 0.0, 0.0))[CHOICE]) == 1
    assert int({**state, **algorithm.server.update(state, INITIAL, 3)}[CHOICE]) == 1


def voters(likes):
    """Validation of clients that doubt a candidate by its distance from the share they like."""

    def one():
        count = itertools.count()
        return lambda tree: Validation(0.0, abs(likes - OWN[next(count) % len(OWN)]))

    return {c: one() for c in clients()}


def test_where_the_clients_vote_for_their_own_b_the_rounds_are_those_of_fedsa():
    run = simulate(auto(), clients(), INITIAL, rounds=9, validation=voters(1.0))
    fedsa = simulate(sharing({"": "A"}), clients(), INITIAL, rounds=9)
    assert all(close(run.model(c), fedsa.model(c)) for c in clients())


def test_where_the_clients_vote_for_the_servers_b_the_next_rounds_are_those_of_fedavg():
    run = simulate(auto(), clients(), INITIAL, rounds=FIRST, validation=voters(0.0))
    assert OWN[int(run.state[CHOICE])] == 0.0
    fedavg = simulate(FEDAVG, clients(), plain(run.state), rounds=7)
    assert close(plain(run.run(7).state), fedavg.state)
    assert all(close(run.model(c), fedavg.model(c)) for c in clients())
