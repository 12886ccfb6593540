"""The personalization benchmark: ranks of the algorithms, and the tables with them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import personalization
from _personalization import pages, targets
from _personalization import ranks as ranking

# Ranks


def seeds(*scores: float) -> dict[int, float]:
    return dict(enumerate(scores))


def test_ranks_count_who_is_ahead_and_share_a_place_within_one_standard_error():
    scores = {
        "first": seeds(0.50, 0.60, 0.70),
        "close": seeds(0.52, 0.57, 0.69),  # -0.02, 0.03, 0.01 behind: 0.007 with an error of 0.015
        "last": seeds(0.10, 0.20, 0.30),
    }
    assert ranking.ranks(scores) == {"first": 1.5, "close": 1.5, "last": 3.0}
    assert ranking.winners(scores) == {"first", "close"}
    assert ranking.best(scores) == "first"


def test_a_lead_that_every_seed_has_is_no_tie_however_much_the_seeds_differ():
    scores = {"ahead": seeds(0.11, 0.51, 0.91), "behind": seeds(0.10, 0.50, 0.90)}
    assert ranking.ranks(scores) == {"ahead": 1.0, "behind": 2.0}
    assert ranking.winners(scores) == {"ahead"}


def test_with_one_seed_only_equal_scores_are_tied():
    scores = {"a": seeds(0.5), "b": seeds(0.5), "c": seeds(0.499)}
    assert ranking.ranks(scores) == {"a": 1.5, "b": 1.5, "c": 3.0}


def test_clearly_behind_is_two_standard_errors():
    scores = {"best": seeds(0.4, 0.6), "near": seeds(0.37, 0.55)}  # 0.04 behind, error 0.01
    assert ranking.clearly_behind(scores, "near")
    scores["near"] = seeds(0.39, 0.53)  # 0.04 behind, error 0.03: behind, but not clearly
    assert ranking.winners(scores) == {"best"}
    assert not ranking.clearly_behind(scores, "near")
    assert not ranking.clearly_behind(scores, "best")


def test_the_overview_leaves_out_cells_that_lack_an_algorithm_or_a_seed():
    whole = {"a": seeds(0.5, 0.6), "b": seeds(0.3, 0.4)}
    worst = {"a": seeds(0.2, 0.4), "b": seeds(0.1, 0.1)}
    found = {
        "whole": whole,
        "lacks b": {"a": seeds(0.1, 0.1)},
        "lacks a seed": {"a": seeds(0.1, 0.1), "b": seeds(0.9)},
    }
    rows = ranking.overview(found, dict.fromkeys(found, worst), ["a", "b"])
    assert [(r.algorithm, r.rank, r.won, r.cells) for r in rows] == [("a", 1, 1, 1), ("b", 2, 0, 1)]
    assert rows[0].mean == pytest.approx(0.55)
    assert rows[0].worst10 == pytest.approx(0.3)


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


def row(algorithm: str, seed: int, value: float, regime: str = "mixed", worst: float = 0.0) -> dict:
    return {
        "regime": regime,
        "strength": 1.0,
        "rows_per_client": 24,
        "seed": seed,
        "algorithm": algorithm,
        "model": "personal",
        "when": "after",
        "mean": value,
        "worst10": worst or value / 2,
        "bytes_up": 2e6,
        "rounds_to_90": 4,
    }


def rows_of(values: dict, regime: str = "mixed") -> list[dict]:
    return [row(a, s, v, regime) for a, all_ in values.items() for s, v in enumerate(all_)]


def test_the_tables_show_the_best_and_leave_pooled_rows_out_of_the_ranks():
    rows = rows_of({"lora": (0.2, 0.3), "plora": (0.5, 0.6), "centralized": (0.9, 0.9)})
    assert "| `plora` | 1.00 | 1 of 1 | 55.0 | 27.5 |" in pages.overview(rows)
    assert "centralized" not in pages.overview(rows)
    assert "| `plora` | **55.0 ± 5.0** |" in pages.regimes(rows)
    assert "| `centralized` | 90.0 ± 0.0 |" in pages.regimes(rows)
    assert "| mixed-1-24 | 2 |  | 25.0 | 55.0 (`plora`) | no | yes |" in pages.pays(rows)
    assert "| `plora` | 2 | 55.0 ± 5.0 |" in pages.details(rows)


def test_a_cell_is_judged_where_it_has_three_seeds_or_no_cell_has():
    few = rows_of({"lora": (0.9, 0.9), "auto": (0.1, 0.1)}, "label")
    enough = rows_of({"lora": (0.1, 0.2, 0.3), "auto": (0.2, 0.3, 0.4)})
    assert pages.judged(few) == (few, [])
    assert pages.judged(few + enough) == (enough, few)
    assert pages.seeds(few + enough) == "2 to 3 seeds"
    assert pages.seeds(rows_of({"lora": (0.1,)})) == "1 seed"
    text = personalization.written(few + enough, "state", {}, ".")
    assert "| `auto` | 1.00 | 1 of 1 | 30.0 |" in text
    assert "### Cells with one or two seeds, not counted above" in text
    assert "| `lora` | 1.00 | 1 of 1 | 90.0 |" in text
    assert "yes: 1 of 1 cells |" in text
    assert "not counted" not in personalization.written(enough, "state", {}, ".")


def test_algorithms_that_were_run_in_few_cells_have_a_table_of_their_own_by_common_seeds():
    values = {"lora": (0.2, 0.3, 0.9), "plora": (0.5, 0.6, 0.9), "ffa": (0.6, 0.7)}
    rows = rows_of(values) + rows_of({"lora": (0.4,), "plora": (0.3,)}, "label")
    assert {r["algorithm"] for r in pages.main(rows)} == {"lora", "plora"}
    found = pages.everyone(rows)
    assert "mixed-1-24, seeds 0, 1 |" in found
    assert "label" not in found, "only the main algorithms were run in that cell"
    lines = found.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["`ffa`", "`plora`", "`lora`"]
    assert "| `ffa` | 1.0 | **65.0 ± 5.0** |" in found
    assert "| `plora` | 2.0 | 55.0 ± 5.0 |" in found
    assert pages.everyone(pages.main(rows)) == "Only the algorithms above were run yet."
    alone = rows_of({"ffa": (0.6,)})
    assert pages.main(alone) == alone


def test_the_targets_of_the_default_are_judged_from_the_results():
    values = {"auto": (0.50, 0.60), "lora": (0.20, 0.30), "local": (0.40, 0.44)}
    rows = rows_of(values)
    reached = targets.targets(rows)
    assert (
        "| (a) within one standard error of the best in every cell | yes: 1 of 1 cells |" in reached
    )
    assert "yes: `auto` 1.00, `local` 2.00, `lora` 3.00 |" in reached
    assert "yes: 1 of 1 cells, 2.2 to 2.2 times |" in reached
    assert "yes: 1 of 1 comparisons |" in reached
    assert (
        "on average yes: `auto` 27.5, `local` 21.0, `lora` 12.5; the highest in 1 of 1" in reached
    )
    other = {"auto": (0.30, 0.33), "lora": (0.30, 0.30), "local": (0.40, 0.45), "ffa": (0.9, 0.9)}
    missed = targets.targets(rows + rows_of(other, "label"))
    assert "**no**: 1 of 2 cells; behind by label-1-24 58.5 ± 1.5 (`ffa`) |" in missed
    assert "missed in label-1-24 1.05 times (the best of all: 3.00) |" in missed
    assert "below by label-1-24 11.0 ± 1.0 (`local`) |" in missed
    assert targets.targets(rows_of({"lora": (0.2,)})) == "`auto` was not compared yet."
