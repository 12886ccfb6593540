"""The personalization benchmark: ranks of the algorithms, and the tables with them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import personalization
from _personalization import pages, scores, targets
from _personalization import ranks as ranking
from _personalization.cells import MAIN, Cell

# Ranks


def pairs(*values: float) -> dict[tuple[int, str], float]:
    return {(seed, "site-0"): value for seed, value in enumerate(values)}


def test_ranks_count_who_is_ahead_and_share_a_place_within_one_standard_error():
    found = {
        "first": pairs(0.50, 0.60, 0.70),
        "close": pairs(0.52, 0.57, 0.69),  # -0.02, 0.03, 0.01 behind: 0.007 with an error of 0.012
        "last": pairs(0.10, 0.20, 0.30),
    }
    assert ranking.ranks(found) == {"first": 1.5, "close": 1.5, "last": 3.0}
    assert ranking.winners(found) == {"first", "close"}
    assert ranking.best(found) == "first"
    assert ranking.winners({}) == set()


def test_a_lead_that_every_pair_has_is_no_tie_however_much_the_pairs_differ():
    found = {"ahead": pairs(0.11, 0.51, 0.91), "behind": pairs(0.10, 0.50, 0.90)}
    assert ranking.ranks(found) == {"ahead": 1.0, "behind": 2.0}
    assert ranking.winners(found) == {"ahead"}


def test_one_seed_of_several_clients_has_a_standard_error():
    found = {
        "ahead": {(0, "a"): 0.6, (0, "b"): 0.2, (0, "c"): 0.4},
        "tied": {(0, "a"): 0.3, (0, "b"): 0.5, (0, "c"): 0.3},
    }
    assert ranking.winners(found) == {"ahead", "tied"}


def test_with_one_pair_only_equal_scores_are_tied():
    found = {"a": pairs(0.5), "b": pairs(0.5), "c": pairs(0.499)}
    assert ranking.ranks(found) == {"a": 1.5, "b": 1.5, "c": 3.0}


def test_the_block_is_the_most_results_with_the_same_algorithms_and_common_pairs():
    whole = {"a": pairs(0.5, 0.6), "b": pairs(0.3, 0.4)}
    found = {
        "whole": whole | {"c": pairs(0.1)},
        "lacks c": whole,
        "lacks b": {"a": pairs(0.1, 0.1)},
        "nothing in common": {"a": pairs(0.1), "b": {(9, "site-0"): 0.9}},
    }
    names, cells = ranking.block(found)
    assert (names, cells) == (["a", "b"], ["whole", "lacks c"])
    rows = ranking.overview({c: found[c] for c in cells}, names)
    assert [(r.algorithm, r.rank, r.won) for r in rows] == [("a", 1, 2), ("b", 2, 0)]
    assert rows[0].mean == pytest.approx(0.55)
    assert ranking.block({"alone": {"a": pairs(0.1)}}) == (["a"], ["alone"])


def test_algorithms_are_compared_by_the_pairs_that_all_have():
    found = ranking.common({"a": pairs(0.5, 0.9), "b": pairs(0.3)})
    assert found == {"a": pairs(0.5), "b": pairs(0.3)}


@pytest.mark.parametrize(
    ("curve", "round_"),
    [
        ({0: 0.1, 2: 0.44, 4: 0.46, 6: 0.5}, 4),
        ({0: 0.5, 2: 0.3, 4: 0.5}, 0),  # the score at the start is enough
        ({0: 0.9, 2: 0.3, 4: 0.5}, 0),
        ({0: 0.0, 2: 0.0}, None),
        ({}, None),
        ({4: 1.0, 2: 0.9, 0: 0.0}, 2),
    ],
)
def test_rounds_to_90_is_the_first_evaluated_round_at_nine_tenths_of_the_last(curve, round_):
    assert ranking.rounds_to(curve) == round_


# Tables


def row(algorithm: str, seed: int, value: float, regime: str = "mixed", steps: int = 720) -> dict:
    real = regime.startswith("vqarad")
    clients = {
        f"site-{k}": {"exact_match": v / (2 if real else 1), "token_f1": v, "examples": 24}
        for k, v in enumerate((value - 0.02, value, value + 0.02))
    }
    return {
        "regime": regime,
        "strength": None if real else 1.0,
        "rows_per_client": 24,
        "seed": seed,
        "algorithm": algorithm,
        "model": "personal",
        "when": "after",
        "mean": value,
        "worst10": value / 2,
        "steps": steps,
        "passes": 4 * steps,
        "bytes_up": 2e6,
        "rounds_to_90": 4,
        "seconds": 40.0,
        "clients": 2,
        "rows": 48,
        "metric": "token_f1" if real else "exact_match",
        "scores": clients,
    }


def rows_of(values: dict, regime: str = "mixed", **more) -> list[dict]:
    return [row(a, s, v, regime, **more) for a, all_ in values.items() for s, v in enumerate(all_)]


def test_scores_are_of_clients_and_the_steps_of_a_cell_are_those_of_the_default():
    rows = rows_of({"auto": (0.5, 0.6), "lora": (0.4,)}) + rows_of({"ditto": (0.9,)}, steps=1440)
    (cell,) = found = scores.scores(rows)
    assert found[cell]["lora"] == pytest.approx(
        {(0, "site-0"): 0.38, (0, "site-1"): 0.4, (0, "site-2"): 0.42}
    )
    assert scores.unequal(rows) == {cell: {"ditto"}}
    assert set(scores.ranked(rows)[cell]) == {"auto", "lora"}
    lead = scores.gap(found[cell], {"ditto"}, "lora")
    assert (lead.value, lead.pairs) == (pytest.approx(-0.1), 3)


def test_without_the_default_the_most_frequent_number_of_steps_counts():
    rows = rows_of({"lora": (0.4,), "local": (0.4,)}) + rows_of({"ditto": (0.9,)}, steps=1440)
    assert list(scores.unequal(rows).values()) == [{"ditto"}]


def test_no_gain_is_printed_between_runs_of_unequal_steps():
    rows = rows_of({"auto": (0.5, 0.6), "local": (0.3, 0.4)})
    rows += rows_of({"lora": (0.2, 0.2), "ditto": (0.9, 0.9)}, steps=1440)
    shown = pages.matrix(rows)
    assert "90.0 (unequal steps)" in shown
    assert "**90.0**" not in shown
    assert "`ditto`" not in pages.overview(rows).split("\n\n")[0]
    assert "unequal steps: `ditto`, `lora`" in pages.overview(rows)
    assert "no run of equal steps to compare with" in targets.targets(rows)
    assert "| `ditto` | 6 | 90.0 | unequal steps |" in pages.details(rows)
    assert targets.ratio(rows).startswith("RATIO nan ")
    assert scores.gap(scores.scores(rows)[Cell("mixed", 1.0, 24)], {"ditto"}, "ditto") == (
        scores.UNEQUAL
    )


def test_the_tables_show_intervals_and_costs_and_do_not_rank_references():
    rows = rows_of({"auto": (0.5, 0.6), "lora": (0.2, 0.3), "centralized": (0.9, 0.9)})
    found = pages.overview(rows)
    assert "| `auto` | 1.00 | 1 of 1 | 55.0 | 27.5 | 720 | 2880 | 2.0 | 40 |" in found
    assert "centralized" not in found
    shown = pages.matrix(rows)
    assert "| mixed-1-24 | 6 (96) | 720 | **55.0** | 25.0 (-30.0 [-30.0, -30.0]) | 90.0 (" in shown
    assert "| mixed-1-24 | 6 |  | 25.0 | 55.0 (`auto`) |  | yes +30.0 [" in pages.pays(rows)
    assert "| `lora` | 6 | 25.0 | -30.0 [-30.0, -30.0] |" in pages.details(rows)
    assert pages.seeds(rows) == "2 seeds"
    assert pages.seeds(rows + rows_of({"lora": (0.1,)}, "label")) == "1 to 2 seeds"
    assert targets.ratio(rows).startswith("RATIO 2.200 personal models of auto / lora")


def test_a_lead_whose_interval_holds_zero_does_not_pay():
    values = {"local": (0.5, 0.6, 0.1, 0.9), "lora": (0.6, 0.4, 0.7, 0.5)}
    line = pages.pays(rows_of(values)).splitlines()[-1]
    assert "not shown +2.5 [" in line


def test_algorithms_that_were_run_in_few_cells_have_a_table_of_their_own_by_common_pairs():
    values = {"lora": (0.2, 0.3, 0.9), "plora": (0.5, 0.6, 0.9), "ffa": (0.6, 0.7)}
    rows = rows_of(values) + rows_of({"lora": (0.4,), "plora": (0.3,)}, "label")
    assert {r["algorithm"] for r in scores.main(rows)} == {"lora", "plora"}
    found = pages.everyone(rows)
    assert "mixed-1-24, 6 pairs |" in found
    assert "label" not in found, "only the main algorithms were run in that cell"
    lines = found.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["`ffa`", "`plora`", "`lora`"]
    assert "| `ffa` | 1.0 | **65.0** |" in found
    assert "| `plora` | 2.0 | 55.0 |" in found
    assert pages.everyone(scores.main(rows)) == "Only the algorithms above were run yet."
    alone = rows_of({"ffa": (0.6,)})
    assert scores.main(alone) == alone


def test_real_cells_are_apart_and_show_each_site():
    synthetic = rows_of({"auto": (0.5,), "lora": (0.2,)})
    real = rows_of({"auto": (0.4,), "lora": (0.3,)}, "vqarad-site6-smol")
    assert scores.parts(synthetic + real) == (synthetic, real)
    assert scores.is_real(Cell("photos", None, 80))
    text = personalization.written(synthetic + real, "state", {}, ".", "- the settings")
    first, second = text.split("## Real cells")
    assert "vqarad" not in first
    assert "- the settings" in second
    assert "### vqarad-site6-smol-24, by site: token F1 (exact match)" in second
    assert "| `auto` | 40.0 (20.0) | 38.0 (19.0) | 40.0 (20.0) | 42.0 (21.0) |" in second
    assert "## Real cells" not in personalization.written(synthetic, "state", {}, ".")


# Targets


def line(text: str, name: str) -> str:
    (found,) = [each for each in text.splitlines() if each.startswith(f"| {name}")]
    return found


def why(text: str, name: str, kind: str = "synthetic cells") -> str:
    """The reason below the table."""
    (found,) = [each for each in text.splitlines() if each.startswith(f"- {name} {kind}: ")]
    return found.partition(": ")[2]


def test_the_targets_of_the_default_are_judged_from_the_results():
    values = {"auto": (0.50, 0.60), "lora": (0.20, 0.30), "local": (0.40, 0.44)}
    rows = rows_of(values)
    reached = targets.targets(rows)
    assert line(reached, "(a)").endswith("| yes | no such cell yet |")
    assert why(reached, "(a)") == "1 of 1 cells."
    assert "| yes, but not shown |" in line(reached, "(b)"), "one cell shows no rank"
    first = "`auto` 1.00, `local` 2.00, `lora` 3.00; ahead by 1.00 [1.00, 1.00]"
    assert why(reached, "(b)").startswith(first)
    assert "| yes |" in line(reached, "(c)")
    over = "reached in 1 of 1 cells, shown by the interval in 1; mixed-1-24 2.20 ["
    assert why(reached, "(c)").startswith(over)
    assert "| not compared |" in line(reached, "(c2)")
    assert "no run of equal steps" in why(reached, "(c2)")
    assert "| yes |" in line(reached, "(d)")
    assert "| yes, but not shown |" in line(reached, "(e)")
    assert why(reached, "(e)").startswith("`auto` 27.5, `local` 21.0, `lora` 12.5; +6.5 [")
    assert max(map(len, reached.split("\n\n")[0].splitlines())) < 110, "no sentence in a cell"
    other = {"auto": (0.30, 0.33), "lora": (0.30, 0.30), "local": (0.40, 0.45), "ffa": (0.9, 0.9)}
    missed = targets.targets(rows + rows_of(other, "concept"))
    assert "**no**" in line(missed, "(a)")
    assert why(missed, "(a)").startswith("1 of 2 cells; behind in concept-1-24 -58.5 [")
    assert why(missed, "(c)").startswith("reached in 1 of 2 cells")
    assert "below in concept-1-24 -11.0 [" in why(missed, "(d)")
    assert targets.targets(rows_of({"lora": (0.2,)})) == "`auto` was not compared yet."


def test_real_cells_have_their_own_column_of_targets():
    rows = rows_of({"auto": (0.50,), "local": (0.60,)}, "vqarad-site6-smol")
    found = targets.targets(rows)
    assert line(found, "(a)").endswith("| no such cell yet | **no** |")
    assert why(found, "(a)", "real cells").startswith("0 of 1 cells;")


def test_a_lead_that_the_interval_does_not_show_is_not_claimed():
    values = {"auto": (0.9, 0.2, 0.5, 0.3), "lora": (0.2, 0.5, 0.1, 0.3)}
    found = targets.gain(targets.compared(rows_of(values)), "lora")
    assert found.startswith(
        "yes, but not shown: reached in 1 of 1 cells, shown by the interval in 0"
    )


def test_lines_of_code_leave_out_texts_and_comments():
    source = '"""Doc\n\nstring."""\n\nX = 1  # why\n\n\n# alone\n'
    source += 'def f():\n    """Doc."""\n    return (\n        X\n    )\n'
    assert targets.lines_of(source) == (13, 5)
    assert targets.length().startswith(("yes", "**no**"))


def test_the_main_part_has_the_default_and_its_strong_rivals():
    assert {"auto", "local", "fedsa", "plora", "lora", "lora+ft"} <= set(MAIN["algorithms"])
