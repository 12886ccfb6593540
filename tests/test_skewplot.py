"""The picture of a partition shows every client's rows, labels and divergence."""

import warnings

import numpy as np
import pytest

from fedvlm.data.partition import make_partition
from fedvlm.figures.skewplot import figure_partition, plot_partition
from test_partition import config, table


def by_site(answers, sites):
    n = len(answers)
    rows = table(n, answer=list(answers), site=list(sites))
    return make_partition(rows, config(kind="column", column="site", min_rows=2))


def cells(axes):
    return np.asarray(axes.images[0].get_array())


def names(axes):
    return [tick.get_text() for tick in axes.get_xticklabels()]


def test_the_bars_are_the_rows_of_each_split():
    partition = make_partition(table(200), config(kind="quantity", clients=5))
    sizes, _, divergence = figure_partition(partition).axes[:3]
    drawn = [[bar.get_width() for bar in bars] for bars in sizes.containers]
    counts = partition.counts().values()
    assert drawn == [[c[split] for c in counts] for split in ("train", "val", "test")]
    assert [bar.get_width() for bar in divergence.patches] == [
        skew.divergence for skew in partition.skew.values()
    ]


def test_the_heat_map_is_each_clients_shares():
    partition = by_site(["yes"] * 6 + ["no"] * 2 + ["no"] * 8, ["a"] * 8 + ["b"] * 8)
    _, labels, _ = figure_partition(partition).axes
    assert names(labels) == ["no", "yes"]
    assert cells(labels).tolist() == [[0.25, 0.75], [1.0, 0.0]]
    assert [text.get_text() for text in labels.texts] == ["25", "75", "100"]


def test_rare_labels_are_counted_among_all_others():
    rng = np.random.default_rng(0)
    answers = [f"answer {v}" for v in rng.integers(0, 30, 400)]
    partition = by_site(answers, ["a", "b"] * 200)
    _, labels, _ = figure_partition(partition).axes
    assert len(partition.frequent) == 12
    assert names(labels) == [*partition.frequent, "all others"]
    assert cells(labels).sum(axis=1) == pytest.approx([1.0, 1.0])
    for row, client in enumerate(partition.clients):
        split = partition.splits[client]
        mine = [answers[i] for i in (*split.train, *split.val, *split.test)]
        share = mine.count(partition.frequent[0]) / len(mine)
        assert cells(labels)[row, 0] == pytest.approx(share)


def test_a_client_whose_labels_are_rare_elsewhere_is_shown_with_its_own():
    common = [f"answer {i % 14}" for i in range(280)]
    partition = by_site([*common, "oui", "oui", "non"], ["a", "b"] * 140 + ["c"] * 3)
    assert "oui" in partition.frequent
    assert len(partition.frequent) == 12


def test_answers_that_never_repeat_have_no_heat_map():
    rows = table(40, answer=[f"Answer {i}" for i in range(40)])
    partition = make_partition(rows, config(kind="iid", clients=2))
    _, labels, _ = figure_partition(partition).axes
    assert partition.frequent == ()
    assert labels.texts[0].get_text() == "no answer occurs twice"


def test_of_many_clients_a_hundred_are_drawn_and_the_title_says_so():
    partition = make_partition(table(400), config(kind="iid", clients=120, min_rows=2))
    figure = figure_partition(partition)
    assert len(figure.axes[0].get_yticklabels()) == 100
    assert figure.get_suptitle().startswith("120 clients (the first 100 are shown), 400 rows")


@pytest.mark.parametrize("text", ["$5 and $6", "a_b^c $x^", "一只狗", "line\nline", "x" * 500])
def test_any_text_can_be_a_label(tmp_path, text):
    partition = by_site([text, "no"] * 8, [text] * 8 + ["b"] * 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot_partition(partition, tmp_path / "a.png").stat().st_size > 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_same_partition_gives_the_same_picture(tmp_path):
    partition = make_partition(table(), config(kind="dirichlet", clients=4))
    one, other = (plot_partition(partition, tmp_path / name) for name in ("a.png", "b.png"))
    assert one.read_bytes() == other.read_bytes()
