"""Answers and scores after training, for images, folders and files, of one model or several."""

import csv
import io
import json

import datasets
import pandas as pd
import pytest
from PIL import Image

import fedvlm
from fedvlm.after import opened
from fedvlm.after.inputs import from_images, rows_to_ask
from fedvlm.after.opened import open_run
from fedvlm.after.predict import predict_many
from fedvlm.cli.demo import Picture
from fedvlm.data.sources import load_rows, open_image
from fedvlm.errors import DataError, FedVLMError
from fedvlm.settings.sections import DataConfig
from test_cli import call

QUESTION = "What is in the picture?"


@pytest.fixture
def pictures(new_rows, tmp_path):
    """A folder of three pictures, one of them in a subfolder."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    picture = Image.open(new_rows / "picture.png")
    picture.save(folder / "a.png")
    picture.rotate(180).save(folder / "b.jpg")
    picture.rotate(90).save(folder / "more" / "c.webp")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_one_picture_and_one_model_print_the_answer_alone(
    finished_run, new_rows, capsys, monkeypatch
):
    picture = new_rows / "picture.png"
    words = ("predict", str(finished_run), str(picture), QUESTION, "--client", "site-1")
    code, text, errors = call(capsys, monkeypatch, *words)
    assert (code, errors) == (0, "")
    assert text.strip() == fedvlm.predict(finished_run, picture, QUESTION, client="site-1")


def test_many_answers_are_a_table_with_the_common_question_on_top(
    finished_run, pictures, capsys, monkeypatch
):
    words = ("predict", str(finished_run), str(pictures), "What is in [it]?", "--all")
    code, text, errors = call(capsys, monkeypatch, *words)
    assert (code, errors) == (0, "")
    assert text.count("What is in [it]?") == 1
    for said in ("a.png", "b.jpg", "c.webp", "site-0", "site-2", "global", "untuned"):
        assert said in text


def test_a_picture_is_a_path_or_bytes_or_an_image(finished_run, new_rows):
    run, path = open_run(finished_run), new_rows / "picture.png"
    given = (path, str(path), path.read_bytes(), Image.open(path))
    assert len({run.predict(image, QUESTION, client="site-0") for image in given}) == 1


def test_models_side_by_side_answer_as_each_alone_and_the_base_is_loaded_once(
    finished_run, pictures, monkeypatch
):
    from fedvlm.models import load

    loads = []
    real = load.load_model
    monkeypatch.setattr(load, "load_model", lambda c: loads.append(c) or real(c))
    together = predict_many(finished_run, pictures, QUESTION, every=True)
    assert len(loads) == 1
    assert together.models == ("site-0", "site-1", "site-2", "global", "untuned")
    assert [row["image"].rpartition("/")[2] for row in together.rows] == [
        "a.png",
        "b.jpg",
        "c.webp",
    ]
    for name, choice in (("site-1", {"clients": ["site-1"]}), ("untuned", {"untuned": True})):
        alone = predict_many(finished_run, pictures, QUESTION, **choice)
        assert [row[name] for row in alone.rows] == [row[name] for row in together.rows]
    assert any(len({row[m] for m in together.models}) > 1 for row in together.rows)


def test_the_untuned_model_is_the_base_itself(finished_run, new_rows):
    run = open_run(finished_run)
    adapted = run.probe(run.chosen(global_=False, untuned=True, every=False)["untuned"])
    assert (adapted - open_run(finished_run).probe(None)).abs().max() <= 1e-6


def test_a_file_of_rows_needs_no_answers(finished_run, new_rows, tmp_path):
    frame = pd.read_parquet(new_rows / "site.parquet").head(4)
    bare = tmp_path / "bare.parquet"
    frame.drop(columns=["chosen", "rejected"]).to_parquet(bare, index=False)
    asked = predict_many(finished_run, bare, clients=["site-1"])
    assert [row["row"] for row in asked.rows] == [0, 1, 2, 3]
    assert [row["question"] for row in asked.rows] == list(frame["question"])
    assert all(set(row) == {"row", "question", "site-1"} for row in asked.rows)
    full = predict_many(finished_run, new_rows / "site.parquet", clients=["site-1"])
    assert [r["site-1"] for r in full.rows[:4]] == [r["site-1"] for r in asked.rows]
    assert full.rows[0]["answer"] == frame["chosen"].iloc[0]


def test_empty_answers_and_other_columns_and_one_question_for_all(finished_run, new_rows, tmp_path):
    frame = pd.read_parquet(new_rows / "site.parquet").head(2)
    frame = frame.rename(columns={"question": "frage"})
    frame["chosen"] = [None, "  "]
    frame.to_parquet(tmp_path / "f.parquet", index=False)
    column = ["data.columns.question=frage"]
    own = predict_many(finished_run, tmp_path / "f.parquet", global_=True, overrides=column)
    assert [row["question"] for row in own.rows] == list(frame["frage"])
    assert "answer" not in own.rows[0]
    same = predict_many(finished_run, tmp_path / "f.parquet", QUESTION, global_=True)
    assert {row["question"] for row in same.rows} == {QUESTION}
    with pytest.raises(DataError, match="no column 'question'"):
        predict_many(finished_run, tmp_path / "f.parquet", global_=True)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_answers_are_written_in_the_format_of_the_files_ending(
    ending, finished_run, pictures, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "new" / f"answers.{ending}"
    words = ("predict", str(finished_run), str(pictures), QUESTION, "--global", "-c", "site-0")
    code, text, _ = call(capsys, monkeypatch, *words, "--out", str(out))
    assert code == 0
    assert str(out) in text
    expected = predict_many(finished_run, pictures, QUESTION, clients=["site-0"], global_=True).rows
    if ending == "parquet":
        found = datasets.Dataset.from_parquet(str(out)).to_list()
    elif ending == "csv":
        found = list(csv.DictReader(io.StringIO(out.read_text())))
    elif ending == "jsonl":
        found = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        found = json.loads(out.read_text())
    assert found == expected


def test_what_cannot_be_asked_says_what_to_do(finished_run, pictures, new_rows, tmp_path):
    picture = new_rows / "picture.png"
    with pytest.raises(FedVLMError, match=r"--client NAME \(site-0, site-1, site-2\)"):
        predict_many(finished_run, picture, QUESTION)
    with pytest.raises(DataError, match=r"there is no question for '.*picture\.png'"):
        predict_many(finished_run, picture, global_=True)
    with pytest.raises(DataError, match="question is empty"):
        predict_many(finished_run, picture, " ", global_=True)
    with pytest.raises(DataError, match=r"there is no picture .*gone\.jpg"):
        predict_many(finished_run, tmp_path / "gone.jpg", QUESTION, global_=True)
    with pytest.raises(FedVLMError, match=r"'answers\.txt' must end in \.jsonl"):
        predict_many(finished_run, picture, QUESTION, global_=True, out="answers.txt")
    (pictures / "b.jpg").write_bytes(b"broken")
    with pytest.raises(
        DataError, match=r"1 of 3 images cannot be used: '.*b\.jpg': the image does not decode"
    ):
        predict_many(finished_run, pictures, QUESTION, global_=True)


@pytest.mark.parametrize("suffix", [".avif", ".jfif", ".jp2", "", ".scan"])
def test_what_pillow_opens_is_a_picture_whatever_its_suffix(suffix, tmp_path):
    kind = {".avif": "AVIF", ".jp2": "JPEG2000", ".scan": "TIFF"}.get(suffix, "JPEG")
    Image.new("RGB", (30, 20), (9, 9, 200)).save(tmp_path / f"a{suffix}", kind)
    for source in (tmp_path, tmp_path / f"a{suffix}"):
        rows = rows_to_ask(DataConfig(), source, QUESTION)
        assert rows["name"][:] == [str(tmp_path / f"a{suffix}")]


def test_a_folder_leaves_out_hidden_files_quietly_and_names_the_others(tmp_path, caplog):
    picture = Image.new("RGB", (30, 20))
    for name in ("a.png", "._a.png", "__MACOSX/a.png", ".ipynb_checkpoints/a.png", ".b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture.save(tmp_path / name)
    for n in range(7):
        (tmp_path / f"note{n}").write_text("#define BM P6 not a picture")
    caplog.set_level("INFO", "fedvlm")
    assert rows_to_ask(DataConfig(), tmp_path, QUESTION)["name"][:] == [str(tmp_path / "a.png")]
    assert "left out 4 hidden files" in caplog.text
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert "left out 7 files" in warning
    assert "note0, note1, note2, note3, note4, and 2 more" in warning


def test_broken_pictures_are_skipped_on_request_and_all_of_them_are_an_error(tmp_path, caplog):
    (tmp_path / "bad.png").write_bytes(b"broken")
    skip = DataConfig(on_error="skip")
    with pytest.raises(DataError, match=r"1 of 1 images cannot be used: '.*bad\.png'"):
        rows_to_ask(skip, tmp_path, QUESTION)
    Image.new("RGB", (30, 20)).save(tmp_path / "good.png")
    assert rows_to_ask(skip, tmp_path, QUESTION)["name"][:] == [str(tmp_path / "good.png")]
    assert "left out 1 of 2 images: '" in caplog.text
    with pytest.raises(DataError, match="1 of 2 images cannot be used"):
        rows_to_ask(DataConfig(), tmp_path, QUESTION)


def test_a_picture_in_memory_may_have_any_mode():
    for mode in ("F", "CMYK", "I;16", "RGBA"):
        rows = from_images([Image.new(mode, (9, 9))], QUESTION)
        assert open_image(rows[0]["image"]).size == (9, 9)
    with pytest.raises(DataError, match="an image is a path, encoded bytes or a PIL image"):
        from_images([3], QUESTION)


def test_a_client_called_global_keeps_a_column_of_its_own():
    assert opened.label("global") == "client global"
    assert opened.label("site-1") == "site-1"


# evaluate


def test_scores_on_a_clients_own_test_rows_are_the_runs_own(finished_run, tmp_path):
    run = open_run(finished_run)
    rows = load_rows(run.config.data, run.config.seed)
    held_out = run.partition.splits["site-1"].test[: run.config.eval.max_rows]
    mine = rows.select(held_out).rename_column("answer", "chosen").remove_columns("row")
    mine.to_parquet(tmp_path / "mine.parquet")
    found = fedvlm.evaluate(finished_run, tmp_path / "mine.parquet")
    assert found.rows == len(held_out)
    models = run.results.table["models"]
    for model, name in (("personal", "site-1"), ("global", "global"), ("untuned", "untuned")):
        assert found.scores[name] == pytest.approx(models[model]["clients"]["site-1"], rel=1e-4)


def test_new_rows_are_all_scored_by_all_models_unless_some_are_chosen(
    finished_run, new_rows, tmp_path, capsys, monkeypatch
):
    data, out = new_rows / "site.parquet", tmp_path / "scores.json"
    words = ("evaluate", str(finished_run), "--data", str(data))
    code, text, errors = call(capsys, monkeypatch, *words, "--out", str(out))
    assert (code, errors) == (0, "")
    rows = json.loads(out.read_text())
    assert [r["model"] for r in rows] == ["site-0", "site-1", "site-2", "global", "untuned"]
    assert {r["examples"] for r in rows} == {len(pd.read_parquet(data))}
    assert all(f"{r['loss']:.3f}" in text for r in rows)
    code, text, _ = call(capsys, monkeypatch, *words, "-c", "site-2", "--max-rows", "3")
    assert code == 0
    assert "3 rows of" in text
    assert "site-2" in text
    assert "untuned" in text
    assert "global" not in text


def test_data_without_answers_cannot_be_scored(finished_run, new_rows, tmp_path):
    frame = pd.read_parquet(new_rows / "site.parquet").drop(columns=["chosen"])
    frame.to_parquet(tmp_path / "bare.parquet", index=False)
    with pytest.raises(DataError, match="no column 'chosen' for the answer"):
        fedvlm.evaluate(finished_run, tmp_path / "bare.parquet")


def test_the_demo_asks_early_and_at_the_end_only_where_that_failed(
    own_run, tmp_path, capsys, monkeypatch
):
    run = own_run.rename(tmp_path / "auto-seed-0")
    early, late = Picture(), Picture()
    early.ask_early([tmp_path / "local-seed-0", run])
    late.ask_early([tmp_path / "auto-seed-1"])
    late.print(run)
    expected = capsys.readouterr().out
    assert "held out by site-" in " ".join(expected.split())
    monkeypatch.setattr("fedvlm.after.predict.side_by_side", lambda run: pytest.fail("asked again"))
    early.print(run)
    assert capsys.readouterr().out == expected
    assert (tmp_path / "picture.png").exists()
