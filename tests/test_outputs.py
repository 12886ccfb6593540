"""Outputs never destroy inputs, and a run's folder survives what happens to it."""

from __future__ import annotations

import json
import shutil

import pytest

import fedvlm
from fedvlm.after.names import label
from fedvlm.after.outputs import check_out
from fedvlm.cli import app as cli
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.models.load import ASSETS
from fedvlm.rounds import federate
from fedvlm.rounds.comparison import compare
from fedvlm.rounds.results import Results
from fedvlm.store import sealed
from fedvlm.store.files import check_room
from fedvlm.store.run import check_fresh, has_not_begun


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, a model and a finished run on them."""
    place = tmp_path_factory.mktemp("outputs")
    rows = fedvlm.scenes(style="mixed", sites=2, rows=10)
    (place / "data").mkdir()
    rows.to_parquet(place / "data" / "rows.parquet")
    rows.to_parquet(place / "rows.parquet")
    shutil.copytree(ASSETS / "tiny", place / "model")
    words = ("train.rounds=1", "train.local_steps=1", "algorithm.name=lora", "eval.max_rows=1")
    words += ("partition.kind=iid", "partition.clients=2", "partition.min_rows=2")
    words += (f"data.path={place / 'rows.parquet'}", f"model.name={place / 'model'}")
    fedvlm.run(None, *words, "eval.max_new_tokens=2", f"output={place / 'run'}")
    return place


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("rows.parquet", "is the file that is read"),
        ("model/generation_config.json", "is in the folder that is read"),
        ("run/table.json", "is a file or folder of the run"),
        ("run/export/name/x.json", "is a file or folder of the run"),
        ("photo.jsonl/x.json", "'.*photo.jsonl' is no folder"),
    ],
)
def test_an_output_is_never_what_a_command_reads(folder, out, said):
    (folder / "photo.jsonl").write_text("")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(FedVLMError, match=said):
        fedvlm.evaluate(folder / "run", folder / "data" / "rows.parquet", out=folder / out)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("to", ["model/exported", "run/adapters/mine", "run/export/a/b"])
def test_an_export_never_lies_where_a_run_reads(folder, to):
    with pytest.raises(FedVLMError, match=r"folder of the run|folder that is read"):
        fedvlm.export(folder / "run", to=folder / to)
    assert not (folder / to).exists()


def test_a_comparison_never_overwrites_its_data(folder, tmp_path):
    data = tmp_path / "comparison.csv"
    data.write_text("image,question,chosen\n")
    with pytest.raises(FedVLMError, match="is the data, and the comparison would overwrite it"):
        compare(["lora"], {"data": {"path": str(data)}, "output": str(tmp_path)})


def test_the_column_of_a_client_is_distinct_from_all_others():
    names = ["question", "image", "row", "answer", "global", "untuned", "client global", "site-0"]
    labels = [label(name) for name in names]
    assert len({*labels, "question", "image", "row", "answer", "global", "untuned"}) == 6 + 8
    assert label("site-0") == "site-0"


def test_an_output_beside_a_file_that_is_no_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(FedVLMError, match="is no folder"):
        check_out(tmp_path / "photo.jpg" / "y.json")


def test_a_table_of_another_run_is_refused(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.json"
    content = sealed.read(checkpoint)
    sealed.write(checkpoint, {**content, "round": 7})
    with pytest.raises(FedVLMError, match=r"table.json' is damaged: it is of another run"):
        Results.read(tmp_path / "run")


def test_a_run_that_was_killed_while_it_was_created_can_be_started_again(folder, tmp_path):
    started = tmp_path / "run"
    started.mkdir()
    content = json.loads((folder / "run" / "checkpoint.json").read_text())
    sealed.write(started / "checkpoint.json", {"round": None, "files": content["files"]})
    shutil.copy(folder / "run" / "data.json", started)
    assert has_not_begun(started)
    check_fresh(started)
    with pytest.raises(FedVLMError, match="holds no run that has begun"):
        federate.resume(started)
    (started / "mine.txt").write_text("")
    with pytest.raises(FedVLMError, match="is not empty"):
        check_fresh(started)


def test_resuming_leaves_files_of_other_names_alone(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    for kept in ("notes.tmp", "export/mine.tmp", "onboarded/site.tmp"):
        (run / kept).parent.mkdir(exist_ok=True)
        (run / kept).write_text("")
    for left in ("table.json.tmp", "answers/global.jsonl.tmp"):
        (run / left).write_text("")
    (run / "table.json").unlink()
    federate.resume(run)
    assert {p.name for p in run.rglob("*.tmp")} == {"notes.tmp", "mine.tmp", "site.tmp"}


def test_the_room_that_a_run_has_taken_counts_for_it(tmp_path, monkeypatch):
    (tmp_path / "state").write_bytes(bytes(600))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 500})())
    check_room(tmp_path, 1000)
    with pytest.raises(FedVLMError, match="move its folder there"):
        check_room(tmp_path, 1200)


def test_an_empty_folder_name_is_not_a_new_run():
    with pytest.raises(ConfigError, match="--resume needs the folder of a run"):
        cli.run(resume=" ")
