"""Clients from lists of row numbers, and labels from clusters of the answers."""

import json
import logging
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvlm.config import dump, load
from fedvlm.data.clusters import cluster_codes
from fedvlm.data.partition import Partition, make_partition
from fedvlm.errors import ConfigError, DataError
from fedvlm.planning.forecast import forecast
from fedvlm.rounds.prepare import divide
from test_partition import config, everyone, sizes, table

TOPICS = {
    "colour": ["The colour is red.", "It is a blue colour.", "A green colour, mostly."],
    "count": ["There are three objects.", "I count five objects.", "Two objects in all."],
    "sport": ["They play tennis here.", "A match of tennis.", "A tennis player."],
}


def talk(n=120, seed=0):
    """Topics, and free-text answers about them. No two answers are equal."""
    rng = np.random.default_rng(seed)
    topics = rng.choice(list(TOPICS), n)
    return topics, [f"{rng.choice(TOPICS[t])} Number {i}." for i, t in enumerate(topics)]


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(6, 120),
    clients=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    shift=st.integers(0, 1000),
    clusters=st.sampled_from([None, 2, 3]),
)
def test_listed_rows_go_to_their_client_and_to_one_split(n, clients, seed, shift, clusters):
    order = np.random.default_rng(seed).permutation(n)
    parts = np.array_split(order + shift, clients)
    lists = {f"c{k}": part.tolist() for k, part in enumerate(parts)}
    rows = table(n, row=[i + shift for i in range(n)], answer=talk(n, seed)[1])
    asked = config(seed, kind="explicit", lists=lists, min_rows=1, clusters=clusters)
    partition = make_partition(rows, asked)
    assert everyone(partition) == list(range(n))
    for client, split in partition.splits.items():
        mine = np.concatenate([split.train, split.val, split.test])
        assert sorted(mine + shift) == sorted(lists[client])
    saved = json.loads(json.dumps(partition.to_dict()))
    assert Partition.from_dict(saved) == partition == make_partition(rows, asked)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(["dirichlet", "shards"]),
    seed=st.integers(0, 2**31),
    clusters=st.integers(2, 6),
)
def test_every_row_has_one_client_when_the_labels_are_clusters(kind, seed, clusters):
    rows = table(120, answer=talk(120, seed)[1])
    asked = config(seed, kind=kind, clusters=clusters, clients=4, min_rows=2, alpha=1.0)
    partition = make_partition(rows, asked)
    assert everyone(partition) == list(range(120))
    assert partition == make_partition(rows, asked)


def test_lists_come_from_json_and_yaml_files(tmp_path):
    rows = table(8)
    lists = {"north": [0, 2, 4, 6], "south": [1, 3, 5, 7]}
    (tmp_path / "a.json").write_text(json.dumps(lists))
    (tmp_path / "a.yaml").write_text("north: [0, 2, 4, 6]\nsouth: [1, 3, 5, 7]\n")
    inline = make_partition(rows, config(kind="explicit", lists=lists, min_rows=2))
    for name in ("a.json", "a.yaml"):
        asked = config(kind="explicit", lists=str(tmp_path / name), min_rows=2)
        assert make_partition(rows, asked) == inline
    assert inline.clients == ("north", "south")


def test_a_json_file_may_have_tabs_and_names_stay_text(tmp_path):
    rows = table(8)
    lists = {"no": [0, 2, 4, 6], "on": [1, 3, 5, 7]}
    (tmp_path / "a.json").write_text(json.dumps(lists, indent="\t"))
    (tmp_path / "a.yaml").write_text("no: [0, 2, 4, 6]\non: [1, 3, 5, 7]\n")
    (tmp_path / "b.yaml").write_text("007: [0, 2, 4, 6]\n1e2: [1, 3, 5, 7]\n")
    for name, clients in (("a.json", ("no", "on")), ("a.yaml", ("no", "on")),
                          ("b.yaml", ("007", "1e2"))):  # fmt: skip
        asked = config(kind="explicit", lists=str(tmp_path / name), min_rows=2)
        assert make_partition(rows, asked).clients == clients


def test_inline_lists_survive_the_saved_configuration(tmp_path):
    asked = load(None, "partition={kind: explicit, lists: {1: [0, 1], b: [2, 3]}}")
    (tmp_path / "config.yaml").write_text(dump(asked))
    assert load(tmp_path / "config.yaml") == asked
    assert asked.partition.lists == {"1": [0, 1], "b": [2, 3]}


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"a": [0, 1, 2, 3, 4], "b": [5, 6]}, r"leaves out 3 of 10 rows, the first is row 7"),
        (
            {"a": [0, 1, 2, 3, 4], "b": [5, 6, 7, 8, 9, 17, 10]},
            r"names 2 missing rows.* row 17: .*9",
        ),
        ({"a": [0, 1, 2, 3, 4, 5, 6, 7, 8], "b": [9]}, r"1 of 2 clients .* 2 rows: b \(1\)"),
    ],
)
def test_lists_that_do_not_fit_the_data_are_refused(lists, said):
    with pytest.raises(DataError, match=said):
        make_partition(table(10), config(kind="explicit", lists=lists, min_rows=2))


def test_listed_rows_that_were_skipped_are_no_mistake(caplog):
    rows = table(8).select([0, 1, 2, 3, 5, 6, 7])
    lists = {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7]}
    with pytest.raises(DataError, match="names 1 missing row, the first is row 4"):
        make_partition(rows, config(kind="explicit", lists=lists, min_rows=2))
    asked = config(0, {"on_error": "skip"}, kind="explicit", lists=lists, min_rows=2)
    with caplog.at_level(logging.WARNING, logger="fedvlm"):
        assert sizes(make_partition(rows, asked)) == [4, 3]
    assert "1 listed rows were left out" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{a: [0", "cannot be used"),
        ("[1, 2]", "a mapping of clients to row numbers"),
        ("{a: [0, 1], b: [1, 2]}", r"1 rows are listed more than once, such as row 1 \(by a, b\)"),
    ],
)
def test_a_file_of_lists_that_cannot_be_used_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "a.yaml").write_text(content)
    asked = config(kind="explicit", lists=str(tmp_path / "a.yaml"))
    with pytest.raises(DataError, match=rf"partition.lists '.*a.yaml' .*{said}"):
        make_partition(table(10), asked)


@pytest.mark.parametrize(
    ("partition", "said"),
    [
        ("{kind: explicit}", "kind=explicit needs partition.lists"),
        ("{lists: {a: [0]}}", r"partition.lists needs kind=explicit \(got kind=auto\)"),
        ("{kind: explicit, lists: 3}", "a mapping of clients to row numbers"),
        ("{kind: explicit, lists: {}}", "a mapping of clients to row numbers"),
        ("{kind: explicit, lists: {a: []}}", r"client 'a' has \[\]"),
        ("{kind: explicit, lists: {a: [0, -1]}}", "client 'a' lists -1; row numbers are 0, 1"),
        ("{kind: explicit, lists: {a: [0, x]}}", "client 'a' lists 'x'"),
        ("{kind: explicit, lists: {a: [0, 1], b: [1, 0]}}", "2 rows are listed more than once"),
        ("{kind: shards, clusters: 1}", "partition.clusters: .*greater than or equal to 2"),
        ("{kind: shards, clusters: 3, column: idx}", "partition.column or partition.clusters"),
        ("{clusters: 3}", "partition.clusters labels the rows of kind=dirichlet, shards"),
        ("{kind: column}", "kind=column needs partition.column"),
    ],
)
def test_mistakes_are_found_when_the_configuration_is_read(partition, said):
    with pytest.raises(ConfigError, match=said):
        load(None, f"partition={partition}")


def test_clusters_find_the_topics_of_free_text():
    topics, answers = talk()
    codes, names = cluster_codes(answers, 3, seed=0)
    found = {names[code]: set(topics[codes == code]) for code in range(3)}
    assert sorted(map(tuple, found.values())) == [("colour",), ("count",), ("sport",)]
    assert next(name for name, of in found.items() if of == {"sport"}).startswith("tennis")


def test_clusters_give_free_text_a_skew_that_its_answers_do_not():
    rows = table(120, answer=talk()[1])
    partition = make_partition(rows, config(kind="shards", clusters=3, clients=6, shards=1))
    assert partition.label == "answer cluster"
    assert all(skew.distinct <= 2 for skew in partition.skew.values())
    assert "tennis" in partition.table()


def test_clusters_that_share_their_words_have_names_of_their_own():
    names = cluster_codes(["a b", "a c", "1", "2", "a", "b", "c d"], 5, seed=1)[1]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["yes", "no"] * 20, r"clusters=3, but there are 2 different answers: lower it"),
        (["?", "!", "...", "-"] * 10, "the answers hold no words"),
    ],
)
def test_answers_that_make_no_clusters_are_refused(answers, said):
    with pytest.raises(DataError, match=said):
        make_partition(table(40, answer=answers), config(kind="dirichlet", clusters=3, clients=2))


@pytest.mark.parametrize("do", [divide, forecast])
def test_without_scikit_learn_clusters_are_refused_before_any_row_is_read(do, monkeypatch):
    asked = load(None, "partition={kind: dirichlet, clusters: 3}", "data.path=no/such.parquet")
    with pytest.raises(DataError, match="does not exist"):
        do(asked)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DataError, match=r"clusters=3 needs .* pip install 'fedvlm\[clusters\]'"):
        do(asked)


def test_without_scikit_learn_every_other_partition_is_made(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    rows = table(40, answer=["yes", "no"] * 20)
    for kind in ("iid", "dirichlet", "shards", "quantity"):
        assert everyone(make_partition(rows, config(kind=kind, clients=2))) == list(range(40))
    with pytest.raises(DataError, match=r"fedvlm\[clusters\]"):
        make_partition(rows, config(kind="dirichlet", clusters=2, clients=2))
