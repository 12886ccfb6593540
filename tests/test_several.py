"""Rows of several pictures, from their source to answers. test_families.py has the families."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import families
import fedvlm
import smallest
from fedvlm.after.inputs import from_images
from fedvlm.after.opened import open_run
from fedvlm.batches.collate import Collator
from fedvlm.data.groups import image_groups
from fedvlm.data.handed import kept
from fedvlm.data.sources import load_rows
from fedvlm.deploy.spending import Spending
from fedvlm.errors import DataError
from fedvlm.models.load import load_model
from fedvlm.report.thumbnails import Rows
from fedvlm.settings.sections import DataConfig, ModelConfig
from pair import EXACT, TOLERANCE, assert_same, engines, play

ASKED = "What changed?"

RANDOM = np.random.default_rng(0)


def noise(width, height):
    return Image.fromarray(RANDOM.integers(0, 255, (height, width, 3), dtype=np.uint8))


# The data


@pytest.fixture
def files(tmp_path):
    """The contents of six pictures, which are files too."""
    contents = []
    for number in range(6):
        noise(8, 8).save(tmp_path / f"{number}.png")
        contents.append((tmp_path / f"{number}.png").read_bytes())
    return contents


SHOWN = [[0], [1, 2], [2, 3], [4], [5, 3], [0]]  # the pictures of each row


def read(path, **settings):
    return load_rows(DataConfig(path=str(path), columns={"answer": "answer"}, **settings))


def table(images):
    return {"image": images, "question": [ASKED] * len(images), "answer": ["no"] * len(images)}


def stored(form, contents, folder):
    """The rows of ``SHOWN`` in one of the forms; the path of the data."""
    inside = [[{"bytes": contents[k], "path": None} for k in own] for own in SHOWN]
    names = [[f"{k}.png" for k in own] for own in SHOWN]
    if form == "bytes":
        pq.write_table(
            pa.table(table([[contents[k] for k in own] for own in SHOWN])), folder / "r.parquet"
        )
    elif form == "large lists":
        kind = pa.large_list(pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]))
        pq.write_table(pa.table(table(pa.array(inside, kind))), folder / "r.parquet")
    elif form == "json":
        mixed = [own if len(own) > 1 else own[0] for own in names]
        rows = [{"image": own, "question": ASKED, "answer": "no"} for own in mixed]
        (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder / "r.jsonl"
    else:
        images = datasets.Sequence(datasets.Image())
        texts = dict.fromkeys(("question", "answer"), datasets.Value("string"))
        rows = datasets.Dataset.from_dict(
            table(inside), features=datasets.Features({"image": images, **texts})
        )
        if form == "object":
            return kept(rows, folder)
        if form == "list":
            return kept([dict(row) for row in rows], folder)
        rows.save_to_disk(folder / "r")
        return folder / "r"
    return folder / "r.parquet"


@pytest.mark.parametrize("form", ["bytes", "large lists", "json", "saved", "object", "list"])
def test_lists_of_pictures_are_read_in_every_form(form, files, tmp_path):
    rows = read(stored(form, files, tmp_path))
    assert [len(pictures) for pictures in rows["image"]] == [1, 2, 2, 1, 2, 1]
    one, two, three, *_, last = rows["image_hash"][:]
    assert one == last
    assert two.split(" ")[1] == three.split(" ")[0]
    first, second, third, apart, fifth, sixth = image_groups(rows).tolist()
    assert first == sixth
    assert second == third == fifth, "rows that share a picture stay together, also in a chain"
    assert len({first, second, apart}) == 3


def test_one_picture_is_the_same_row_in_a_list_and_alone(files, tmp_path):
    rows, found = {"alone": files, "listed": [[each] for each in files]}, {}
    for name, images in rows.items():
        pq.write_table(pa.table(table(images)), tmp_path / f"{name}.parquet")
        found[name] = read(tmp_path / f"{name}.parquet")
    assert isinstance(found["alone"].features["image"], datasets.Image)
    assert found["alone"]["image_hash"][:] == found["listed"]["image_hash"][:]
    loaded = load_model(ModelConfig(name=smallest.model(), device="cpu"))
    alone, listed = (Collator(each, loaded).training(range(6)) for each in found.values())
    assert alone.keys() == listed.keys()
    assert all(torch.equal(alone[name], listed[name]) for name in alone)


def test_lists_that_cannot_be_used_are_named_by_their_row(files, tmp_path):
    images = [files[:1], [], None, files[:3], [files[0], b"broken"], files[:2]]
    pq.write_table(pa.table(table(images)), tmp_path / "r.parquet")
    with pytest.raises(DataError) as caught:
        read(tmp_path / "r.parquet", max_images=2)
    for reason in (
        "has 4 of 6 rows that cannot be used",
        "row 1: its list of pictures is empty; row 2: its list of pictures is empty",
        "row 3: it has 3 pictures, more than data.max_images=2",
        "row 4: corrupt image, picture 2 of 2: ",
    ):
        assert reason in str(caught.value)


def test_the_pictures_of_a_row_share_the_limit_on_memory(tmp_path):
    grey = Image.new("L", (400, 500))
    for name, count in (("one", 1), ("two", 2)):
        data = from_images([[grey] * count], ASKED)
        data = data.add_column("answer", ["no"])
        data.to_parquet(tmp_path / f"{name}.parquet")
    assert len(read(tmp_path / "one.parquet", max_decoded=1)) == 1
    with pytest.raises(DataError, match="row 0: its first 2 of 2 pictures take more than "):
        read(tmp_path / "two.parquet", max_decoded=1)


def test_a_site_counts_each_picture_of_its_rows_once(files, tmp_path):
    rows, spending = read(stored("bytes", files, tmp_path)), Spending(tmp_path / "state")
    spending.folder.mkdir(parents=True)
    one, two, three = (spending.marks(rows, np.array([k]), None) for k in range(3))
    assert [len(one), len(two), len(three), len(two & three)] == [1, 2, 2, 1]


# Runs


@pytest.fixture
def settings(tmp_path):
    """A run of two sites on rows of one to three pictures."""
    rows = [
        {
            "image": [noise(24, 24) for _ in range(1 + number % 3)],
            "question": f"What of {number}?",
            "answer": f"it is {number % 4}",
            "rejected": "no",
            "site": f"site-{number % 2}",
        }
        for number in range(16)
    ]
    return {
        "output": str(tmp_path / "run"),
        "model": {"name": smallest.model()},
        "data": {"path": str(kept(rows, tmp_path)), "columns": {"answer": "answer"}},
        "partition": {"column": "site", "min_rows": 4},
        "lora": {"rank": 2, "alpha": 4},
        "train": {"rounds": 1, "local_steps": 2, "batch_size": 3, "lr": 0.003},
        "eval": {"every": 0, "max_rows": 2, "max_new_tokens": 2},
    }


@pytest.mark.parametrize(
    ("family", "target", "objective"),
    [
        ("idefics3", "all-linear", "sft"),
        ("llava_next", "all-linear", "sft"),
        ("qwen2_5_vl", "language", "dpo"),
    ],
)
def test_both_engines_train_alike_on_rows_of_unequal_numbers(
    family, target, objective, settings, tmp_path
):
    settings["model"]["name"] = families.folder(family)
    chosen = f"lora.target={target}", f"objective.name={objective}"
    sides = engines(settings, EXACT, *chosen, folder=tmp_path)
    assert_same(*(play(*side) for side in sides), TOLERANCE)


def test_a_run_with_a_model_of_one_picture_stops_and_names_the_rows(settings):
    settings["model"]["name"] = families.folder("git")
    with pytest.raises(DataError, match=r"row 1: there are 2 pictures, .* \(family 'git'\) has a "):
        fedvlm.run(settings)


def test_a_run_answers_a_held_out_row_from_all_of_its_pictures(settings):
    results = fedvlm.run(settings)
    run = open_run(results.folder, "eval.max_new_tokens=2")
    held_out = next(a for a in results.answers("global") if a["row"] % 3 == 2)
    row = load_rows(run.config.data)[held_out["row"]]
    pictures = [each["bytes"] for each in row["image"]]
    assert len(pictures) == 3
    assert fedvlm.predict(results.folder, pictures, row["question"]) == held_out["prediction"]
    shown = Rows(run.config, results.folder)(held_out["row"], held_out["reference"])
    assert shown[0] == row["question"]
    assert shown[1].startswith("data:image/jpeg;base64,")
