"""A folder of files: which are read, relative to what, and what a warning names."""

import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedvlm.data import embedded, records, sources
from fedvlm.data import parquet as parquet_reader
from fedvlm.data.sources import open_image
from fedvlm.errors import DataError
from test_records import load, rows_of, warnings, write
from test_sources import own_cache, parquet, picture  # noqa: F401  (own_cache is a fixture)
from work import lines


@pytest.mark.parametrize(
    "names", [("train_station", "airport"), ("test_site", "b"), ("dev.team", "other")]
)
def test_names_of_sites_that_begin_like_splits_are_no_splits(tmp_path, names):
    for name in names:
        parquet(tmp_path / f"{name}.parquet", site=[name] * 4)
    assert set(load(tmp_path)["site"][:]) == set(names)


def test_files_beside_the_shards_of_a_split_are_named(tmp_path, caplog):
    parquet(tmp_path / "train.parquet")
    parquet(tmp_path / "test_0.parquet")
    parquet(tmp_path / "hospital2.parquet")
    with caplog.at_level(logging.WARNING, logger="fedvlm"):
        assert len(load(tmp_path)) == 4
    assert "left out 1 files that belong to no split: 'hospital2.parquet'" in warnings(caplog)


def test_first_words_are_splits_if_all_files_have_one(tmp_path):
    for name in ("train-north", "test-north"):
        parquet(tmp_path / f"{name}.parquet", site=[name] * 4)
    assert set(load(tmp_path)["site"][:]) == {"train-north"}
    assert set(load(tmp_path, split="test")["site"][:]) == {"test-north"}


def hospital(folder, colour, name="metadata.jsonl"):
    """A folder with a picture of its own colour, and rows beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(picture(colour))
    made = {"file_name": "a.png", "question": "What?", "chosen": colour, "site": folder.name}
    if name.endswith("csv"):
        lines = [",".join(made), ",".join(made.values())]
        (folder / name).write_text("\n".join(lines))
    else:
        (folder / name).write_text(json.dumps(made) + "\n")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "rows.json"])
def test_paths_in_a_file_are_relative_to_its_own_folder(tmp_path, name):
    (tmp_path / "a.png").write_bytes(picture("white"))
    hospital(tmp_path / "north", "red", name)
    hospital(tmp_path / "south", "blue", name)
    rows = load(tmp_path)
    colours = [open_image(image).getpixel((0, 0)) for image in rows["image"]]
    assert colours == [(255, 0, 0), (0, 0, 255)]
    assert rows["site"][:] == ["north", "south"]


def test_metadata_below_a_folder_with_metadata_is_named(tmp_path, caplog):
    hospital(tmp_path, "red")
    hospital(tmp_path / "south", "blue")
    with caplog.at_level(logging.WARNING, logger="fedvlm"):
        assert load(tmp_path)["answer"][:] == ["red"]
    assert "left out 1 .jsonl file ('metadata.jsonl')" in warnings(caplog)


def test_files_of_rows_that_are_not_read_are_named(tmp_path, caplog):
    write(tmp_path / "a.csv", rows_of("ab"))
    for name in ("b.tsv", "c.ndjson", "d.csv.gz", "e.xlsx", "f.pq", "g.arrow", "h.feather"):
        (tmp_path / name).write_text("x")
    (tmp_path / "c.ndjson").unlink()
    with caplog.at_level(logging.WARNING, logger="fedvlm"):
        load(tmp_path)
    for ending in (".tsv", ".csv.gz", ".xlsx", ".pq", ".arrow", ".feather"):
        assert f"1 {ending} file" in warnings(caplog)


@pytest.mark.parametrize(("suffix", "like"), [("ndjson", "jsonl"), ("tsv", "csv")])
def test_other_suffixes_of_lines_and_tables_are_read(tmp_path, suffix, like):
    options = {"delimiter": "\t"} if like == "csv" else {}
    path = write(tmp_path / f"a.{like}", rows_of("ab"), **options)
    path = path.rename(tmp_path / f"a.{suffix}")
    assert load(path)["site"][:] == load(tmp_path)["site"][:] == ["a", "b"]


def test_an_address_of_a_file_is_its_path(tmp_path):
    address = (tmp_path / "a.png").as_uri()
    write(tmp_path / "a.jsonl", rows_of("a", image=lambda i: address))
    assert open_image(load(tmp_path)["image"][0]).size == (8, 6)


def test_a_folder_of_saved_data_sets_is_refused(tmp_path):
    saved = datasets.Dataset.from_list(rows_of("ab"))
    for name in ("north", "south"):
        saved.save_to_disk(str(tmp_path / name))
    with pytest.raises(DataError, match=r"holds 2 saved data sets, such as 'north'"):
        load(tmp_path)


# Limits


def test_four_times_as_many_columns_are_four_times_as_much_work(tmp_path, monkeypatch):
    tables, init = [], datasets.table.Table.__init__

    def counted(self, *args):
        tables.append(self)
        init(self, *args)

    monkeypatch.setattr(datasets.table.Table, "__init__", counted)

    def work(columns):
        many = {f"c{i}": (lambda i: "x") for i in range(columns)}
        path = write(tmp_path / f"{columns}.csv", rows_of("ab", **many))
        assert load(path)[f"c{columns - 1}"][:] == ["x", "x"]
        path.write_text(path.read_text().replace("x", "y"))  # not in the cache
        tables.clear()
        return lines(load, path), len(tables)

    (few, each), (more, every) = work(100), work(400)
    assert more < 5 * few
    assert every == each > 0, "each column copies all others"


def test_a_new_column_in_every_row_is_refused_beyond_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_COLUMNS", 20)
    made = [row | {f"k{i}": 1} for i, row in enumerate(rows_of("a" * 30))]
    with pytest.raises(DataError, match=r"'.*a\.jsonl' has more than 20 columns"):
        load(write(tmp_path / "a.jsonl", made))
    assert load(write(tmp_path / "b.jsonl", made[:10]))["k9"][:] == [None] * 9 + [1]


def test_rows_without_any_text_are_refused_before_pictures_are_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "check_pictures", None)
    with pytest.raises(DataError, match=r"has 3 of 3 rows .* row 0: the answer is empty"):
        load(write(tmp_path / "a.jsonl", rows_of("abc", chosen=lambda i: " ")))


def test_long_lists_of_numbers_are_decoded_a_few_rows_at_a_time(tmp_path, monkeypatch):
    tables = []
    to_bytes = embedded._table_of_bytes
    monkeypatch.setattr(embedded, "_table_of_bytes", lambda t: tables.append(len(t)) or to_bytes(t))
    long = pa.array([[0] * 2_000_000] * 10, pa.list_(pa.int8()))
    table = pa.Table.from_pylist(rows_of("a" * 10)).set_column(0, "image", long)
    pq.write_table(table, tmp_path / "a.parquet")
    opened, _ = parquet_reader._open(tmp_path / "a.parquet")
    assert parquet_reader._rows_at_a_time(opened, 2**40) == 3
    with pytest.raises(DataError, match=r"10 of 10 rows that cannot be used: row 0: corrupt"):
        load(tmp_path / "a.parquet")
    assert max(tables) <= 8


# CSV as other programs write it, and saved data sets


@pytest.mark.parametrize("head", ["sep=;\r\n", '"sep=;"\r\n', "\r\n\r\n", ";;;\r\n"])
@pytest.mark.parametrize("end", ["", "\x1a", "\r\n\r\n\x1a\r\n"])
def test_lines_before_the_header_and_after_the_rows_are_no_rows(tmp_path, head, end):
    path = write(tmp_path / "a.csv", rows_of(["north", "south"]), delimiter=";")
    text = path.read_bytes().decode()
    path.write_bytes((head + text + end).encode())
    assert load(path)["site"][:] == ["north", "south"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_utf_16_without_a_mark_is_named(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", rows_of("ab"))
    path.write_bytes(path.read_text().encode("utf-16-le"))
    with pytest.raises(DataError, match=r"is not UTF-8 text \(it has zero bytes, as UTF-16 has"):
        load(path)


def test_spaces_in_the_names_of_columns_are_seen(tmp_path):
    text = write(tmp_path / "a.csv", rows_of("ab")).read_text().replace("question", " question")
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=r"its columns are image, ' question', chosen, site"):
        load(tmp_path / "a.csv")


def saved(folder):
    datasets.Dataset.from_list(rows_of("ab")).save_to_disk(str(folder))
    write(folder / "unused.csv", rows_of("a"))
    return folder


def test_a_saved_data_set_that_is_damaged_or_empty_is_one_message(tmp_path):
    damaged = saved(tmp_path / "damaged")
    (damaged / "state.json").write_text("{}")
    empty = saved(tmp_path / "empty")
    datasets.load_from_disk(str(empty)).select([]).save_to_disk(str(tmp_path / "none"))
    for folder in (damaged, tmp_path / "none"):
        with pytest.raises(DataError, match=r"saved data set '.*' is empty or damaged|has no rows"):
            load(folder)


def test_string_views_of_a_saved_data_set_are_texts(tmp_path):
    rows = datasets.Dataset.from_list(rows_of("ab"))
    rows = rows.cast_column("question", datasets.Value("string_view"))
    rows.save_to_disk(str(tmp_path / "views"))
    write(tmp_path / "views" / "unused.csv", rows_of("a"))
    assert load(tmp_path / "views")["question"][:] == ["What?", "What?"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_columns_are_in_one_order_in_every_format(tmp_path, kind):
    rows = load(write(tmp_path / f"a.{kind}", rows_of("ab", age=lambda i: i)))
    assert rows.column_names == [
        *("image", "question", "answer", "row", "site", "age", "image_hash"),
    ]


def test_a_link_keeps_its_name_and_its_folder(tmp_path):
    write(tmp_path / "blobs" / "rows.jsonl", rows_of("ab")).rename(tmp_path / "blobs" / "0f3a")
    (tmp_path / "blobs" / "a.png").rename(tmp_path / "blobs" / "77aa")
    (tmp_path / "snap").mkdir()
    (tmp_path / "snap" / "rows.jsonl").symlink_to("../blobs/0f3a")
    (tmp_path / "snap" / "a.png").symlink_to("../blobs/77aa")
    for path in (tmp_path / "snap" / "rows.jsonl", tmp_path / "snap"):
        assert open_image(load(path)[0]["image"]).size == (8, 6)


@pytest.mark.parametrize("where", [".ipynb_checkpoints", "__MACOSX", ".git/x", "_old"])
def test_hidden_folders_hold_no_rows(tmp_path, where):
    root = tmp_path / ".hidden-itself"
    root.mkdir()
    write(root / "a.jsonl", rows_of("ab"))
    (root / where).mkdir(parents=True)
    for name in (f"{where}/a.jsonl", "._a.jsonl"):
        (root / name).write_text((root / "a.jsonl").read_text())
    assert len(load(root)) == 2


def test_files_of_other_kinds_in_the_folder_are_counted(tmp_path, caplog):
    write(tmp_path / "a.parquet", rows_of("ab"))
    write(tmp_path / "b.csv", rows_of("ab"))
    with caplog.at_level(logging.WARNING, logger="fedvlm"):
        assert len(load(tmp_path)) == 2
    assert "read 1 file, such as 'a.parquet'; left out 1 .csv file" in warnings(caplog)


def test_links_that_lead_nowhere_and_twins_of_a_file_are_no_rows(tmp_path, caplog):
    write(tmp_path / "a.jsonl", rows_of("ab"))
    (tmp_path / "again.jsonl").symlink_to("a.jsonl")
    (tmp_path / "lost.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "round").symlink_to(tmp_path)
    with caplog.at_level(logging.WARNING, logger="fedvlm"):
        assert len(load(tmp_path)) == 2
    assert "left out 1 links" in warnings(caplog)
    assert "'lost.jsonl'" in warnings(caplog)


# Embedded pictures
