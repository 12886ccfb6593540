"""The plots show the given numbers legibly."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from fedvlm.errors import FedVLMError
from fedvlm.figures import style
from fedvlm.figures.plots import figure_comparison, figure_run, plot_comparison, plot_run
from fedvlm.figures.series import client_names, last_scores, worst_tenth
from fedvlm.metrics import standard_error, summarize


def metrics_line(round_, personal=None, shared=None):
    """One line of metrics.jsonl; scores are {client: exact match}."""
    evaluation = None
    if personal is not None:
        evaluation = {"personal": _block(personal), "global": _block(shared or personal)}
    return {"round": round_, "cohort": list(personal or ()), "evaluation": evaluation}


def _block(scores):
    return {
        client: {"loss": 1.0, "exact_match": v, "token_f1": v / 2, "rouge_l": v, "examples": 30}
        for client, v in scores.items()
    }


def run(end, clients=8, start=0.1):
    """Three rounds, of which 0 and 2 are evaluated; client k scores k percent above the base."""
    names = [f"site-{k}" for k in range(clients)]
    return [
        metrics_line(0, {n: start + k / 100 for k, n in enumerate(names)}),
        metrics_line(1),
        metrics_line(
            2,
            {n: end + k / 100 for k, n in enumerate(names)},
            {n: end / 2 + k / 100 for k, n in enumerate(names)},
        ),
    ]


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines}


def test_run_curves_are_the_means_over_clients():
    curves, _ = figure_run(run(0.5), "a run").axes
    personal, shared = lines_of(curves)["personal: mean"], lines_of(curves)["global: mean"]
    assert list(personal.get_xdata()) == [0, 2]
    assert personal.get_ydata() == pytest.approx([0.135, 0.535])
    assert shared.get_ydata() == pytest.approx([0.135, 0.285])
    assert lines_of(curves)["personal: worst"].get_ydata() == pytest.approx([0.1, 0.5])


def test_run_bars_are_the_clients_scores_at_the_end():
    _, clients = figure_run(run(0.5, clients=2), "a run").axes
    heights = [bar.get_height() for bar in clients.patches]
    assert heights == pytest.approx([0.1, 0.11, 0.25, 0.26, 0.5, 0.51])
    assert [tick.get_text() for tick in clients.get_xticklabels()] == ["site-0", "site-1"]


def test_a_client_that_misses_the_last_evaluation_keeps_its_earlier_score():
    lines = [
        metrics_line(0, {"a": 0.1, "b": 0.2, "c": 0.3}),
        metrics_line(1, {"a": 0.5, "b": 0.6}),
        metrics_line(2, {"a": 0.7}),
    ]
    assert last_scores(lines, "personal", "exact_match") == {"a": 0.7, "b": 0.6}
    curves, clients = figure_run(lines, "gaps").axes
    means = lines_of(curves)["personal: mean"].get_ydata()
    assert means == pytest.approx([0.2, 0.55, 0.7])
    assert len(clients.patches) == 3 + 2 + 2


def test_one_client_has_no_worst_client():
    curves, _ = figure_run(run(0.5, clients=1), "one").axes
    assert set(lines_of(curves)) == {"personal: mean", "global: mean"}


def test_many_clients_become_sorted_curves():
    _, clients = figure_run(run(0.0, clients=100), "many").axes
    values = lines_of(clients)["personal"].get_ydata()
    assert not clients.patches
    assert values == pytest.approx([k / 100 for k in range(100)])


def test_another_metric_is_drawn_when_asked():
    curves, _ = figure_run(run(0.5), "a run", metric="token_f1").axes
    assert lines_of(curves)["personal: mean"].get_ydata()[-1] == pytest.approx(0.2675)
    with pytest.raises(FedVLMError, match="'loss': choose one of exact_match, token_f1, rouge_l"):
        figure_run(run(0.5), "a run", metric="loss")


def test_a_run_without_evaluations_is_drawn_empty():
    curves, clients = figure_run([metrics_line(1)], "early").axes
    assert [text.get_text() for text in curves.texts] == ["not evaluated"]
    assert not clients.patches


def test_comparison_curves_are_means_over_seeds_with_a_band_of_one_standard_error():
    results = {"plora": [run(0.4), run(0.6)], "lora": [run(0.3), run(0.3)]}
    curves, summary, clients, _ = figure_comparison(results, "two").axes
    assert lines_of(curves)["plora"].get_ydata() == pytest.approx([0.135, 0.535])
    band = curves.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(0.635)  # the means 0.435, 0.635: standard error 0.1
    assert "2 seeds" in summary.get_title()
    cells = clients.images[0].get_array()  # [untuned, plora, lora] x clients
    assert cells.shape == (3, 8)
    assert list(cells[:, 0]) == pytest.approx([0.1, 0.5, 0.3])


def test_one_seed_has_no_band():
    curves, summary, *_ = figure_comparison({"plora": [run(0.4)]}, "one").axes
    assert not curves.collections
    assert "one seed" in summary.get_title()


def test_comparison_says_where_algorithms_ended_in_different_rounds():
    longer = [*run(0.4), metrics_line(3, {"site-0": 0.5})]
    _, summary, *_ = figure_comparison({"lora": [run(0.4)], "lora+ft": [longer]}, "two").axes
    labels = [tick.get_text() for tick in summary.get_yticklabels()]
    assert labels == ["lora\n(round 2)", "lora+ft\n(round 3)"]


def test_seeds_are_compared_at_the_rounds_that_all_of_them_evaluated():
    unfinished = run(0.4)[:1]
    curves, *_ = figure_comparison({"plora": [run(0.4), unfinished]}, "two").axes
    assert list(lines_of(curves)["plora"].get_xdata()) == [0]


def test_nothing_to_compare_is_refused():
    with pytest.raises(FedVLMError, match="no run was evaluated"):
        figure_comparison({"plora": [[metrics_line(1)]]}, "none")


@pytest.mark.parametrize("clients", [1, 20, 100])
def test_png_opens_and_has_the_expected_size(tmp_path, clients):
    one = plot_run(run(0.5, clients), tmp_path / "new" / "run.png", "a run")
    algorithms = {name: [run(0.3, clients)] * 3 for name in ("plora", "lora", "fedsa")}
    many = plot_comparison(algorithms, tmp_path / "compare.png", "a comparison")
    with Image.open(one) as image:
        assert image.size == (1650, 690)
        image.load()
    with Image.open(many) as image:
        assert image.size[0] == 1650
        assert 900 < image.size[1] < 1300
        image.load()


def test_site_names_do_not_overlap():
    figure = figure_run(run(0.5), "few")
    figure.canvas.draw()
    boxes = [tick.get_window_extent() for tick in figure.axes[1].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    many = figure_run(run(0.5, clients=20), "many").axes[1].get_xticklabels()
    assert {tick.get_rotation() for tick in many} == {40}


@pytest.mark.parametrize("clients", [1, 8, 19, 20, 35])
def test_worst_tenth_is_the_one_in_the_tables(clients):
    scores = {str(k): (k * 7 % clients) / clients for k in range(clients)}
    assert worst_tenth(scores) == pytest.approx(summarize(scores)["worst10"])


def test_worst_tenth_is_the_mean_of_the_lowest_clients():
    assert worst_tenth({"a": 0.5, "b": 0.2}) == 0.2
    assert worst_tenth({str(k): k / 20 for k in range(20)}) == pytest.approx(0.025)
    assert standard_error([0.4, 0.6]) == pytest.approx(0.1)
    assert math.isnan(standard_error([0.4]))


def test_clients_are_in_natural_order():
    assert client_names([{"site-10": 0.0, "site-2": 0.0}, {"north": 0.0}]) == [
        "north",
        "site-2",
        "site-10",
    ]


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, fedvlm.figures.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


ODD = [
    "$5 and $6",
    r"\frac{1",
    "a_b^c $x^",
    "_hidden",
    "%d {0}",
    "line\nline\x00\x1b[31m\tend",
    "x" * 10_000,
    "שלום مرحبا",
    "一只狗",
    "\ud800",
    "",
]


@pytest.mark.parametrize("name", ODD)
def test_any_text_can_name_a_client_an_algorithm_and_a_run(tmp_path, name):
    lines = [metrics_line(k, {name: 0.1 * k, "b": 0.2}) for k in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_run(lines, tmp_path / "run.png", name)
        plot_comparison({name: [lines], "lora": [run(0.2)]}, tmp_path / "both.png", name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["both.png", "run.png"]


def test_names_are_shown_as_text_in_ticks_legends_and_titles():
    figure = figure_run([metrics_line(0, {"$a_b^c$": 0.1})], "$x^2$ and \\frac")
    assert figure.get_suptitle() == "$x^2$ and \\frac"
    (tick,) = figure.axes[1].get_xticklabels()
    assert tick.get_text() == "$a_b^c$"
    texts = [text for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(texts) >= 2
    assert not any(text.get_parse_math() for text in texts)
    curves, summary, heat, _ = figure_comparison({"_mine": [run(0.4)]}, "hidden?").axes
    assert "_mine" in [text.get_text().strip() for text in curves.get_legend().get_texts()]
    assert "_mine" in [tick.get_text() for tick in summary.get_yticklabels()]
    assert "_mine" in [tick.get_text() for tick in heat.get_yticklabels()]


@given(st.text(max_size=60))
@settings(max_examples=20, deadline=None)
def test_the_text_of_a_figure_is_short_and_printable(name):
    shown = style.text(name * 3)
    assert len(shown) <= 24
    assert all(c.isprintable() or c == "\ufffd" for c in shown)
    shown.encode()
