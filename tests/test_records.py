"""Text of a file stays the text that was written, in every format, and mistakes name their row."""

import base64
import csv
import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedvlm.data.assign import by_column
from fedvlm.data.labels import values_of
from fedvlm.data.sources import load_rows, open_image
from fedvlm.errors import DataError
from fedvlm.settings.sections import Columns, DataConfig
from test_sources import own_cache, picture  # noqa: F401  (own_cache is a fixture)

FORMATS = ("csv", "jsonl", "json", "parquet")


def rows_of(sites, **columns):
    """One row for each site; keyword arguments are functions of the row's number."""
    made = [
        {"image": "a.png", "question": "What?", "chosen": "This.", "site": site} for site in sites
    ]
    return [row | {name: of(i) for name, of in columns.items()} for i, row in enumerate(made)]


def write(path, rows, **options):
    """Writes rows in the format of the suffix, beside a picture ``a.png``."""
    path.parent.mkdir(exist_ok=True)
    (path.parent / "a.png").write_bytes(picture())
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
            writer = csv.DictWriter(file, list(rows[0]), **options)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, **options))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def load(path, **fields):
    return load_rows(DataConfig(path=str(path), **fields), seed=0)


def clients(rows, column="site"):
    return by_column(values_of(rows, column), column, 1)


def warnings(caplog):
    return " ".join(record.getMessage() for record in caplog.records)


names = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.sampled_from(["007", "07", "7", "7.0", "1e2", "1E2", "100", "NA", "null", "None", "true"]),
    st.sampled_from(
        ["2024-01-01", "nan", " a", "a ", 'say "hi"', "a,b", "a\nb", "a\r\nb", "é", "1 "]
    ),
).filter(lambda text: text.strip())


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sites=st.lists(names, min_size=1, max_size=12, unique=True), kind=st.sampled_from(FORMATS))
def test_a_column_of_any_texts_gives_as_many_clients_of_these_names(tmp_path, sites, kind):
    rows = load(write(tmp_path / f"rows.{kind}", rows_of(sites)))
    parts = clients(rows)
    assert set(parts) == set(sites)
    assert all(sites[int(row)] == name for name, part in parts.items() for row in part)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("sites", [("007", "07"), ("100", "1E2"), ("2024-01-01", "2024-1-1")])
def test_sites_that_are_equal_as_numbers_stay_apart(tmp_path, kind, sites):
    rows = load(write(tmp_path / f"rows.{kind}", rows_of(sites * 3)))
    assert set(clients(rows)) == set(sites)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_dates_are_the_text_that_was_written(tmp_path, kind):
    path = write(tmp_path / f"r.{kind}", rows_of("ab", chosen=lambda i: f"2024-03-{i + 1:02d}"))
    assert load(path)["answer"][:] == ["2024-03-01", "2024-03-02"]


def test_a_json_column_of_one_type_keeps_it_and_one_of_several_becomes_text(tmp_path):
    mixed = [1, "1a", 2.5, True, None]
    made = rows_of("abcde", mixed=lambda i: mixed[i], n=lambda i: i, big=lambda i: 2**64 + i)
    rows = load(write(tmp_path / "a.jsonl", made))
    assert rows["mixed"][:] == ["1", "1a", "2.5", "True", None]
    assert rows["n"][:] == [0, 1, 2, 3, 4]
    assert list(clients(rows, "big")) == [str(2**64 + i) for i in range(5)]


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pa.array([2**63 - 1, None, -1]), [str(2**63 - 1), "", "-1"]),
        (pa.array([1.0, float("nan"), 2.5]), ["1", "", "2.5"]),
        (pa.array([True, None, False]), ["True", "", "False"]),
        (pa.array(["1.50", None, "2.00"]).cast(pa.decimal128(5, 2)), ["1.5", "", "2"]),
        (pa.array(["a", None, "a"]).dictionary_encode(), ["a", "", "a"]),
        (pa.array(["a", None, "thirteen chars"], pa.string_view()), ["a", "", "thirteen chars"]),
        (pa.array([0, None, 86400], pa.timestamp("s")),
         ["1970-01-01 00:00:00", "", "1970-01-02 00:00:00"]),
    ],
)  # fmt: skip
def test_every_scalar_type_of_parquet_has_exact_texts(tmp_path, column, texts):
    table = pa.Table.from_pylist(rows_of("aaa")).set_column(3, "site", column)
    write(tmp_path / "unused.csv", rows_of("a"))
    pq.write_table(table, tmp_path / "a.parquet")
    assert values_of(load(tmp_path / "a.parquet"), "site").tolist() == texts


@pytest.mark.parametrize("view", [pa.string_view(), pa.large_string(), pa.string()])
def test_texts_of_any_arrow_type_are_questions_and_answers(tmp_path, view):
    table = pa.Table.from_pylist(rows_of("ab"))
    table = table.cast(pa.schema([(name, view) for name in table.column_names]))
    write(tmp_path / "unused.csv", rows_of("a"))
    pq.write_table(table, tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet")["answer"][:] == ["This.", "This."]


# Several files


def test_files_of_several_types_and_columns_are_one_table(tmp_path, caplog):
    for kind in ("csv", "jsonl", "parquet"):
        folder = tmp_path / kind
        numbered = [1, 2] if kind != "csv" else ["01", "2"]
        write(folder / f"h0.{kind}", rows_of(numbered))
        write(folder / f"h1.{kind}", rows_of(["B2", "B3"], age=lambda i: 50 + i))
        with caplog.at_level(logging.WARNING, logger="fedvlm"):
            rows = load(folder)
        assert set(clients(rows)) == {str(n) for n in numbered} | {"B2", "B3"}
        assert values_of(rows, "age").tolist() == ["", "", "50", "51"]
        assert f"'h0.{kind}' has no column 'age'" in warnings(caplog)
        assert "2 rows are missing" in warnings(caplog)


def test_whole_numbers_of_one_file_and_floats_of_another_name_the_same_client(tmp_path):
    write(tmp_path / "a.parquet", rows_of([1, 2]))
    write(tmp_path / "b.parquet", rows_of([1.0, 3.0]))
    assert set(clients(load(tmp_path))) == {"1", "2", "3"}


def test_structures_that_cannot_be_united_are_one_sentence(tmp_path):
    write(tmp_path / "a.parquet", rows_of("a", tags=lambda i: [1]))
    write(tmp_path / "b.parquet", rows_of("a", tags=lambda i: "x"))
    with pytest.raises(DataError, match=r"'tags' holds .* in '.*a.parquet', but string in '.*b"):
        load(tmp_path)


# Mistakes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"image": "a.png"}\n{"image": "a.png", "image": ""}\n', r"row 1 \(line 2\).*'image' occ"),
        ('{"x": NaN}\n', r"row 0 \(line 1\).*NaN is not JSON; write null"),
        ('{"x": 1e999}\n', r"row 0 .*number in 'x' is too large"),
        ('{"x": 1}\n\n[1]\n', r"row 1 \(line 3\).*a row is an object with columns, not \[1\]"),
        ('{"x": 1}\n{"x": \n', r"row 1 \(line 2\).*Expecting value"),
        ('{"x": "\\ud800"}\n', r"row 0 .*half of a surrogate pair"),
        ('{"x": ' + "[" * 100_000 + "\n", "nested too deeply"),
        ("[" * 100_000, "row 0"),
        ('[{"x": 1}, {"x": 2}', "row 2 .*the file is cut"),
        ('[{"x": 1} {"x": 2}]', "row 1 .*expected ','"),
        ('[{"x": 1}] x', "row 1 .*stands after the end"),
    ],
)  # fmt: skip
def test_json_that_is_not_valid_is_refused_with_its_row(tmp_path, text, said):
    for kind in ("jsonl", "json"):
        (tmp_path / f"a.{kind}").write_text(text)
        with pytest.raises(DataError, match=said if kind == "jsonl" else "row "):
            load(tmp_path / f"a.{kind}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,question\na.png,one,two\n", "line 2 of .* has 3 cells, but the header has 2"),
        ('image,question\na.png,"x" y\n', "line 2 of .* is not valid CSV"),
        ('image,question\na.png,"x\n', "line 2 of .* is not valid CSV"),
        ("image,site,site\na.png,1,2\n", "the header of .* has two columns 'site'"),
        ("\ufeffimage,question\n", "no rows"),
    ],
)
def test_csv_that_is_not_valid_is_refused_with_its_line(tmp_path, text, said):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        load(tmp_path / "a.csv")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_than_utf8_is_named(tmp_path, kind, encoding):
    path = write(tmp_path / f"a.{kind}", rows_of(["a"]))
    path.write_bytes(path.read_text().replace("What?", "Où ?").encode(encoding))
    with pytest.raises(DataError, match=r"is not UTF-8 text .*save it as UTF-8"):
        load(path)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_semicolons_and_tabs_and_a_byte_order_mark_are_understood(tmp_path, delimiter):
    made = rows_of(["a,b", "c"])
    rows = load(write(tmp_path / "a.csv", made, delimiter=delimiter, encoding="utf-8-sig"))
    assert set(clients(rows)) == {"a,b", "c"}


def test_json_may_be_a_list_with_tabs_or_lines_or_several_objects(tmp_path):
    made = rows_of("ab")
    write(tmp_path / "a.json", made, indent="\t")
    lines = "\n".join(json.dumps(row, indent=1) for row in made)
    (tmp_path / "b.json").write_text("\ufeff" + lines)
    (tmp_path / "c.jsonl").write_text(json.dumps(made))
    for name in ("a.json", "b.json", "c.jsonl"):
        assert load(tmp_path / name)["site"][:] == ["a", "b"]


def test_a_list_longer_than_a_chunk_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("fedvlm.data.records._CHUNK", 7)
    monkeypatch.setattr("fedvlm.data.records._CHARS", 300)
    sites = [f"site-{i}" for i in range(40)]
    assert load(write(tmp_path / "a.json", rows_of(sites)))["site"][:] == sites


def test_a_changed_file_is_read_again_even_at_the_same_time_of_day(tmp_path):
    assert load(write(tmp_path / "a.jsonl", rows_of("ab")))["site"][:] == ["a", "b"]
    assert load(write(tmp_path / "a.jsonl", rows_of("cd")))["site"][:] == ["c", "d"]


# Columns


def test_all_mistakes_of_the_columns_are_one_message(tmp_path):
    path = write(tmp_path / "a.csv", [{"file": "a.png", "ask": "?", "said": "!"}])
    with pytest.raises(DataError) as caught:
        load_rows(DataConfig(path=str(path)), by="hospital")
    for part in ("'image'", "'question'", "'chosen'", "'hospital' for partition.column",
                 "file, ask, said", "data.columns.image=", "data.columns.answer="):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_message_stays_short_whatever_the_columns_are(tmp_path, kind):
    made = {f"{'x' * 10_000}{i}": "v" for i in range(20)} | {f"c{i}": "v" for i in range(2000)}
    path = write(tmp_path / f"a.{kind}", [made])
    columns = Columns(image="i" * 10_000, question="q" * 10_000)
    with pytest.raises(DataError) as caught:
        load(path, columns=columns)
    assert len(str(caught.value)) < 2000


def test_columns_are_checked_before_rows_are_converted(tmp_path, monkeypatch):
    monkeypatch.setattr("fedvlm.data.records.converted", lambda *_: pytest.fail("converted"))
    with pytest.raises(DataError, match="no column 'image'"):
        load(write(tmp_path / "a.jsonl", [{"x": 1}]))


@pytest.mark.parametrize("name", ["row", "answer", "image_hash"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_column_with_one_of_our_names_gets_a_free_one(tmp_path, name, kind):
    more = {name: lambda i: f"own {i}", f"source_{name}": lambda i: f"other {i}"}
    rows = load(write(tmp_path / f"a.{kind}", rows_of("ab", **more)))
    assert rows[f"source_{name}"][:] == ["other 0", "other 1"]
    assert rows[f"source_{name}_2"][:] == ["own 0", "own 1"]
    load_rows(DataConfig(path=str(tmp_path / f"a.{kind}")), by=f"source_{name}_2")


def test_a_column_that_cannot_name_clients_says_what_it_holds(tmp_path):
    path = write(tmp_path / "a.jsonl", rows_of("ab", ward=lambda i: [i, "x"][i]))
    assert set(clients(load(path), "ward")) == {"0", "x"}
    path = write(tmp_path / "b.jsonl", rows_of("ab", ward=lambda i: [i]))
    with pytest.raises(DataError, match="'ward' holds lists or objects, but a client's name"):
        load_rows(DataConfig(path=str(path)), by="ward")


# Files


def embedded(kind):
    content = picture("blue")
    return {
        "base64": base64.b64encode(content).decode(),
        "wrapped": base64.encodebytes(content).decode(),
        "uri": "data:image/png;base64," + base64.b64encode(content).decode(),
        "numbers": list(content),
        "in a structure": {"bytes": list(content), "path": "x.png"},
        "text in a structure": {"bytes": base64.b64encode(content).decode(), "path": None},
    }[kind]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize(
    "kind", ["base64", "wrapped", "uri", "numbers", "in a structure", "text in a structure"]
)
def test_pictures_as_text_or_as_numbers_become_bytes(tmp_path, form, kind):
    if form == "csv" and not isinstance(embedded(kind), str):
        pytest.skip("CSV holds text only")
    path = write(tmp_path / f"a.{form}", rows_of("ab", image=lambda i: embedded(kind)))
    rows = load(path)
    assert [row["image"]["bytes"] for row in rows] == [picture("blue")] * 2


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int64()])
@pytest.mark.parametrize("many", [pa.list_, pa.large_list, pa.list_view])
def test_pictures_as_typed_lists_become_bytes(tmp_path, kind, many):
    table = pa.Table.from_pylist(rows_of("ab"))
    images = pa.array([list(picture("blue"))] * 2, many(kind))
    write(tmp_path / "unused.csv", rows_of("a"))
    pq.write_table(table.set_column(0, "image", images), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet")[1]["image"]["bytes"] == picture("blue")


def test_paths_stand_beside_embedded_pictures(tmp_path):
    forms = ["a.png", embedded("base64"), embedded("uri"), "9jpg"]
    path = write(tmp_path / "a.jsonl", rows_of("abcd", image=lambda i: forms[i]))
    (tmp_path / "9jpg").write_bytes(picture("red"))
    rows = load(path)
    assert [open_image(row["image"]).getpixel((0, 0))[2] for row in rows] == [0, 255, 255, 0]
    assert rows[0]["image"]["path"] == str(tmp_path / "a.png")


def test_numbers_that_are_no_bytes_are_a_corrupt_row(tmp_path):
    path = write(
        tmp_path / "a.jsonl", rows_of("ab", image=lambda i: [[300, -1], list(picture())][i])
    )
    with pytest.raises(DataError, match=r"1 of 2 rows.*row 0: corrupt image"):
        load(path)


# Limits


def bomb(path, megabytes):
    value = "x" * 1_000_000
    column = pa.array([value] * megabytes).dictionary_encode()
    table = pa.Table.from_pylist(rows_of("a" * megabytes)).append_column("note", column)
    pq.write_table(table, path, compression="zstd")
    (path.parent / "a.png").write_bytes(picture())


def test_a_small_file_of_many_gigabytes_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("fedvlm.data.parquet._FREE", 20_000_000)
    bomb(tmp_path / "a.parquet", 100)
    with pytest.raises(DataError, match=r"take more than 19 MiB .* raise data.max_expansion"):
        load(tmp_path / "a.parquet")
    cache = datasets.config.HF_DATASETS_CACHE
    assert sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) < 10_000
    assert len(load(tmp_path / "a.parquet", max_expansion=1_000_000)) == 100


def test_a_footer_that_promises_too_much_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("fedvlm.data.parquet._FREE", 1_000_000)
    table = pa.Table.from_pylist(rows_of("a" * 50_000)).append_column(
        "zero", pa.array([0] * 50_000)
    )
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    monkeypatch.setattr("fedvlm.data.parquet._tables", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="take more than"):
        load(tmp_path / "a.parquet", max_expansion=1)
