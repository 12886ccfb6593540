"""Rows that show the same image stay in one split of a client."""

from __future__ import annotations

import logging

import pytest

from fedvlm.data.partition import SPLITS, Partition, make_partition
from fedvlm.errors import DataError
from tables import config, table


def test_rows_of_an_image_stay_in_one_split():
    paths = [f"{i % 30}.png" for i in range(300)]
    partition = make_partition(table(300, image_path=paths), config(kind="iid", clients=2))
    for split in partition.splits.values():
        shown = [{paths[row] for row in getattr(split, name)} for name in SPLITS]
        assert not shown[0] & shown[1]
        assert not shown[0] & shown[2]
        assert not shown[1] & shown[2]


def shown_twice(partition: Partition, shown: list) -> int:
    """The number of test rows that show what their client trains on."""
    return sum(
        shown[row] in {shown[other] for other in [*split.train, *split.val]}
        for split in partition.splits.values()
        for row in split.test
    )


@pytest.mark.parametrize("form", ["files", "hashes"])
def test_rows_of_one_file_or_of_the_same_bytes_stay_in_one_split(form):
    shown = [f"{i // 4}.png" for i in range(48)]
    files = [{"bytes": None, "path": path} for path in shown]
    images = files if form == "files" else [{"bytes": bytes([i]), "path": "x"} for i in range(48)]
    more = {"image_hash": shown} if form == "hashes" else {}
    rows = table(48, image=images, **more)
    assert shown_twice(make_partition(rows, config(kind="iid", clients=2)), shown) == 0


def test_image_path_decides_and_equal_pictures_under_other_paths_are_counted(caplog):
    paths = [f"{i}.png" for i in range(40)]
    rows = table(40, image_path=paths)
    equal = rows.add_column("image_hash", ["same"] * 40)
    asked = config(kind="iid", clients=2)
    assert make_partition(equal, asked) == make_partition(rows, asked)
    assert "10 of 10 test rows show a picture that the same client trains on" in caplog.text


def test_rows_without_a_path_are_grouped_by_their_bytes():
    paths = [*[f"{i}.png" for i in range(20)], *[None] * 20]
    shown = [*[f"h{i}" for i in range(20)], *[f"g{i // 4}" for i in range(20, 40)]]
    rows = table(40, image_path=paths, image_hash=shown)
    assert shown_twice(make_partition(rows, config(kind="iid", clients=2)), shown) == 0


def test_different_images_are_split_as_if_there_were_no_hashes():
    paths = [f"{i // 2}.png" for i in range(60)]
    rows = table(60, image_path=paths)
    plain = make_partition(rows, config(kind="iid", clients=3))
    hashed = make_partition(rows.add_column("image_hash", paths), config(kind="iid", clients=3))
    assert hashed == plain
    alone = table(60)
    unlike = alone.add_column("image_hash", [f"{i * 7919 % 60}" for i in range(60)])
    asked = config(kind="iid", clients=3)
    assert make_partition(unlike, asked) == make_partition(alone, asked)


def test_rows_without_an_image_path_are_split_one_by_one():
    rows = table(40, image_path=[None] * 38 + ["a.png", "a.png"])
    partition = make_partition(rows, config(kind="iid", clients=2))
    assert partition.counts()["client-0"]["test"] == 5


def test_a_client_with_one_image_is_refused():
    rows = table(40, image_path=["a.png"] * 40)
    with pytest.raises(DataError, match=r"'client-0' has 20 rows of a single image"):
        make_partition(rows, config(kind="iid", clients=2))


def test_test_images_that_others_train_on_are_reported(caplog):
    paths = [f"{i // 2}.png" for i in range(40)]
    rows = table(40, image_path=paths, site=["a", "b"] * 20)
    with caplog.at_level(logging.WARNING, logger="fedvlm"):
        partition = make_partition(rows, config(kind="column", column="site"))
    tests = [{paths[row] for row in split.test} for split in partition.splits.values()]
    assert tests[0] == tests[1]  # images have the same order in all clients
    assert not caplog.text
    uneven = table(12, image_path=[*"abcdefghij", "a", "b"], site=["x"] * 10 + ["y"] * 2)
    with caplog.at_level(logging.WARNING, logger="fedvlm"):
        for seed in range(20):
            make_partition(uneven, config(seed, kind="column", column="site", min_rows=2))
    assert "show an image that another client trains on" in caplog.text


# Skew
