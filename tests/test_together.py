"""Programs of clients with different requests: both engines, and the groups that train."""

from __future__ import annotations

import weakref

import pytest
import torch

import fedvlm
from fedvlm.algorithms.base import Algorithm, Averaged, Local, Score, Sent, Term, Train, Visit
from fedvlm.engines import cohort, stacked, together
from fedvlm.engines.cohort import CohortEngine
from fedvlm.engines.wire import Forms, Task
from fedvlm.tree import factor
from pair import EXACT, TOLERANCE, Kept, prepared, switched


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Both engines, prepared once."""
    return prepared(tmp_path_factory.mktemp("pair"))


def given(engine, work, folder):
    """The engine with an algorithm whose clients run ``work``."""
    engine.algorithm = Algorithm(
        init=lambda initial: {},
        send=lambda state, visit: {},
        model=lambda initial, down, mine: {**initial, **mine},
        work=work,
        server=Averaged(lambda state, mean, round: {}),
    )
    engine.forms = Forms(engine.algorithm, engine.adapter)
    engine.stages, engine.store = (), Kept(folder)
    return engine


def of(letter):
    return lambda name: factor(name) == letter


def unlike(local: Local):
    """A program that differs by client: factors, lengths, and scores in between."""
    number = int(local.visit.client[-1])
    now, path = yield Train(local.begin, of("B"), 2 + number)
    assert path["B"] > 0
    if number != 1:
        found = yield Score([local.begin, now])
        assert len(found) == 2
        now, _ = yield Train(now, of("A"), 0 if number == 2 else 1)
    now, _ = yield Train(now, of("B"), 1, resume=number == 1)
    last, _ = yield Train(now, steps=2)
    end, _ = yield Train(last, steps=1, resume=True)
    return Sent({}, end)


def test_programs_that_ask_for_different_things_train_the_same_adapters(pair):
    settings, sides, folder = pair
    for optimizer in ("adamw", "sgd"):
        ends = []
        for engine, partition in sides:
            switched(
                engine, partition, settings, EXACT, f"train.optimizer={optimizer}", folder=folder
            )
            given(engine, unlike, folder)
            tasks = [Task(Visit(c, 1.0, round=1), {}, True) for c in partition.clients]
            replies = list(engine.train(tasks))
            assert all(reply.loss > 0 for reply in replies)
            ends.append(dict(engine.store.states))
        reference, cohort = ends
        for client, tree in reference.items():
            assert all((cohort[client][n] - t).abs().max() < TOLERANCE for n, t in tree.items())


def test_clients_that_ask_for_the_same_train_in_one_go(pair, monkeypatch):
    settings, sides, folder = pair
    engine, partition = switched(*sides[1], settings, EXACT, folder=folder)
    groups, train = [], CohortEngine._train

    def seen(self, group):
        groups.append([member.task.client for member in group])
        return train(self, group)

    monkeypatch.setattr(CohortEngine, "_train", seen)
    given(engine, unlike, folder)
    list(engine.train([Task(Visit(c, 1.0, round=1), {}) for c in partition.clients]))
    zero, one, two = partition.clients
    assert groups[0] == [zero, one, two], "the first stretches are of one kind"
    assert all((zero in group) == (two in group) for group in groups), "both train together"
    assert sum(map(len, groups)) == 5 + 4 + 5, "each client has all of its stretches"


@pytest.mark.parametrize("resume", [False, True])
def test_a_stretch_that_resumes_continues_with_the_optimizer_of_the_one_before(pair, resume):
    """With the optimizer resumed, two stretches of two steps equal one stretch of four."""
    settings, sides, folder = pair

    def halves(local: Local):
        now, _ = yield Train(local.begin, steps=2)
        validated = yield Score([now])
        assert validated, "scores in between change nothing"
        end, _ = yield Train(now, steps=2, resume=resume)
        return Sent({}, end)

    made, found = [], []
    for engine, partition in sides:
        switched(engine, partition, settings, EXACT, folder=folder)
        given(engine, halves, folder)
        sessions, train = [], engine._train

        def watched(group, train=train, sessions=sessions):
            outcomes, session, values = train(group)
            sessions.append(getattr(session, "optimizer", session))
            return outcomes, session, values

        engine._train = watched
        list(engine.train([Task(Visit(c, 1.0, round=1), {}) for c in partition.clients]))
        del engine._train
        made.append(sessions)
        found.append(dict(engine.store.states))
    for sessions in made:
        steps = {float(state["step"]) for state in sessions[-1].state.values()}
        assert steps == ({4.0} if resume else {2.0})
    for client, tree in found[0].items():
        assert all((found[1][client][n] - t).abs().max() < TOLERANCE for n, t in tree.items())


def test_a_request_that_trains_nothing_is_refused(pair):
    settings, sides, folder = pair

    def nothing(local: Local):
        end, _ = yield Train(local.begin, lambda name: False)
        return Sent({}, end)

    for engine, partition in sides:
        switched(engine, partition, settings, EXACT, folder=folder)
        given(engine, nothing, folder)
        with pytest.raises(fedvlm.FedVLMError, match="training of no factor"):
            list(engine.train([Task(Visit(partition.clients[0], 1.0, round=1), {})]))


def by_client(letter):
    """Programs that add terms on different factors, or none, and idle in a resumed stretch."""

    def work(local: Local):
        number = int(local.visit.client[-1])
        names = [n for n in local.begin if number == 0 or (number == 1 and factor(n) == letter)]
        term = Term({n: 0.1 + 0 * local.begin[n] for n in names}, rate=0.7)
        now, _ = yield Train(local.begin, steps=2, terms=(term,))
        now, _ = yield Train(dict(reversed(now.items())), steps=2 if number else 0, resume=True)
        end, _ = yield Train(now, steps=2, resume=True)
        return Sent({}, end)

    return work


def test_terms_and_idle_stretches_are_each_clients_own(pair):
    settings, sides, folder = pair
    ends = []
    for engine, partition in sides:
        switched(engine, partition, settings, EXACT, folder=folder)
        given(engine, by_client("B"), folder)
        list(engine.train([Task(Visit(c, 1.0, round=1), {}) for c in partition.clients]))
        ends.append(dict(engine.store.states))
    for client, tree in ends[0].items():
        assert all((ends[1][client][n] - t).abs().max() < TOLERANCE for n, t in tree.items())


def test_an_optimizer_is_freed_when_the_next_stretch_is_fresh_and_before_replies_are_scored(pair):
    settings, sides, folder = pair
    engine, partition = switched(*sides[1], settings, EXACT, folder=folder)
    made, alive, make = [], [], stacked.make_optimizer

    def watched(*args):
        alive.append(sum(ref() is not None for ref in made))
        made.append(weakref.ref(found := make(*args)))
        return found

    def twice(local: Local):
        now, _ = yield Train(local.begin, steps=1)
        end, _ = yield Train(now, steps=1)
        return Sent({}, end)

    given(engine, twice, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort, "make_optimizer", watched)
        for _ in engine.train([Task(Visit(c, 1.0, round=1), {}) for c in partition.clients]):
            assert not any(ref() is not None for ref in made)
    assert alive == [0, 0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: dict(list(tree.items())[1:]), "other factors than the model's, 1 of them"),
        (lambda tree: {n: t[:1] for n, t in tree.items()}, r"asks for '.*' as \[1, "),
    ],
)
def test_a_request_takes_a_whole_adapter(pair, change, said):
    settings, sides, folder = pair

    def trains(local: Local):
        end, _ = yield Train(change(local.begin))
        return Sent({}, end)

    def scores(local: Local):
        yield Score([change(local.begin)])
        return Sent({})

    for engine, partition in sides:
        for work in (trains, scores):
            switched(engine, partition, settings, EXACT, folder=folder)
            given(engine, work, folder)
            with pytest.raises(fedvlm.FedVLMError, match=f"site-0.*{said}"):
                list(engine.train([Task(Visit(partition.clients[0], 1.0, round=1), {})]))


def test_a_stretch_cannot_resume_one_of_other_factors(pair):
    settings, sides, folder = pair

    def other(local: Local):
        now, _ = yield Train(local.begin, of("B"))
        end, _ = yield Train(now, of("A"), resume=True)
        return Sent({}, end)

    for engine, partition in sides:
        switched(engine, partition, settings, EXACT, folder=folder)
        given(engine, other, folder)
        with pytest.raises(fedvlm.FedVLMError, match=r"site-0.*resumes .* trained other factors"):
            list(engine.train([Task(Visit(partition.clients[0], 1.0, round=1), {})]))


def test_a_program_runs_until_all_have_what_they_asked_for():
    """Groups are formed anew after every stretch; the client with the fewest stretches is first."""

    def work(letters):
        for letter in letters:
            yield Train({f"m.lora_{f}.weight": torch.zeros(1) for f in "AB"}, of(letter))
        return Sent({})

    members = [
        together.Member(Task(Visit(name, 1.0), {}), work(letters))
        for name, letters in (("x", "AAB"), ("y", "BA"), ("z", "A"))
    ]
    seen = []

    def train(group):
        seen.append("".join(member.task.client for member in group))
        trained = together.Trained({}, {})
        return [together.Outcome(trained, torch.zeros(0)) for _ in group], object()

    together.perform(members, train, lambda client, trees: ())
    assert seen == ["xz", "y", "xy", "x"]
    assert all(isinstance(member.sent, Sent) for member in members)
