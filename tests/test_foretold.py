"""Answers that follow from the losses: no model is asked for them, and they are the same."""

import pytest
import torch

from fedvlm.engines import cohort
from fedvlm.engines.continued import continued
from fedvlm.models.generate import decoded, foretold, greedy
from fedvlm.tree import factor
from pair import engines

ROWS = 12
SETTINGS = {
    "data": {"scenes": {"style": "label", "sites": 2, "rows": 48}},
    "eval": {"every": 0, "max_rows": ROWS, "batch_size": 16},
    "engine": {"threads": 1},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Both engines with the bundled model, which answers some of its rows correctly."""
    return engines(SETTINGS, folder=tmp_path_factory.mktemp("engines"))


@pytest.fixture
def answered(prepared, monkeypatch):
    """Answers of both engines, and the numbers of rows that the fast one's model writes.

    These are the rows that it writes on, from the losses' pass, and those that it writes anew.
    """

    def answers(adapters=lambda engine, clients: [engine.adapter] * len(clients), **settings):
        on, anew = [], []

        def counted(*given):
            on.append(len(given[4]))
            return continued(*given)

        def counted_anew(model, batch, *more):
            anew.append(len(batch["input_ids"]))
            return greedy(model, batch, *more)

        monkeypatch.setattr(cohort, "continued", counted)
        monkeypatch.setattr(cohort, "greedy", counted_anew)
        found = []
        for engine, partition in prepared:
            for name, value in settings.items():
                monkeypatch.setattr(engine.model.generation_config, name, value)
            engine._answers.clear()
            engine._untuned._kept.clear()
            clients = partition.clients
            trees = adapters(engine, clients)
            found.append(engine.answers(zip(clients, trees, strict=True)))
        return *found, sum(on), sum(anew)

    return answers


def moved(engine, clients):
    """An adapter for each client, each with another B."""
    found = []
    for number in range(len(clients)):
        random = torch.Generator().manual_seed(number)
        found.append(
            {
                n: t + 0.1 * torch.randn(t.shape, generator=random) if factor(n) == "B" else t
                for n, t in engine.adapter.items()
            }
        )
    return found


@pytest.mark.parametrize("adapters", [(), (moved,)], ids=["untuned", "one a client"])
def test_the_model_writes_only_the_answers_that_the_losses_do_not_tell(answered, adapters):
    slow, fast, on, anew = answered(*adapters)
    assert fast.keys() == slow.keys()
    right = 0
    for client, rows in slow.items():
        assert [row["row"] for row in rows] == [row["row"] for row in fast[client]]
        for one, other in zip(rows, fast[client], strict=True):
            assert one["prediction"] == other["prediction"]
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
            right += one["prediction"] == one["reference"]
    assert 0 < right < 2 * ROWS, "the model answers some of its rows correctly"
    assert on == 2 * ROWS - right
    assert anew == 0


def test_a_model_whose_settings_change_its_tokens_writes_every_answer_anew(answered):
    slow, fast, on, anew = answered(repetition_penalty=1.3)
    texts = [[row["prediction"] for row in rows] for of in (slow, fast) for rows in of.values()]
    assert texts[:2] == texts[2:]
    assert on == 0
    assert anew == 2 * ROWS


@pytest.mark.parametrize(
    ("length", "ended", "lead", "most", "told"),
    [
        (3, True, 3, 8, True),
        (3, True, 2, 8, False),  # another token is more probable somewhere
        (3, False, 3, 8, False),  # cut: the model would write on
        (3, False, 3, 3, True),  # the longest answer
        (3, True, 2, 2, True),  # the rest is beyond the longest answer
    ],
)
def test_an_answer_is_told_where_it_is_certain_to_its_end(
    prepared, length, ended, lead, most, told
):
    engine, _ = prepared[0]
    tokenizer, end = engine.collator.tokenizer, engine.collator.prompter.end
    ids = tokenizer("red and blue", add_special_tokens=False).input_ids
    ids = torch.tensor([*ids[: length - ended], *[end] * ended])
    assert len(ids) == length
    (found,) = foretold(engine.model, [ids], [lead], tokenizer, most)
    said = tokenizer.decode(ids[:most], skip_special_tokens=True).strip()
    assert found == (said if told else None)


def test_no_rows_have_no_texts(prepared):
    (engine, _), _ = prepared
    assert decoded([], engine.collator.tokenizer) == []
    assert decoded([torch.tensor([5])], engine.collator.tokenizer) != []
