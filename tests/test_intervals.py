"""Intervals of scores agree with published values, and hold as often as they should."""

import csv
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedvlm.after.evaluate import Evaluation
from fedvlm.cli import aftertables, tables
from fedvlm.cli.tables import print_run
from fedvlm.config import load
from fedvlm.errors import brief
from fedvlm.intervals import (
    ends,
    few_rows,
    from_means,
    intervals,
    mean_interval,
    over_rows,
    scored,
    student,
    wilson,
)
from fedvlm.metrics import METRICS
from fedvlm.rounds.results import Results, as_csv, tabulate

NAN = float("nan")


def answers(values, client="a", **more):
    """Answers with one value for every score, or others for single scores."""
    shares = ("exact_match", "token_f1", "rouge_l", "bleu")
    return [
        {
            "client": client,
            **dict.fromkeys(shares, min(v, 1.0)),
            "length": v,
            "loss": v,
            "weight": 1.0,
            **more,
        }
        for v in values
    ]


# Shares


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # the four of Newcombe (1998), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (1, 1, 0.2065, 1.0),
        (0, 1, 0.0, 0.7935),
        (5, 5, 0.5655, 1.0),
    ],
)
def test_wilson_agrees_with_published_and_hand_computed_values(right, rows, low, high):
    assert wilson(right / rows, rows) == pytest.approx([low, high], abs=6e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10_000), st.floats(0, 1))
def test_wilson_holds_the_share_and_stays_in_its_range(rows, share):
    low, high = wilson(share, rows)
    assert 0 <= low <= share <= high <= 1
    assert low < high


def test_a_single_right_row_says_little():
    assert scored("exact_match", 1.0, wilson(1.0, 1)) == "100.0 % (21–100)"


# Other scores


def test_rows_that_agree_have_the_interval_of_a_share_and_not_a_width_of_zero():
    found = intervals(answers([1.0] * 5))
    assert found == {m: wilson(1.0, 5) for m in ("exact_match", "token_f1", "rouge_l", "bleu")}
    single = intervals(answers([0.5]))
    assert single["token_f1"] == wilson(0.5, 1)
    assert "loss" not in single, "one row shows no spread of a score without bounds"


def test_no_rows_have_no_interval():
    assert intervals([]) == {}
    assert from_means({"exact_match": 0.5}) == {}
    assert from_means({"exact_match": 0.5, "examples": 0}) == {}


def test_scores_that_are_not_finite_have_no_interval():
    rows = answers([0.0, 1.0, 0.5, 0.0])
    rows[1]["loss"], rows[2]["token_f1"] = math.inf, NAN
    found = intervals(rows)
    assert "loss" not in found
    assert "token_f1" not in found
    assert found["rouge_l"]
    assert mean_interval([0.1, 0.2, NAN]) is None


def test_the_bootstrap_is_the_same_in_every_call_and_for_every_order_of_metrics():
    rows = answers(np.random.default_rng(0).random(12))
    found = intervals(rows)
    assert intervals(rows) == found
    assert found["token_f1"] == found["bleu"], "equal columns see equal resamples"


@pytest.mark.parametrize("rows", [30, 1500])
def test_bootstrap_intervals_hold_the_mean_in_about_95_of_100_samples(rows):
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        low, high = intervals(answers(rng.beta(2, 1, rows).tolist()))["token_f1"]
        held += low <= 2 / 3 <= high
    assert 0.90 <= held / 200 <= 0.99


def test_the_bootstrap_and_its_normal_limit_meet(monkeypatch):
    rows = answers(np.random.default_rng(2).random(900))
    resampled = intervals(rows)["bleu"]
    monkeypatch.setattr("fedvlm.intervals.MOST_RESAMPLED", 10)
    assert intervals(rows)["bleu"] == pytest.approx(resampled, abs=2e-3)


def test_a_loss_counts_by_its_tokens():
    rows = answers([1.0, 3.0] * 20)
    for row in rows:
        row["weight"] = 9.0 if row["loss"] == 3.0 else 1.0
    low, high = intervals(rows)["loss"]
    assert low < 2.8 < high
    assert low > 2.0, "the mean without weights is 2"


# Means over clients and over rows


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (120, 1.980)]
)
def test_students_quantiles_are_those_of_the_tables(degrees, quantile):
    assert student(degrees) == pytest.approx(quantile, rel=0.01)


def test_the_mean_over_clients_has_an_interval_from_three_clients():
    assert mean_interval([0.1, 0.9]) is None
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(4.303 / math.sqrt(3), rel=0.01)
    assert mean_interval([0.0, 0.5, 1.0], (0.0, 1.0)) == [0.0, 1.0]


def test_an_interval_stays_where_its_score_can_be():
    for name in ("length", "loss"):
        assert mean_interval([0.0, 0.0, 9.0], METRICS[name].bounds)[0] == 0.0
    assert mean_interval([0.0, 0.0, 9.0], METRICS["reward_margin"].bounds)[0] < 0


def test_the_mean_over_rows_weighs_clients_by_their_rows():
    clients = [{"bleu": 1.0, "examples": 1}, {"bleu": 0.2, "examples": 9}]
    assert over_rows("bleu", clients) == pytest.approx((1.0 + 9 * 0.2) / 10)
    assert over_rows("bleu", [*clients, {"bleu": 0.5}]) is None, "a client hides its rows"


# Tables


def table(sites, told=True, silent=False):
    """The table of a run with these right and wrong rows by client, all models alike."""
    rows = [a for client, values in sites.items() for a in answers(values, client, group=None)]
    if silent:
        rows = []
    scores = {
        client: {
            **{m: sum(v) / len(v) for m in METRICS if "reward" not in m},
            **({"examples": len(v)} if told else {}),
        }
        for client, v in sites.items()
    }
    models = ("personal", "global", "personal_before", "global_before")
    last = dict.fromkeys(models, scores)
    lines = [{"round": 0, "evaluation": last}]
    lines += [{"round": 1, "evaluation": last, "bytes_up": {"a": 1}, "bytes_down": {"a": 1}}]
    kinds = dict.fromkeys(("untuned", "global", "personal"), rows)
    return tabulate(load(), lines, list(sites), kinds) | {"groups": None}


SITES = {"large": [1.0] * 60 + [0.0] * 20, "small": [1.0, 1.0, 1.0, 0.0, 1.0], "one": [1.0]}


def test_a_table_has_rows_and_intervals_of_every_score():
    found = table(SITES)
    personal = found["models"]["personal"]
    assert personal["rows"] == 86
    assert personal["intervals"]["one"]["exact_match"] == wilson(1.0, 1)
    assert personal["intervals"]["small"]["exact_match"] == wilson(0.8, 5)
    summary = personal["summary"]["exact_match"]
    assert summary["mean"] == pytest.approx((0.75 + 0.8 + 1) / 3)
    assert summary["mean_rows"] == pytest.approx(65 / 86)
    assert summary["interval_rows"] == pytest.approx(wilson(65 / 86, 86))
    assert summary["interval"] == mean_interval([0.75, 0.8, 1.0], (0.0, 1.0))
    before = found["models"]["personal_before"]
    assert before["intervals"]["small"] == {"exact_match": wilson(0.8, 5)}
    assert found["few_rows"] == {"small": 5, "one": 1}
    assert json.loads(json.dumps(found)) == found
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    one = next(r for r in rows if (r["client"], r["model"]) == ("one", "personal"))
    assert float(one["exact_match_low"]) == wilson(1.0, 1)[0]
    assert (one["examples"], one["loss_low"]) == ("1", "")


def test_sites_that_keep_their_answers_have_intervals_of_shares_from_their_rows():
    found = table(SITES, silent=True)["models"]["personal"]
    assert found["intervals"]["small"] == {"exact_match": wilson(0.8, 5)}
    assert found["summary"]["bleu"]["interval_rows"] is None
    assert found["summary"]["exact_match"]["interval_rows"] == pytest.approx(wilson(65 / 86, 86))


def test_sites_that_hide_their_rows_have_no_interval():
    found = table(SITES, told=False, silent=True)
    personal = found["models"]["personal"]
    assert (personal["rows"], personal["intervals"]["one"]) == (None, {})
    assert personal["summary"]["exact_match"]["mean_rows"] is None
    assert found["few_rows"] == {}


def test_a_loss_over_rows_weighs_clients_by_rows_and_not_by_tokens():
    sites = {"a": [1.0] * 10 + [2.0] * 10, "b": [5.0] * 9 + [6.0]}
    rows = [a for c, v in sites.items() for a in answers(v, c, group=None)]
    for row in rows:
        row["weight"] = 100.0 if row["client"] == "b" else 1.0
    found = table(sites)["models"]["personal"]["summary"]["loss"]
    assert found["mean_rows"] == pytest.approx((20 * 1.5 + 10 * 5.1) / 30)
    low, high = found["interval_rows"]
    assert low < found["mean_rows"] < high


def shown(monkeypatch, width, call, *args):
    """The lines that a table prints in a terminal of this width."""
    out = io.StringIO()
    console = Console(file=out, width=width)
    monkeypatch.setattr(tables, "console_for_tables", lambda: console)
    monkeypatch.setattr(aftertables, "console_for_tables", lambda: console)
    call(*args)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return lines


@pytest.mark.parametrize("width", [80, 110])
def test_the_table_of_a_run_fits_and_warns_once(tmp_path, monkeypatch, width):
    found = shown(monkeypatch, width, print_run, Results(tmp_path, table(SITES)))
    text = "\n".join(found)
    assert "…" not in text
    (one,) = (i for i, line in enumerate(found) if line.startswith("│ one "))
    assert "".join(found[one : one + 1 + (width == 80)]).count("(21–100)") == 3
    assert any(s.startswith("│ mean over") and "85.0 %" in s for s in found)
    assert any(s.startswith("│ mean over rows") and "75.6 % (66–83)" in s for s in found)
    few = " ".join(text[text.index("few rows") :].split())
    assert few.startswith(
        "few rows: 2 of 3 clients have fewer than 20 scored rows (one 1, small 5)"
    )


def test_enough_rows_give_no_warning(tmp_path, monkeypatch):
    sites = {"a": [1.0, 0.0] * 10, "b": [1.0] * 40}
    found = shown(monkeypatch, 110, print_run, Results(tmp_path, table(sites)))
    assert "few rows" not in "\n".join(found)


def test_names_from_the_data_are_text_in_tables_and_warnings(tmp_path, monkeypatch):
    sites = {"[red]x[/red]": [1.0], "\x1b[31m" + "long " * 500: [0.0, 1.0]}
    found = "\n".join(shown(monkeypatch, 110, print_run, Results(tmp_path, table(sites))))
    assert found.count("[red]x[/red]") == 2
    assert "\x1b" not in found
    many = few_rows({f"client {n} " + "é" * 300: 1 for n in range(5000)})
    assert "and 4,990 more" in many
    assert len(many) < 2000
    assert len(brief("x" * 99, 40)) == 40


@pytest.mark.parametrize("width", [80, 110])
def test_new_data_have_intervals_too(monkeypatch, width):
    rows = answers([1.0, 0.0, 1.0])
    scores = {m: 2 / 3 for m in METRICS if m in rows[0]} | {"examples": 3}
    found = Evaluation("new [b].csv", 3, {"site-0": scores}, {"site-0": intervals(rows)})
    text = "\n".join(shown(monkeypatch, width, aftertables.print_evaluation, found, None))
    assert "3 rows of new [b].csv" in text
    assert "21–94" in text
    assert "few rows: 3" in text
    (line,) = found.table()
    assert (line["exact_match_low"], line["exact_match_high"]) == tuple(wilson(2 / 3, 3))
    assert ends(["loss"], {}) == {"loss_low": None, "loss_high": None}
