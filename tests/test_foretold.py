"""Answers that follow from the losses: no model is asked for them, and they are the same."""

import pytest
import torch

from fedvlm.engines import cohort
from fedvlm.models.generate import foretold, greedy
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
    """Answers of both engines, and the number of rows for which the fast one asks its model."""

    def answers(**settings):
        asked = []

        def counted(model, batch, *more):
            asked.append(len(batch["input_ids"]))
            return greedy(model, batch, *more)

        monkeypatch.setattr(cohort, "greedy", counted)
        found = []
        for engine, partition in prepared:
            for name, value in settings.items():
                monkeypatch.setattr(engine.model.generation_config, name, value)
            engine._answers.clear()
            found.append(engine.answers((c, engine.adapter) for c in partition.clients))
        return *found, sum(asked)

    return answers


def test_the_model_writes_only_the_answers_that_the_losses_do_not_tell(answered):
    slow, fast, asked = answered()
    assert fast.keys() == slow.keys()
    right = 0
    for client, rows in slow.items():
        for one, other in zip(rows, fast[client], strict=True):
            assert one["prediction"] == other["prediction"]
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            right += one["prediction"] == one["reference"]
    assert 0 < right < 2 * ROWS, "the model answers some of its rows correctly"
    assert asked == 2 * ROWS - right


def test_a_model_whose_settings_change_its_tokens_writes_every_answer(answered):
    slow, fast, asked = answered(repetition_penalty=1.3)
    texts = [[row["prediction"] for rows in of.values() for row in rows] for of in (slow, fast)]
    assert texts[0] == texts[1]
    assert asked == 2 * ROWS


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
