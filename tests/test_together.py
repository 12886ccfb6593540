"""Programs of clients that ask for different things: both engines, and who trains with whom."""

from __future__ import annotations

import pytest
import torch

import fedvlm
from fedvlm.algorithms.base import Algorithm, Averaged, Local, Score, Sent, Train, Visit
from fedvlm.engines import together
from fedvlm.engines.cohort import CohortEngine
from fedvlm.engines.wire import Forms, Task
from fedvlm.tree import factor
from pair import EXACT, TOLERANCE, Kept, engines, switched


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Both engines, prepared once: an algorithm changes neither the model nor its rows."""
    settings = {
        "data": {"scenes": {"style": "mixed", "sites": 3, "rows": 16}},
        "partition": {"min_rows": 4},
        "train": {"rounds": 2, "local_steps": 2, "batch_size": 4, "lr": 0.001},
        "eval": {"every": 0, "max_rows": 2, "max_new_tokens": 3},
        "lora": {"rank": 2, "alpha": 4},
    }
    folder = tmp_path_factory.mktemp("pair")
    return settings, engines(settings, EXACT, folder=folder), folder


def given(engine, work, folder):
    """The engine with an algorithm whose clients work like this."""
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
    """Programs that differ by client: other factors, other lengths, scores in between."""
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
    assert all((zero in group) == (two in group) for group in groups), "they always ask alike"
    assert sum(map(len, groups)) == 5 + 4 + 5, "each has all of its stretches"


@pytest.mark.parametrize("resume", [False, True])
def test_a_stretch_that_resumes_continues_with_the_optimizer_of_the_one_before(pair, resume):
    """Two stretches of two steps are one of four, where the optimizer is resumed."""
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
            outcomes, session = train(group)
            sessions.append(getattr(session, "optimizer", session))
            return outcomes, session

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
    """Groups are made anew after every stretch, whoever is ahead."""

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
        return [together.Outcome(trained, []) for _ in group], object()

    together.perform(members, train, lambda client, trees: ())
    assert seen == ["xz", "y", "xy", "x"]
    assert all(isinstance(member.sent, Sent) for member in members)
