"""One value has one text, whatever its type: in one file, and in several files of one data set."""

import datetime
import logging
from decimal import Decimal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedvlm.data.assign import by_column
from fedvlm.data.labels import binned_codes, texts
from fedvlm.errors import DataError
from test_records import clients, load, rows_of, write
from test_sources import own_cache, parquet  # noqa: F401  (own_cache is a fixture)


def labelled(path, codes, names, column="site"):
    """A parquet file with a column of class labels."""
    kind = datasets.ClassLabel(names=names)
    parquet(path, n=len(codes), **{column: codes})
    rows = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    rows.cast_column(column, kind).to_parquet(path)
    return path


def test_class_labels_of_several_files_are_their_names(tmp_path):
    labelled(tmp_path / "a.parquet", [0, 0, 1, 1], ["north", "south"])
    labelled(tmp_path / "b.parquet", [0, 0, 1, 1], ["east", "north"])
    parquet(tmp_path / "c.parquet", site=["south", "south", "west", "west"])
    found = {name: len(part) for name, part in clients(load(tmp_path)).items()}
    assert found == {"north": 4, "south": 4, "east": 2, "west": 2}


def test_answers_in_class_labels_of_several_files_are_their_names(tmp_path):
    labelled(tmp_path / "a.parquet", [0, 1], ["yes", "no"], "chosen")
    labelled(tmp_path / "b.parquet", [0, 1], ["no", "yes"], "chosen")
    assert load(tmp_path)["answer"][:] == ["yes", "no", "no", "yes"]


def test_a_class_number_without_a_name_is_refused(tmp_path):
    path = labelled(tmp_path / "a.parquet", [0, 1], ["yes", "no"])
    table = pq.read_table(path)
    table = table.set_column(table.column_names.index("site"), "site", pa.array([0, 7]))
    notes = pq.read_schema(path).metadata
    pq.write_table(table.replace_schema_metadata(notes), path)
    with pytest.raises(DataError, match=r"'site' holds class number 7, but it names 2 classes"):
        load(path)


DAY, MIDNIGHT = datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1)
ZONES = [pa.timestamp("s", tz=zone) for zone in ("UTC", "Europe/Berlin", "Mars/Base")]


@pytest.mark.parametrize(
    ("one", "two", "text"),
    [
        (pa.array([Decimal("7.00")]), pa.array([7]), "7"),
        (pa.array([Decimal("1.5")]), pa.array([Decimal("1.50")]), "1.5"),
        (pa.array([0.1], pa.float32()), pa.array([0.1]), "0.1"),
        (pa.array([DAY]), pa.array([MIDNIGHT]), "2024-01-01"),
        (pa.array([MIDNIGHT], pa.timestamp("s")), pa.array([MIDNIGHT], pa.timestamp("ns")),
         "2024-01-01 00:00:00"),
        (pa.array([0], ZONES[0]), pa.array([0], ZONES[1]), "1970-01-01 00:00:00+00:00"),
    ],
)  # fmt: skip
def test_equal_values_of_two_types_are_one_client_with_a_warning(tmp_path, caplog, one, two, text):
    write(tmp_path / "unused.csv", rows_of("a"))
    (tmp_path / "unused.csv").unlink()
    for name, column in (("a", one), ("b", two)):
        table = pa.Table.from_pylist(rows_of("x")).set_column(3, "site", column)
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with caplog.at_level(logging.WARNING, logger="fedvlm"):
        assert list(clients(load(tmp_path))) == [text]
    assert "the column 'site' holds" in caplog.text
    assert "in 'b.parquet'; all of them are read as text" in caplog.text


@pytest.mark.parametrize(
    ("column", "found"),
    [
        (pa.array([1, 2], pa.time64("ns")), ["00:00:00.000000001", "00:00:00.000000002"]),
        (pa.array([0, 10**12], pa.timestamp("s")), ["1970-01-01 00:00:00"]),
        (pa.array([0, 3600], ZONES[2]), ["1970-01-01 00:00:00+00:00", "1970-01-01 01:00:00+00:00"]),
        (pa.array([0, 10**16], pa.date64()), ["1970-01-01"]),
        (pa.array([1, 2**62], pa.duration("s")), ["0:00:01"]),
        (pa.array([1, 2], pa.duration("ns")), ["0:00:00 1 ns", "0:00:00 2 ns"]),
        (pa.array([500_000, 0], pa.timestamp("us")), ["1970-01-01 00:00:00.500000"]),
    ],
)
def test_any_time_has_a_text_of_its_own(column, found):
    made = texts(column, None)
    assert made[: len(found)] == found
    assert made[0] != made[1]


def test_uuids_name_clients(tmp_path):
    write(tmp_path / "unused.csv", rows_of("a"))
    table = pa.Table.from_pylist(rows_of("x"))
    table = table.set_column(3, "site", pa.array([bytes(16)], pa.uuid()))
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(clients(load(tmp_path / "a.parquet"))) == ["00000000-0000-0000-0000-" + "0" * 12]


def test_names_of_thousands_of_digits_are_in_natural_order():
    names = ["2" * 5000, "site-10", "site-2", "1" * 5000, "1" * 5001]
    found = list(by_column(np.array(names, object), "site", 1))
    assert found == ["1" * 5000, "2" * 5000, "1" * 5001, "site-2", "site-10"]


@pytest.mark.parametrize("extreme", [["inf", "-inf"], [str(10**400), str(-(10**400))]])
def test_extreme_numbers_are_put_into_bins(extreme):
    codes, _ = binned_codes(np.array([*map(str, range(48)), *extreme], object))
    assert codes[48] == codes.max()
    assert codes[49] == 0


@pytest.mark.parametrize(
    ("pair", "why"),
    [
        (("Zürich", "Zu\u0308rich"), "Unicode normalization"),
        (("A", "A\u200b"), "invisible characters"),
        (("North", "north"), "case"),
    ],
)
def test_names_that_look_alike_stay_apart_with_a_warning(caplog, pair, why):
    found = by_column(np.array(pair, object), "site", 1)
    assert set(found) == set(pair)
    assert why in caplog.text


def test_numbers_of_json_have_one_text_in_files_of_several_types(tmp_path, caplog):
    write(tmp_path / "a.jsonl", rows_of([1, 1.0]))
    write(tmp_path / "b.jsonl", rows_of(["1", "2"]))
    assert list(clients(load(tmp_path))) == ["1", "2"]
    assert "'site' holds numbers and whole numbers in 'a.jsonl', text in 'b.jsonl'" in caplog.text
