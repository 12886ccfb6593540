"""Every row goes to one client and one split, for every kind of partition."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedvlm.data import assign
from fedvlm.data.partition import SPLITS, Partition, Split, make_partition
from fedvlm.data.skew import measure
from fedvlm.errors import DataError
from fedvlm.settings.sections import DataConfig
from tables import config, table
from work import lines

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
DRAWN = ("iid", "dirichlet", "shards", "quantity")


def sizes(partition: Partition) -> list[int]:
    return [len(split) for split in partition.splits.values()]


def everyone(partition: Partition) -> list[int]:
    return sorted(
        int(row) for s in partition.splits.values() for name in SPLITS for row in getattr(s, name)
    )


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from([*DRAWN, "column"]),
    n=st.integers(2, 150),
    clients=st.integers(1, 12),
    least=st.integers(1, 12),
    labels=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    fractions=st.tuples(st.floats(0, 0.5), st.floats(0, 0.49)),
    shared=st.booleans(),
)
def test_every_row_has_one_client_and_one_split(
    kind, n, clients, least, labels, seed, fractions, shared
):
    extra = {"image_path": [f"{i // 2}.png" for i in range(n)]} if shared else {}
    rows = table(n, labels, seed % 1000, **extra)
    asked = config(
        seed,
        {"val_fraction": fractions[0], "test_fraction": fractions[1]},
        kind=kind,
        clients=clients,
        min_rows=least,
        column="answer" if kind == "column" else None,
    )
    try:
        partition = make_partition(rows, asked)
    except DataError:
        # Two rows may be one image; three never are. Only iid deals more than the minimum to all.
        enough = 3 if shared else 2
        certain = kind == "iid" or (kind == "quantity" and (least >= 3 or not shared))
        assume(certain and n >= clients * max(enough, least))
        raise
    assert everyone(partition) == list(range(n))
    for split in partition.splits.values():
        assert len(split.train) >= 1
        assert len(split.test) >= 1
        assert len(split) >= max(2, least)
        if shared:
            images = [{i // 2 for i in getattr(split, name)} for name in SPLITS]
            assert sum(map(len, images)) == len(set().union(*images))
    saved = json.loads(json.dumps(partition.to_dict()))
    assert Partition.from_dict(saved) == partition
    assert make_partition(rows, asked) == partition


@pytest.mark.parametrize("kind", DRAWN)
def test_another_seed_gives_another_partition(kind):
    rows = table()
    one, other = (make_partition(rows, config(seed, kind=kind, clients=4)) for seed in (0, 1))
    assert one != other


def drawn() -> str:
    """A partition of each drawn kind, as text."""
    made = [make_partition(table(), config(3, kind=kind, clients=4)) for kind in DRAWN]
    return json.dumps([partition.to_dict() for partition in made])


def test_the_partition_does_not_depend_on_pythonhashseed():
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # not that of this process
    there = subprocess.run(
        [sys.executable, "-c", "import test_partition; print(test_partition.drawn(), end='')"],
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout == drawn()


def test_iid_clients_have_equal_sizes_and_hardly_any_skew():
    partition = make_partition(table(1000), config(kind="iid", clients=4))
    assert sizes(partition) == [250] * 4
    assert partition.clients == ("client-0", "client-1", "client-2", "client-3")
    assert partition.mean_divergence() < 0.02


def test_a_smaller_alpha_gives_more_skew():
    rows = table(4000, labels=10)
    skews = [
        make_partition(
            rows, config(kind="dirichlet", alpha=alpha, clients=8, min_rows=2)
        ).mean_divergence()
        for alpha in (0.05, 0.5, 100.0)
    ]
    assert skews[0] > 2 * skews[1] > 4 * skews[2]


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 1e3, 1e300])
def test_extreme_alphas_still_assign_every_row(alpha):
    rows = table(labels=40)
    partition = make_partition(rows, config(kind="dirichlet", alpha=alpha, clients=4))
    assert everyone(partition) == list(range(200))


def test_an_impossible_dirichlet_draw_ends_and_says_what_it_reached(monkeypatch):
    draws, cuts = [], assign._cuts

    def counted(*args):
        draws.append(cuts(*args))
        assert len(draws) <= 1000
        return draws[-1]

    monkeypatch.setattr(assign, "_cuts", counted)
    with pytest.raises(DataError, match=r"left a client with \d+ rows.*asks for 45: raise"):
        make_partition(
            table(labels=3), config(kind="dirichlet", alpha=0.01, clients=4, min_rows=45)
        )


def test_free_text_answers_warn_that_dirichlet_gives_no_skew(caplog):
    rows = table(answer=[f"An answer of its own, {i}" for i in range(200)])
    with caplog.at_level(logging.WARNING, logger="fedvlm"):
        make_partition(rows, config(kind="dirichlet", clients=4))
    assert "200 of 200 labels are distinct" in caplog.text


def test_shards_give_a_client_few_labels():
    rows = table(answer=[f"answer {i % 10}" for i in range(200)])
    partition = make_partition(rows, config(kind="shards", clients=5, shards=2))
    assert sizes(partition) == [40] * 5
    assert all(skew.distinct <= 2 for skew in partition.skew.values())


def test_quantity_sizes_follow_the_power_law():
    partition = make_partition(table(1100), config(kind="quantity", clients=3, exponent=1.0))
    assert sizes(partition) == [600, 300, 200]
    steep = make_partition(table(1100), config(kind="quantity", clients=5, exponent=50.0))
    assert sizes(steep) == [1060, 10, 10, 10, 10]


def test_clients_by_column_come_in_natural_order():
    site = [f"site-{i % 11}" for i in range(220)]
    partition = make_partition(table(220, site=site), config(kind="column", column="site"))
    assert partition.clients == tuple(f"site-{k}" for k in range(11))
    for client, split in partition.splits.items():
        assert {site[row] for row in [*split.train, *split.val, *split.test]} == {client}


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([1.0, 2.0] * 20, ("1", "2")),
        ([10, 9] * 20, ("9", "10")),
        ([True, False] * 20, ("False", "True")),
    ],
)
def test_clients_by_numbers_and_flags(values, names):
    partition = make_partition(table(40, ward=values), config(kind="column", column="ward"))
    assert partition.clients == names


def test_auto_is_by_site_for_scenes_and_iid_for_other_data():
    rows = table(40, site=["a", "b"] * 20)
    assert make_partition(rows, config(data={"path": None})).clients == ("a", "b")
    assert make_partition(rows, config(clients=2)).clients == ("client-0", "client-1")
    assert make_partition(table(40), config(data={"path": None}, clients=2)).kind == "iid"


def test_a_column_without_a_kind_gives_one_client_for_each_value():
    rows = table(40, ward=["a", "b"] * 20)
    for data in ({}, {"path": None}):
        partition = make_partition(rows, config(data=data, column="ward"))
        assert (partition.kind, partition.clients) == ("column", ("a", "b"))


def test_own_data_without_a_partition_warns_and_names_likely_columns(caplog):
    rows = table(80, ward=["a", "b"] * 40, note=[f"note {i}" for i in range(80)])
    with caplog.at_level(logging.WARNING, logger="fedvlm"):
        make_partition(rows, config())
    assert "dealt at random to 8 clients" in caplog.text
    assert "set partition.column=NAME; columns that may name clients: ward (2 values)" in (
        caplog.text
    )
    caplog.clear()
    for asked in ({"kind": "iid"}, {"clients": 4}, {"column": "ward"}):
        make_partition(rows, config(**asked))
    assert not caplog.text


def test_names_that_differ_in_white_space_stay_apart_with_a_warning(caplog):
    rows = table(40, site=["a", "a "] * 20)
    with caplog.at_level(logging.WARNING, logger="fedvlm"):
        partition = make_partition(rows, config(kind="column", column="site"))
    assert set(partition.clients) == {"a", "a "}
    assert "such as 'a' and 'a '" in caplog.text


@pytest.mark.parametrize("kind", ["dirichlet", "shards"])
def test_numbers_as_text_are_labels_like_numbers(kind):
    ages = np.random.default_rng(0).integers(0, 100, 400).tolist()
    made = [
        make_partition(table(400, age=of), config(kind=kind, column="age", clients=4))
        for of in (ages, [str(age) for age in ages])
    ]
    assert made[0] == made[1]
    odd = make_partition(
        table(400, age=[f"{age:03}" for age in ages]), config(kind=kind, column="age", clients=4)
    )
    assert all(len(name) == 3 for name in odd.frequent)  # texts, not bins


def test_a_numeric_label_with_many_values_is_binned():
    age = np.random.default_rng(0).normal(50, 20, 1000).tolist()
    rows = table(1000, age=age)
    partition = make_partition(rows, config(kind="dirichlet", column="age", clients=4))
    names = {text for skew in partition.skew.values() for text, _ in skew.top}
    assert 5 <= len(names) <= 10
    assert all(".." in name for name in names)
    assert partition.label == "age"
    assert partition.mean_divergence() > 0.05


def test_the_answer_can_be_named_as_in_the_source():
    rows = table(labels=2)
    partition = make_partition(rows, config(kind="column", column="chosen"))
    assert partition.clients == ("answer 0", "answer 1")


# Splits


def test_fractions_are_met_in_every_client():
    partition = make_partition(table(400), config(kind="iid", clients=4))
    assert partition.counts()["client-2"] == {"train": 65, "val": 10, "test": 25}


def test_the_smallest_client_still_trains_and_tests():
    partition = make_partition(table(4), config(kind="iid", clients=2, min_rows=1))
    assert list(partition.counts().values()) == [{"train": 1, "val": 0, "test": 1}] * 2


def test_divergences_match_hand_computed_values():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    apart = [np.array([0, 1, 2, 3]), np.array([4, 5, 6, 7])]
    found = list(measure(labels, apart, ["a", "b"], np.array([1])))
    # p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4): (log2(4/3) + log2(2/3)/2 + log2(2)/2) / 2
    expected = (np.log2(4 / 3) + 0.5 * np.log2(2 / 3) + 0.5) / 2
    assert [skew.divergence for skew in found] == pytest.approx([expected, expected])
    assert [skew.counts for skew in found] == [(0,), (4,)]
    alike = [np.array([0, 1, 4, 5]), np.array([2, 3, 6, 7])]
    found = list(measure(labels, alike, ["a", "b"], np.array([0])))
    assert [skew.divergence for skew in found] == [0.0, 0.0]
    assert [skew.top for skew in found] == [(("a", 2), ("b", 2))] * 2


def test_many_clients_are_not_more_work_each():
    def work(clients):
        def divide():
            partition = make_partition(rows, config(kind="iid", clients=clients, min_rows=2))
            text = partition.table(most=20)
            assert len(text.splitlines()) == 23
            assert f"and {clients - 20} more" in text

        rows = table(4 * clients, labels=20)
        return lines(divide) / clients

    assert work(3000) < 1.5 * work(600)


def test_the_table_shows_counts_divergence_and_frequent_answers():
    rows = table(40, answer=["yes", "no"] * 20, site=["a", "b"] * 20)
    partition = make_partition(rows, config(kind="column", column="site"))
    assert partition.table().splitlines() == [
        "client  train  val  test  divergence  most frequent answer",
        "a          13    2     5       0.311  yes 100 %",
        "b          13    2     5       0.311  no 100 %",
        "all        26    4    10       0.311  (mean divergence)",
    ]


@pytest.mark.parametrize("tree", [{}, {"clients": [{"client": "a"}]}, {"clients": 3}])
def test_what_is_no_saved_partition_is_refused(tree):
    with pytest.raises(DataError, match="not a saved partition"):
        Partition.from_dict(tree)


def test_splits_compare_by_their_rows():
    one = Split(np.array([1]), np.array([2]), np.array([3]))
    assert one == Split(np.array([1]), np.array([2]), np.array([3]))
    assert one != Split(np.array([2]), np.array([1]), np.array([3]))
    assert one != 3


# Errors


@pytest.mark.parametrize("kind", DRAWN)
def test_more_clients_than_rows_are_refused(kind):
    with pytest.raises(DataError, match=r"clients=50.*there are 40: lower partition.clients"):
        make_partition(table(40), config(kind=kind, clients=50, min_rows=1))


def test_more_shards_than_rows_are_refused():
    with pytest.raises(DataError, match=r"makes 60 shards, but there are 40 rows"):
        make_partition(table(40), config(kind="shards", clients=2, shards=30))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards", "column"])
def test_a_bad_column_lists_those_that_exist(kind):
    with pytest.raises(DataError, match=r"'hospital' is not .* columns question, answer, row"):
        make_partition(table(), config(kind=kind, column="hospital", clients=2))


def test_a_column_with_too_many_values_fails_by_min_rows():
    with pytest.raises(DataError, match=r"200 of 200 clients .* 0 \(1\), 1 \(1\).* and 195 more"):
        make_partition(table(), config(kind="column", column="row"))


def test_a_small_client_by_column_is_named():
    rows = table(40, site=["a"] * 36 + ["tiny"] * 4)
    with pytest.raises(DataError, match=r"1 of 2 clients .* fewer than 10 rows: tiny \(4\)"):
        make_partition(rows, config(kind="column", column="site"))


@pytest.mark.parametrize("missing", [None, "", " "])
def test_rows_without_a_client_are_refused(missing):
    rows = table(40, site=["a"] * 35 + [missing] * 5)
    with pytest.raises(DataError, match=r"5 rows have no value .* row 35"):
        make_partition(rows, config(kind="column", column="site"))


@pytest.mark.skipif(not SHARED.exists(), reason=f"no sample data in {SHARED}")
def test_real_photos_partition_by_every_kind(tmp_path, monkeypatch):
    from fedvlm.data.sources import load_rows

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    asked = {"path": str(SHARED / "photos.parquet")}
    rows = load_rows(DataConfig(path=asked["path"], max_rows=4000), 0)
    for kind in DRAWN:
        assert everyone(make_partition(rows, config(0, asked, kind=kind))) == list(range(4000))
    by_task = make_partition(rows, config(0, asked, kind="column", column="origin_dataset"))
    assert len(by_task.clients) == 6
    assert by_task.mean_divergence() > 0.1
