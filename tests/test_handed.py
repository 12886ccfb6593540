"""Rows that a program hands over: data sets, tables and lists give the run of their file."""

import io

import datasets
import pytest
from PIL import Image

import fedvlm
from fedvlm.data.handed import kept
from fedvlm.errors import ConfigError, DataError
from fedvlm.store.files import read_lines

SETTINGS = {
    "algorithm": {"name": "lora"},
    "partition": {"kind": "column", "column": "site"},
    "train": {"rounds": 1, "local_steps": 1, "batch_size": 2},
    "eval": {"every": 0, "max_rows": 2, "max_new_tokens": 2},
    "lora": {"rank": 2, "target": "language"},
}

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def scenes():
    return fedvlm.scenes(sites=2, rows=12)


def as_list(rows):
    return [dict(row) for row in rows]


def as_frame(rows):
    return rows.to_pandas()


def as_dict(rows):
    return datasets.DatasetDict({"train": rows, "test": rows.select([0])})


def result(settings, folder, **options):
    results = fedvlm.run({**settings, "output": str(folder / "run")}, **options)
    lines = read_lines(results.folder / "metrics.jsonl")
    return results, [line["train_loss"] for line in lines[1:]]


@pytest.fixture(scope="module")
def plain(scenes, tmp_path_factory):
    """The losses of the run whose rows are a file."""
    folder = tmp_path_factory.mktemp("file")
    scenes.to_parquet(folder / "rows.parquet")
    settings = {**SETTINGS, "data": {"path": str(folder / "rows.parquet")}}
    return result(settings, folder)[1]


@pytest.mark.parametrize("form", [list, as_list, as_frame, as_dict, lambda rows: rows])
def test_every_form_gives_the_run_of_the_file(form, scenes, plain, tmp_path):
    results, losses = result(SETTINGS, tmp_path, data=form(scenes))
    assert losses == plain
    (path,) = tmp_path.glob("*.parquet")
    assert path.name.startswith("rows-")
    assert fedvlm.open_run(results.folder).config.data.path == str(path)


def test_the_same_rows_are_one_file_and_other_rows_another(scenes, tmp_path, capsys):
    datasets.enable_progress_bars()
    first, again = kept(scenes, tmp_path), kept(scenes, tmp_path)
    assert capsys.readouterr().err == ""  # in a notebook, a bar would stay between the cells
    other = kept(scenes.select(range(3)), tmp_path)
    assert first == again != other
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((first.name, other.name))


def test_pictures_and_paths_are_kept_whole(tmp_path, monkeypatch):
    """A picture as a PIL image, as bytes, and as a path relative to the working folder."""
    monkeypatch.chdir(tmp_path)
    picture = Image.new("RGB", (4, 4), (255, 0, 0))
    picture.save("red.png")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    for value in (picture, buffer.getvalue(), "red.png"):
        found = datasets.Dataset.from_parquet(str(kept([{"image": value}], tmp_path / "out")))
        one = found[0]["image"]
        if isinstance(one, str):
            assert one == str(tmp_path / "red.png")
        else:
            one = one if isinstance(one, Image.Image) else Image.open(io.BytesIO(one))
            assert one.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("rows.parquet", "must be a datasets.Dataset"),
        (3, "got int"),
        ([], "there are no rows"),
        ([{"a": 1}, 2], "every row must be a dict, got 2"),
        ([{"a": 1}, {"a": "x"}], "cannot become a table"),
        (datasets.IterableDataset.from_generator(lambda: iter([])), "a stream has no end"),
        (datasets.DatasetDict({"test": datasets.Dataset.from_list([{"a": 1}])}), "but test"),
    ],
)
def test_an_object_that_holds_no_rows_is_refused(data, message, tmp_path):
    with pytest.raises(DataError, match=message):
        kept(data, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_given_twice_are_refused(scenes, tmp_path):
    with pytest.raises(ConfigError, match="leave one of them out"):
        fedvlm.run({"data": {"path": "x/y"}, "output": str(tmp_path / "run")}, data=scenes)


def test_a_comparison_takes_rows_too(scenes, tmp_path):
    settings = {**SETTINGS, "output": str(tmp_path / "both")}
    found = fedvlm.compare(["lora", "local"], settings, data=scenes)
    assert {row["algorithm"] for row in found.rows} == {"lora", "local"}
    assert len(list(tmp_path.glob("rows-*.parquet"))) == 1


# -- results as objects


def test_results_are_one_line_a_table_and_a_picture(scenes, tmp_path):
    results, _ = result(SETTINGS, tmp_path, data=scenes)
    assert len(repr(results)) < 300
    assert "lora, 1 round, 2 clients; exact match: untuned" in repr(results)
    table = results.to_pandas()
    assert len(table) == 2 * len(results.table["models"])
    personal = table[table["model"] == "personal"].set_index("client")
    for client, score in results.scores("personal").items():
        assert personal.loc[client, "exact_match"] == score
        assert personal.loc[client, "exact_match_low"] <= score
    assert results._repr_html_().count("<tr>") >= 2
    assert [axes.get_title() for axes in results.plot().axes]


def test_a_name_is_text_in_a_notebook(tmp_path):
    rows = fedvlm.scenes(sites=2, rows=12)
    names = {"site-0": "<b>x</b>", "site-1": "y"}
    rows = rows.map(lambda row: {"site": names[row["site"]]})
    results, _ = result(SETTINGS, tmp_path, data=rows)
    assert "<b>x</b>" not in results._repr_html_()
    assert "&lt;b&gt;x&lt;/b&gt;" in results._repr_html_()


def test_the_row_of_the_last_table_is_the_one_that_was_scored(scenes, tmp_path):
    """A sample of the rows has other places than the source."""
    from fedvlm.after.predict import side_by_side

    sites = {**SETTINGS["partition"], "min_rows": 4}
    settings = {**SETTINGS, "partition": sites, "data": {"max_rows": 20}}
    results, _ = result(settings, tmp_path, data=scenes)
    known = results.answers("personal")
    first = next((a for a in known if a["exact_match"] == 1), known[0])
    found = side_by_side(results.folder)
    row = scenes[first["row"]]
    assert (found.question, found.reference) == (row["question"], row["chosen"])
    assert found.answers[found.client] == first["prediction"]
    assert set(found.answers) == {"site-0", "site-1", "global", "untuned"}
