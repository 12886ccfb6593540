"""Rows of every kind of source are checked, and get canonical column names."""

import io
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from fedvlm.data.pictures import Pictures
from fedvlm.data.sources import load_rows, open_image
from fedvlm.errors import DataError
from fedvlm.settings.sections import Columns, DataConfig

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"no sample data in {SHARED}")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(colour="red", size=(8, 6), kind="PNG") -> bytes:
    return encode(Image.new("RGB", size, colour), kind)


def table(n=4, **columns):
    """``n`` rows in RLAIF-V's schema; keyword arguments replace or add columns (None drops one)."""
    rows = {
        "image": [{"bytes": picture((i, 0, 0)), "path": f"{i}.png"} for i in range(n)],
        "question": [f"What is in picture {i}?" for i in range(n)],
        "chosen": [f"Thing {i}." for i in range(n)],
        "rejected": [f"Nothing {i}." for i in range(n)],
        "origin_dataset": ["left" if i % 2 else "right" for i in range(n)],
        "idx": list(range(100, 100 + n)),
    }
    return {k: v for k, v in {**rows, **columns}.items() if v is not None}


def parquet(path: Path, n=4, **columns) -> str:
    datasets.Dataset.from_dict(table(n, **columns)).to_parquet(path)
    return str(path)


def load(path, **fields):
    return load_rows(DataConfig(path=str(path), **fields), seed=0)


def test_parquet_rows_get_canonical_names_and_keep_their_scalar_columns(tmp_path):
    rows = load(parquet(tmp_path / "a.parquet", tags=[["x"]] * 4))
    assert rows.column_names == [
        "image", "question", "answer", "row", "rejected", "origin_dataset", "idx", "image_hash",
    ]  # fmt: skip
    assert rows["answer"][:] == ["Thing 0.", "Thing 1.", "Thing 2.", "Thing 3."]
    assert rows["row"][:] == [0, 1, 2, 3]
    assert rows[2]["image"]["bytes"] == picture((2, 0, 0))


def test_columns_are_mapped_and_a_clashing_name_is_kept_as_source(tmp_path):
    data = table(photo=[{"bytes": picture()}] * 4, ask=["Why?"] * 4, answer=["other"] * 4)
    data["row"] = [7, 8, 9, 10]
    del data["image"], data["question"]
    datasets.Dataset.from_dict(data).to_parquet(tmp_path / "a.parquet")
    rows = load(tmp_path / "a.parquet", columns=Columns(image="photo", question="ask"))
    assert rows[0]["question"] == "Why?"
    assert rows[0]["answer"] == "Thing 0."
    assert rows[0]["source_answer"] == "other"
    assert (rows[0]["row"], rows[0]["source_row"]) == (0, 7)
    assert open_image(rows[0]["image"]).size == (8, 6)


def test_plain_bytes_and_decoding_image_features_both_stay_encoded(tmp_path):
    for name, feature in (("bytes", datasets.Value("binary")), ("image", datasets.Image())):
        made = datasets.Dataset.from_dict(table(image=[picture()] * 4))
        made.cast_column("image", feature).to_parquet(tmp_path / f"{name}.parquet")
        rows = load(tmp_path / f"{name}.parquet")
        assert rows[0]["image"]["bytes"] == picture()


def test_class_labels_become_their_names(tmp_path):
    made = datasets.Dataset.from_dict(table(chosen=[0, 1, 0, 1]))
    made = made.cast_column("chosen", datasets.ClassLabel(names=["cat", "dog"]))
    made.to_parquet(tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet")["answer"][:] == ["cat", "dog", "cat", "dog"]


def test_a_folder_of_shards_is_read_in_name_order(tmp_path):
    parquet(tmp_path / "b.parquet", chosen=["second"] * 4)
    parquet(tmp_path / "a.parquet", chosen=["first"] * 4)
    rows = load(tmp_path)
    assert rows["answer"][:] == ["first"] * 4 + ["second"] * 4
    assert rows["row"][:] == list(range(8))


def test_shards_of_the_asked_split_are_read_and_no_others(tmp_path):
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", n=3)
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", n=2)
    assert len(load(tmp_path)) == 3
    assert len(load(tmp_path, split="test")) == 2
    with pytest.raises(DataError, match=r"data.split 'validation'.*test, train"):
        load(tmp_path, split="validation")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_text_files_name_images_relative_to_themselves(tmp_path, kind, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(picture())
    (tmp_path / "in" / "2.jpg").write_bytes(picture(kind="JPEG"))
    lines = [
        {"image": "1.png", "question": "What, now?", "chosen": "None"},
        {"image": "2.jpg", "question": "How?", "chosen": "3"},
    ]
    path = tmp_path / "in" / f"rows.{kind}"
    if kind == "csv":
        path.write_text('image,question,chosen,site\n1.png,"What, now?",None,1\n2.jpg,How?,3,2\n')
    elif kind == "json":
        path.write_text(json.dumps(lines))
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    rows = load(f"in/rows.{kind}")
    assert rows["answer"][:] == ["None", "3"]
    assert rows[0]["image"]["bytes"] is None
    assert open_image(rows[1]["image"]).size == (8, 6)


@pytest.mark.parametrize("where", ["", "train"])
def test_an_image_folder_is_read_through_its_metadata(tmp_path, where):
    folder = tmp_path / where
    folder.mkdir(exist_ok=True)
    (folder / "1.png").write_bytes(picture())
    line = {"file_name": "1.png", "question": "What?", "answer": "A thing.", "site": "s1"}
    (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    rows = load(tmp_path, columns=Columns(answer="answer"))
    assert rows[0]["answer"] == "A thing."
    assert rows[0]["site"] == "s1"
    assert open_image(rows[0]["image"]).getpixel((0, 0)) == (255, 0, 0)


def test_a_saved_data_set_is_read(tmp_path):
    made = datasets.Dataset.from_dict(table())
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=made).save_to_disk(tmp_path / "many")
    assert len(load(tmp_path / "one")) == len(load(tmp_path / "many")) == 4
    with pytest.raises(DataError, match=r"'test' is not in .*; it has train"):
        load(tmp_path / "many", split="test")


def test_max_rows_takes_a_seeded_sample_that_remembers_its_rows(tmp_path):
    path = parquet(tmp_path / "a.parquet", n=50)
    config = DataConfig(path=path, max_rows=10)
    first, again, other = (load_rows(config, seed)["row"][:] for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 10
    assert load_rows(config, 1)["idx"][:] == [100 + row for row in first]
    assert len(load(path, max_rows=1000)) == 50


def test_scenes_are_the_default_source():
    pytest.importorskip("fedvlm.data.scenes")
    config = DataConfig.model_validate({"scenes": {"sites": 2, "rows": 12}})
    rows = load_rows(config, 0)
    assert {"image", "question", "answer", "row", "site"} <= set(rows.column_names)
    assert open_image(rows[0]["image"]).mode == "RGB"


# Errors have the mistake, the value and the remedy.


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere.parquet", "does not exist"),
        ("nowhere/rows.parquet", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
        ("mnist", "org/name"),
    ],
)
def test_a_path_that_does_not_exist_is_refused(path, said):
    with pytest.raises(DataError, match=said):
        load(path)


def test_an_unreachable_hub_points_to_local_files(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"'some-org/some-data'.*download it where there is a connection"
    ):
        load("some-org/some-data")


def test_a_local_folder_wins_over_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    parquet(tmp_path / "org" / "name" / "a.parquet")
    monkeypatch.chdir(tmp_path)
    assert len(load("org/name")) == 4


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"", "empty file"),
        ("a.parquet", b"not parquet at all", "cannot read"),
        ("a.jsonl", b"{broken", "cannot read"),
        ("a.csv", b"image,question,chosen\n", "no rows"),
        ("a.xlsx", b"x", "'.xlsx'; a file of rows ends in .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        load(tmp_path / name)


def test_a_folder_without_rows_says_what_it_needs(tmp_path):
    (tmp_path / "1.png").write_bytes(picture())
    with pytest.raises(DataError, match=r"needs a metadata.jsonl"):
        load(tmp_path)


def test_zero_rows_are_refused(tmp_path):
    made = datasets.Dataset.from_dict(table()).select([])
    made.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no rows"):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize("role", ["image", "question", "chosen"])
def test_a_missing_column_is_named_with_those_that_exist(tmp_path, role):
    path = parquet(tmp_path / "a.parquet", **{role: None})
    key = {"chosen": "answer"}.get(role, role)
    with pytest.raises(DataError) as caught:
        load(path)
    assert f"no column '{role}'" in str(caught.value)
    assert "origin_dataset, idx" in str(caught.value)
    assert f"data.columns.{key}=" in str(caught.value)


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("image", [1, 2, 3, 4], "'image' holds int64, not images"),
        ("image", [[1.0], [2.0], [3.0], [4.0]], "'image' holds list, not images"),
        ("question", [1, 2, 3, 4], "'question' holds int64, but the question must be text"),
        ("chosen", [0.5] * 4, "'chosen' holds float64, but the answer must be text"),
    ],
)
def test_a_wrongly_typed_column_is_refused(tmp_path, column, values, said):
    path = parquet(tmp_path / "a.parquet", **{column: values})
    with pytest.raises(DataError, match=said):
        load(path)


def test_one_column_cannot_play_two_parts(tmp_path):
    path = parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="one column for two roles"):
        load(path, columns=Columns(answer="question"))


@pytest.mark.parametrize("value", [None, "", " \n"])
@pytest.mark.parametrize("column", ["question", "chosen"])
def test_an_empty_text_is_found_by_its_row(tmp_path, column, value):
    path = parquet(tmp_path / "a.parquet", **{column: ["a", "b", value, "d"]})
    role = {"chosen": "answer"}.get(column, column)
    with pytest.raises(DataError, match=f"row 2: the {role} is empty"):
        load(path)


CORRUPT = {
    "cut off": picture(kind="JPEG", size=(64, 64))[:-300],
    "no image": b"hello",
    "no bytes": None,
    "bad checksum": picture(size=(64, 64)).replace(b"IDAT", b"IDAX"),
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_image_fails_with_its_row_or_is_skipped(tmp_path, content, caplog):
    images = [{"bytes": picture(), "path": None} for _ in range(4)]
    images[1] = {"bytes": content, "path": None}
    path = parquet(tmp_path / "a.parquet", image=images)
    with pytest.raises(DataError, match=r"1 of 4 rows.*row 1: corrupt image, .*on_error=skip"):
        load(path)
    with caplog.at_level(logging.WARNING, logger="fedvlm"):
        rows = load(path, on_error="skip")
    assert rows["row"][:] == [0, 2, 3]
    assert "left out 1 of 4 rows" in caplog.text


def test_skipping_every_row_is_an_error(tmp_path):
    path = parquet(tmp_path / "a.parquet", image=[{"bytes": b"x"}] * 4)
    with pytest.raises(DataError, match="no usable row"):
        load(path, on_error="skip")


def test_a_missing_image_file_is_a_corrupt_row(tmp_path):
    line = {"image": "gone.png", "question": "What?", "chosen": "It."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"row 0: there is no file '.*gone.png'"):
        load(tmp_path / "rows.jsonl")


def test_rewriting_a_file_checks_it_again(tmp_path):
    path = tmp_path / "a.parquet"
    assert len(load(parquet(path))) == 4
    parquet(path, image=[{"bytes": b"x"}] * 4)
    os.utime(path, (time.time() + 5, time.time() + 5))
    with pytest.raises(DataError, match="4 of 4 rows"):
        load(path)


# Images


def test_transparency_is_composited_on_white():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 255, 255))
    image = open_image(encode(clear))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]
    palette = clear.quantize()
    assert open_image({"bytes": encode(palette), "path": None}).getpixel((0, 0)) == (255,) * 3


def test_the_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    turned = encode(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    assert open_image(turned).size == (4, 8)


def test_sixteen_bit_greyscale_is_scaled_and_not_clipped():
    pixels = np.array([[0, 32896, 65535]], dtype=np.uint16)
    image = open_image(encode(Image.fromarray(pixels)))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "RGB", "RGBA", "I", "F"])
def test_every_mode_opens_as_rgb(mode):
    assert open_image(Image.new(mode, (3, 2))).mode == "RGB"


@pytest.mark.parametrize("value", [{"bytes": None, "path": None}, b"x", 3, {"path": "gone.png"}])
def test_what_is_no_image_raises_with_the_reason(value):
    with pytest.raises(DataError):
        open_image(value)


# Real data


@needs_shared
def test_twelve_thousand_photos_are_decoded_once_each_at_their_lowest_resolution(monkeypatch):
    looks, look = [], Pictures.look

    def counted(*args, draft=False):
        looks.append(draft)
        return look(*args, draft=draft)

    monkeypatch.setattr(Pictures, "look", counted)
    rows = load(SHARED / "photos.parquet")
    assert len(rows) == 12_000
    assert looks == [True] * 12_000
    load(SHARED / "photos.parquet")
    assert len(looks) == 12_000, "the verdict is cached"


@needs_shared
def test_rgba_statements_open_as_rgb():
    rows = load(SHARED / "statements.parquet", max_rows=20)
    assert {open_image(row["image"]).size for row in rows} == {(400, 100)}


def test_reading_a_local_file_is_silent_and_works_offline(tmp_path):
    path = parquet(tmp_path / "a.parquet")
    code = (
        "from fedvlm.data.sources import load_rows\n"
        "from fedvlm.settings.sections import DataConfig\n"
        f"print(len(load_rows(DataConfig(path={path!r}), 0)))"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("4\n", "")
