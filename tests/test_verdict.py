"""What a comparison claims: gains between equal steps only, and a verdict for every site."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

import fedvlm
from fedvlm.cli import demo
from fedvlm.cli.app import main
from fedvlm.cli.tables import print_comparison, unequal_steps
from fedvlm.intervals import gain, paired
from fedvlm.rounds.claims import SHARES, STAY, UNCLEAR, gains, steps, verdicts
from fedvlm.rounds.comparison import Comparison
from fedvlm.rounds.contenders import planned
from fedvlm.rounds.results import Results

ROWS = 60
SMALL = (
    "data.scenes.sites=2",
    "data.scenes.rows=16",
    "partition.min_rows=4",
    "train.rounds=1",
    "train.local_steps=1",
    "eval.max_rows=3",
    "eval.max_new_tokens=4",
    "lora.rank=2",
    "--jobs=1",
)


class Answered(Results):
    """A run whose answers are given: client -> right or wrong, row by row."""

    def answers(self, model="personal"):
        return [
            {"client": client, "row": row, "exact_match": float(right)}
            for client, rights in self.table["rights"].items()
            for row, right in enumerate(rights)
        ]


def run(steps=40, seed=0, **rights):
    """A run of several sites, each with its right and wrong answers."""
    clients = {c: {"exact_match": float(np.mean(r))} for c, r in rights.items()}
    table = {"metric": "exact_match", "seed": seed, "steps": steps, "rights": rights}
    return Answered("x", table | {"models": {"personal": {"clients": clients}}})


def right(share, rows=ROWS):
    """The first rows are right: the more of them, the larger the share."""
    return [row < share * rows for row in range(rows)]


# Intervals


def test_the_paired_interval_is_that_of_agresti_and_min():
    differences = [1] * 25 + [-1] * 5 + [0] * 70
    low, high = paired(differences)
    middle, spread = 20 / 102, np.sqrt((31 / 102 - (20 / 102) ** 2) / 102)
    expected = [middle - 1.9842 * spread, middle + 1.9842 * spread]  # Student's t, 99 degrees
    assert [low, high] == pytest.approx(expected, abs=1e-5)


def test_more_looks_widen_the_paired_interval():
    differences = [1] * 14 + [-1] * 4 + [0] * 40
    one, four = paired(differences), paired(differences, looks=4)
    assert four[0] < 0 < one[0]


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_few_rows_that_all_agree_claim_nothing(rows):
    assert paired([1.0] * rows)[0] < 0 < paired([1.0] * rows)[1]


@pytest.mark.parametrize(("rows", "rate"), [(6, 0.4), (20, 0.2), (60, 0.1), (60, 0.4)])
def test_the_paired_interval_holds_the_mean_in_95_of_100_draws(rows, rate):
    draws = np.random.default_rng(0).choice([-1, 0, 1], (2000, rows), p=[rate, 1 - 2 * rate, rate])
    missed = [not low <= 0 <= high for low, high in map(paired, draws)]
    assert np.mean(missed) < 0.06


def test_a_gain_is_the_ratio_of_means_and_its_interval_is_that_of_a_ratio():
    found, (low, high) = gain([0.4, 0.5, 0.9], [0.2, 0.4, 0.6])
    assert found == pytest.approx(0.5)
    residuals = np.array([0.4 - 0.3, 0.5 - 0.6, 0.9 - 0.9])
    half = 4.27 * residuals.std(ddof=1) / np.sqrt(3) / 0.4
    assert [low, high] == pytest.approx([0.5 - half, 0.5 + half], rel=0.01)


def test_two_pairs_have_a_gain_without_an_interval_and_a_reference_of_zero_has_none():
    assert gain([0.3, 0.3], [0.2, 0.2]) == (pytest.approx(0.5), None)
    assert gain([0.3, 0.3, 0.3], [0.0, 0.0, 0.0]) == (None, None)


# Equal steps


def test_gains_are_over_baselines_of_equal_steps_only():
    sites = {"a": right(0.5), "b": right(0.6), "c": right(0.7)}
    more = {"a": right(0.6), "b": right(0.75), "c": right(0.8)}
    results = {"plora": [run(**more)], "local": [run(**sites)], "lora": [run(80, **sites)]}
    found = gains("plora", results)
    assert found["gain_over_local"] == pytest.approx(2.15 / 1.8 - 1, abs=1e-6)
    assert found["gain_over_local_low"] > 0
    assert found["gain_over_lora"] is found["gain_over_lora_low"] is None
    assert gains("local", results)["gain_over_local"] == 0
    assert gains("plora", {"plora": results["plora"]})["gain_over_local"] is None


def test_steps_are_means_over_seeds_and_unknown_steps_equal_nothing():
    sites = {"a": right(0.5), "b": right(0.6), "c": right(0.7)}
    assert steps([run(40, **sites), run(44, seed=1, **sites)]) == 42
    assert steps([run(0, **sites)]) is None
    unknown = {"plora": [run(0, **sites)], "local": [run(0, **sites)]}
    assert gains("plora", unknown)["gain_over_local"] is None
    assert verdicts(unknown) == []


def test_unequal_steps_are_named_with_their_numbers():
    assert unequal_steps({"plora": 320, "local": 320, "lora": 320}) == ""
    assert unequal_steps({"ditto": 640, "plora": 320}) == "", "without a baseline, nothing is shown"
    said = unequal_steps({"ditto": 640, "own": None, "plora": 320, "local": 320})
    assert said.startswith("unequal steps: ditto 640, own unknown, local 320.")


# Verdicts


def one(**algorithms):
    """The verdict for a single site, from the share of right answers of each algorithm."""
    (found,) = verdicts({name: [run(site=right(share))] for name, share in algorithms.items()})
    return found


def test_a_site_shares_what_is_clearly_best_for_it():
    assert one(local=0.3, fedsa=0.6, lora=0.5)["verdict"] == "share A"
    found = one(local=0.3, fedsa=0.5, lora=0.6)
    assert (found["verdict"], found["algorithm"], found["n"]) == ("share all", "lora", ROWS)
    assert found["gain"] == pytest.approx(0.3)
    assert 0 < found["low"] < 0.3 < found["high"]
    assert found["gains"]["fedsa"]["gain"] == pytest.approx(0.2)
    assert one(local=0.3, auto=0.6)["verdict"] == SHARES["auto"]


def test_a_site_stays_alone_where_no_way_is_ahead_and_one_is_clearly_behind():
    found = one(local=0.6, fedsa=0.6, lora=0.3)
    assert (found["verdict"], found["algorithm"]) == (STAY, "lora")
    assert found["high"] < 0
    assert one(local=0.6, fedsa=0.62, lora=0.3)["verdict"] == UNCLEAR, "fedsa may be better"


def test_a_small_difference_is_no_verdict():
    found = one(local=0.5, fedsa=0.55, lora=0.5)
    assert (found["verdict"], found["algorithm"]) == (UNCLEAR, "fedsa")
    assert found["low"] < 0 < found["high"]


def test_rows_are_paired_within_seeds():
    local = [run(site=right(0.5, 20)), run(seed=1, site=right(0.2, 20))]
    lora = [run(site=right(0.8, 20)), run(seed=1, site=right(0.5, 20))]
    (found,) = verdicts({"local": local, "lora": lora})
    assert found["n"] == 40
    differences = [0] * 10 + [1] * 6 + [0] * 4 + [0] * 4 + [1] * 6 + [0] * 10
    assert [found["low"], found["high"]] == pytest.approx(paired(differences))


def test_every_site_has_its_own_verdict_and_other_steps_or_no_local_give_none():
    local, lora = run(a=right(0.3), b=right(0.7)), run(a=right(0.7), b=right(0.3))
    found = verdicts({"local": [local], "lora": [lora]})
    assert [(v["client"], v["verdict"]) for v in found] == [("a", "share all"), ("b", STAY)]
    assert verdicts({"local": [local], "ditto": [lora]}) == []
    assert verdicts({"lora": [lora]}) == []
    longer = run(80, a=right(0.7), b=right(0.3))
    assert verdicts({"local": [local], "lora": [longer]}) == []


# What is printed


def row(name, personal, steps, **over):
    columns = {"algorithm": name, "seeds": 1, "metric": "exact_match", "personal": personal}
    columns |= {"standard_error": None, "personal_low": personal - 0.1, "worst10": 0.1}
    columns |= {"personal_high": personal + 0.1, "global": 0.2, "untuned": 0.05, "steps": steps}
    columns |= {"passes": 4 * steps, "bytes_up": 35_700_000, "seconds": 24.0}
    for baseline in ("local", "lora"):
        for end, value in zip(("", "_low", "_high"), over.get(baseline, (None,) * 3), strict=True):
            columns[f"gain_over_{baseline}{end}"] = value
    return columns


def test_the_tables_fit_80_columns_and_show_clear_gains_between_equal_steps_only(
    capsys, monkeypatch
):
    monkeypatch.setattr("fedvlm.cli.tables.console_for_tables", lambda: console(80))
    rows = [
        row("ditto", 0.6, 640),
        row("auto", 0.5, 320, local=(0.25, 0.101, 0.4), lora=(0.02, -0.1, 0.15)),
        row("lora", 0.49, 320, local=(0.2, 0.05, 0.35), lora=(0.0, 0.0, 0.0)),
        row("local", 0.4, 320, local=(0.0, 0.0, 0.0), lora=(-0.2, -0.3, -0.1)),
    ]
    sites = {"site-0": right(0.3), "site-1": right(0.7), "site-2": right(0.5)}
    other = {"site-0": right(0.7), "site-1": right(0.3), "site-2": right(0.5)}
    found = verdicts({"local": [run(**sites)], "lora": [run(**other)]})
    print_comparison(Comparison("runs/x", rows, found))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "+25.0 %" in text
    assert "+10 to +40" in text
    assert "+2.0 %" not in text
    assert "unclear" in text
    assert "unequal steps: ditto 640, local 320, lora 320." in " ".join(text.split())
    assert "320" in text
    assert "1,280" in text
    assert "35.7 MB" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["site-0", "share", "all", "lora", "+40.0", "+25.9", "to", "+51.5", "60"] in lines
    assert any(
        line[:3] == ["site-1", "stay", "alone"] and line[-2:] == ["lora", "-40.0"] for line in lines
    )
    assert any(line[:4] == ["site-2", "no", "clear", "difference"] for line in lines)


def console(width):
    from rich.console import Console

    return Console(width=width)


def test_a_comparison_has_steps_passes_and_verdicts_in_its_files(small, tmp_path):
    small["output"], small["train"]["average"] = str(tmp_path / "out"), "none"
    found = fedvlm.compare(["local", "lora", "ditto"], small)
    by_name = {row["algorithm"]: row for row in found.rows}
    steps = 3 * 2 * 2  # sites, rounds, steps
    assert by_name["local"]["steps"] == by_name["lora"]["steps"] == steps
    assert by_name["local"]["passes"] == 4 * steps
    assert by_name["ditto"]["steps"] == 2 * steps
    assert by_name["ditto"]["gain_over_lora"] is by_name["ditto"]["gain_over_local"] is None
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written == {"algorithms": found.rows, "verdicts": found.verdicts}
    assert [v["client"] for v in found.verdicts] == ["site-0", "site-1", "site-2"]
    assert {v["n"] for v in found.verdicts} == {3}
    assert all(list(v["gains"]) == ["lora"] for v in found.verdicts)


# The demo


def test_the_demo_has_equal_budgets_and_curves_of_four_points_or_more():
    runs = planned(demo.ALGORITHMS, demo.SETTINGS)
    assert {"local", "lora", "auto"} < set(demo.ALGORITHMS)
    assert all(f"  {name} " in demo.INTRODUCTION for name in demo.ALGORITHMS)
    assert len({(c.train.steps(50), c.train.rounds, c.train.tuning) for c in runs.values()}) == 1
    for config in runs.values():
        assert config.train.average != "none", "the end of a run is a point of its own"
        assert 1 + config.train.rounds // config.eval.every + 1 >= 4


def test_a_small_demo_prints_a_verdict_for_each_site_and_fits_80_columns(
    tmp_path, capsys, monkeypatch
):
    for module in ("tables", "aftertables"):
        monkeypatch.setattr(f"fedvlm.cli.{module}.console_for_tables", lambda: console(80))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedvlm", "demo", "output=d", *SMALL])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in demo.ALGORITHMS)
    lines = text[text.index("Should a site take part?") :].splitlines()
    assert [line.split()[0] for line in lines if line.startswith(" site-")] == ["site-0", "site-1"]
    assert "unequal" not in text
    asked = text[text.index("  (") :]  # the last table: every model's answer to one picture
    assert all(model in asked for model in ("site-0", "site-1", "global", "untuned"))
    assert Image.open(tmp_path / "d" / "picture.png").size
    assert text.rstrip().endswith(" s")
    below = text[text.index("exact match on every") :].splitlines()
    assert max(len(line) for line in below if not line.startswith("report: ")) <= 80
