"""Metrics that a program hands over as functions."""

from __future__ import annotations

import pytest

import fedvlm
from fedvlm.cli.tables import print_run
from fedvlm.engines.functions import checked, own_scores
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.metrics import METRICS
from fedvlm.rounds.results import Results
from fedvlm.store.files import read_lines
from stopping import Stop

ROW = {"row": 7, "question": "What?", "answer": "a cat"}


def letters(prediction, reference):
    """The share of the reference's letters that the prediction has."""
    return len(set(prediction) & set(reference)) / max(1, len(set(reference)))


def asked(prediction, reference, question):
    return float(len(question) > len("What?") - 1)


def test_a_function_scores_every_table(small, tmp_path, capsys, monkeypatch):
    settings = small | {"eval": small["eval"] | {"metric": "letters"}}
    settings["train"] |= {"rounds": 1, "local_steps": 1}
    functions = {"letters": letters, "asked": asked}
    with pytest.raises(KeyboardInterrupt):
        fedvlm.run(settings, metrics=functions, progress=Stop(1))
    for others in (None, {"letters": letters}):
        with pytest.raises(ConfigError, match="give the same functions again"):
            fedvlm.resume(small["output"], metrics=others)
    with pytest.raises(ConfigError, match="this run began without more"):
        fedvlm.resume(small["output"], metrics=functions | {"more": letters})
    results = fedvlm.resume(small["output"], metrics=functions)

    for model in ("untuned", "global", "personal"):
        answers = results.answers(model)
        own = [letters(a["prediction"], a["reference"]) for a in answers]
        assert [a["letters"] for a in answers] == own
        assert results.summary(model)["mean_rows"] == pytest.approx(sum(own) / len(own))
    assert results.metric == "letters"
    assert results.summary("personal", "asked")["mean"] == 1
    last = read_lines(results.folder / "metrics.jsonl")[-1]["evaluation"]["personal"]
    assert {c: scores["letters"] for c, scores in last.items()} == results.scores()
    assert {"letters", "letters_low", "asked"} <= set(results.to_pandas())
    assert "letters,asked" in (results.folder / "table.csv").read_text().splitlines()[0]
    print_run(results)
    assert "1 round: letters on test rows" in " ".join(capsys.readouterr().out.split())

    # Another program knows the scores by the settings and the tables of the run alone.
    for name in functions:
        monkeypatch.delitem(METRICS, name)
    assert Results.read(results.folder).metrics[:2] == ["letters", "exact_match"]
    for name in functions:
        monkeypatch.delitem(METRICS, name)
    page = fedvlm.write_report(results.folder).read_text()
    assert "Letters" in page
    assert "This run had objects of a Python program: fedvlm.run(..., metrics=...)" in page

    rows = tmp_path / "rows.parquet"
    fedvlm.scenes(sites=1, rows=12).select([0]).to_parquet(rows)
    found = fedvlm.evaluate(results.folder, rows, global_=True, metrics={"letters": letters})
    assert all({"letters", "exact_match"} <= set(scores) for scores in found.scores.values())
    found = fedvlm.evaluate(results.folder, rows, global_=True)
    assert not any("letters" in scores for scores in found.scores.values())
    assert Results.read(results.folder).table["own"] == ["letters", "asked"]


def fails(prediction, reference):
    raise KeyError("no such word")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (fails, r"metrics\['f'\] on row 7: the function failed with KeyError: 'no such word'"),
        (lambda p, r: "high", "the function gave 'high', and a score is a number from 0 to 1"),
        (lambda p, r: None, "the function gave None"),
        (lambda p, r: float("nan"), "the function gave nan"),
        (lambda p, r: 1.5, "the function gave 1.5"),
    ],
)
def test_a_function_that_gives_no_score_is_named_with_the_row(function, said):
    with pytest.raises(FedVLMError, match=said):
        own_scores({"f": function}, "a dog", ROW)


def test_a_function_may_take_the_question_and_may_give_a_truth_value():
    assert own_scores({"q": asked, "t": lambda p, r: p == r}, "a cat", ROW) == {"q": 1, "t": 1}


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ([letters], "it is a dict such as"),
        ({"f": 3}, "got 'f': 3"),
        ({"f": lambda prediction: 1}, "must take"),
    ],
)
def test_other_objects_are_refused(metrics, said):
    with pytest.raises(ConfigError, match=said):
        checked(metrics)


@pytest.mark.parametrize("name", ["bleu", "row", "a b", "Ä", "f_low", "a, b", "a'", ""])
def test_a_name_that_tables_cannot_have_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\['.*'\]: choose a name"):
        fedvlm.run({"output": str(tmp_path / "run")}, metrics={name: letters})
    with pytest.raises(ConfigError, match=r"eval\.own"):
        fedvlm.load_config({"eval": {"own": [name]}})


def test_a_metric_without_its_function_is_unknown():
    with pytest.raises(ConfigError, match="metric='letters' is unknown; there are exact_match"):
        fedvlm.load_config({"eval": {"metric": "letters"}})
