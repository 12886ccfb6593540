"""Scores by the values of a column, such as closed and open questions."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

import fedvlm
from fedvlm.cli.tables import print_run
from fedvlm.errors import FedVLMError
from fedvlm.metrics import mean
from fedvlm.rounds.grouped import rows

KINDS = ("open", "<closed>")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A run whose rows are open or closed questions, or neither."""
    import smallest

    frame = fedvlm.scenes(sites=2, rows=24).to_pandas()
    frame["kind"] = [(*KINDS, None)[n % 3] for n in range(len(frame))]
    settings = {
        "output": str(tmp_path_factory.mktemp("grouped") / "run"),
        "model": {"name": smallest.model()},
        "algorithm": {"name": "lora"},
        "partition": {"column": "site"},
        "train": {"rounds": 1, "local_steps": 1, "batch_size": 2, "average": "none"},
        "eval": {"group_by": "kind", "max_new_tokens": 3, "metric": "rouge_l"},
        "lora": {"rank": 2, "alpha": 4},
    }
    return fedvlm.run(settings, data=frame)


def test_every_client_and_value_has_its_scores(results):
    table = results.by("kind")
    assert set(table["client"]) == {"", "site-0", "site-1"}
    assert set(table["kind"]) == set(KINDS)
    assert set(table["model"]) == {"untuned", "global", "personal"}
    for _, row in table.iterrows():
        own = [
            a
            for a in results.answers(row["model"])
            if a["group"] == row["kind"] and row["client"] in ("", a["client"])
        ]
        assert row["examples"] == len(own) > 0
        for metric in ("exact_match", "token_f1"):
            assert row[metric] == pytest.approx(mean(a[metric] for a in own))
            assert row[f"{metric}_low"] <= row[metric] <= row[f"{metric}_high"]
    assert results.by().equals(table)


def test_the_printed_table_the_report_and_the_file_have_them(results, capsys):
    print_run(results)
    told = capsys.readouterr().out
    _, _, told = told.partition("personal models by client and kind")
    assert max(len(line) for line in told.splitlines() if line[:1] in "┃│└") <= 80
    for word in ("site-1", "<closed>", "exact match", "token F1", "ROUGE-L"):
        assert word in told
    page = fedvlm.write_report(results.folder).read_text()
    assert "Personal models by site and kind" in page
    assert "&lt;closed&gt;" in page
    with open(results.folder / "groups.csv") as file:
        lines = list(csv.DictReader(file))
    assert [(x["client"], x["kind"], x["model"]) for x in lines] == [
        (r["client"], r["kind"], r["model"]) for _, r in results.by().iterrows()
    ]


def test_another_column_is_refused(results):
    with pytest.raises(FedVLMError, match=r"has scores by 'kind' alone: .* eval\.group_by"):
        results.by("organ")
    with pytest.raises(FedVLMError, match="has scores by no column"):
        replace(results, table=results.table | {"groups": None}).by("kind")


def test_a_column_of_a_taken_name_stays_apart():
    answer = {"client": "a", "group": "x", "exact_match": 1.0, "loss": 1.0, "weight": 1.0}
    (first, _) = rows("model", {"personal": [answer]})
    assert (first["value"], first["model"]) == ("x", "personal")
