"""The untuned model's answers: computed once for all rounds and all compared runs."""

import numpy as np
import pytest

import fedvlm
from fedvlm.engines.cohort import CohortEngine
from fedvlm.engines.untuned import Untuned
from fedvlm.models.frozen import handed_on
from fedvlm.rounds.prepare import prepare
from fedvlm.tree import factor


@pytest.fixture
def asked(monkeypatch):
    """Grows by the number of rows whenever a model is asked for its answers."""
    real, found = CohortEngine._answer, []

    def counted(self, models):
        found.append(sum(len(rows) for _, rows in models))
        return real(self, models)

    monkeypatch.setattr(CohortEngine, "_answer", counted)
    return found


def turned(tree):
    """The adapter with another A."""
    return {n: t + 1 if factor(n) == "A" else t for n, t in tree.items()}


def test_an_adapter_without_b_gives_the_untuned_answers_to_every_round_and_run(small, asked):
    with handed_on():
        first, partition, _ = prepare(fedvlm.load_config(small))
        clients = partition.clients
        untuned = first.answers((c, first.adapter) for c in clients)
        assert asked == [9]
        first._answers.clear()  # the next round
        assert first.answers((c, turned(first.adapter)) for c in clients) == untuned
        second = prepare(fedvlm.load_config(small, "algorithm.name=lora"))[0]
        assert second.answers((c, second.adapter) for c in clients) == untuned
        assert asked == [9]
        trained = {n: t + 0.1 for n, t in second.adapter.items()}
        assert second.answers([(clients[0], trained)]) != {clients[0]: untuned[clients[0]]}
        assert asked == [9, 3]
    second._untuned = Untuned("CohortEngine", second.model, second.collator, second.config)
    second._answers.clear()
    assert second.answers((c, turned(second.adapter)) for c in clients) == untuned
    assert asked == [9, 3, 9], "outside of the scope, a run computes its own, to the same bits"


def test_a_programs_own_metrics_are_not_handed_on(small, asked):
    engine, partition, _ = prepare(fedvlm.load_config(small))
    for text in ("a", "b"):
        engine.functions = {"brief": lambda prediction, reference, text=text: text == "a"}
        engine._answers.clear()
        (rows,) = engine.answers([(partition.clients[0], engine.adapter)]).values()
        assert rows[0]["brief"] == (text == "a")
    assert asked == [3, 3]


def test_remembered_answers_hold_for_the_same_rows_settings_and_model_only(small, monkeypatch):
    engine, *_ = prepare(fedvlm.load_config(small))
    rows = np.arange(3)

    def key(*overrides, name="CohortEngine", rows=rows):
        config = fedvlm.load_config(small, *overrides)
        return Untuned(name, engine.model, engine.collator, config)._key(rows)

    same = key()
    assert key("algorithm.name=lora", "seed=1", "train.lr=0.5", "output=there") == same
    others = [
        key("eval.max_new_tokens=2"),
        key("eval.batch_size=2"),
        key("objective.name=dpo"),
        key("model.name=tiny"),
        key("engine.cache=0"),
        key("lora.target=vision"),
        key(name="ReferenceEngine"),
        key(rows=rows[::-1]),
    ]
    monkeypatch.setattr(engine.model.generation_config, "repetition_penalty", 1.5)
    others.append(key())
    monkeypatch.undo()
    monkeypatch.setattr(engine.collator, "key", "of other rows")
    others.append(key())
    assert len({same, *others}) == 11


def test_the_oldest_answers_are_forgotten(small, monkeypatch):
    monkeypatch.setattr("fedvlm.engines.untuned.MOST", 5)
    engine, *_ = prepare(fedvlm.load_config(small))
    memory = engine._untuned
    for first in (0, 3, 6):
        memory.keep(np.arange(first, first + 2), [[{}, {}]])
    known = [memory.get(np.arange(first, first + 2)) is not None for first in (0, 3, 6)]
    assert known == [False, True, True]
