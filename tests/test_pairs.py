"""Preference pairs: a rejected answer for every row, where the objective needs them."""

import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedvlm.data.sources import load_rows
from fedvlm.errors import DataError
from fedvlm.settings.sections import Columns, DataConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6)).save(stream, "PNG")
    return stream.getvalue()


def written(tmp_path, **columns) -> str:
    """Four rows in the form of RLAIF-V; keyword arguments replace columns."""
    rows = {
        "ds_name": ["RLAIF-V"] * 4,
        "image": [{"bytes": picture(), "path": f"{i}.jpg"} for i in range(4)],
        "question": ["What?"] * 4,
        "chosen": ["A dog."] * 4,
        "rejected": ["A cat.", "A cow.", "A car.", "A cup."],
        "origin_dataset": ["VQAv2"] * 4,
        "origin_split": ['{"model": "OmniLMM", "type": "question"}'] * 4,
        "idx": [str(i) for i in range(4)],
        "image_path": [f"{i}.jpg" for i in range(4)],
    } | columns
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


def load(path, pairs=True, **fields):
    return load_rows(DataConfig(path=path, **fields), seed=0, pairs=pairs)


def test_pairs_have_a_rejected_answer_beside_the_answer(tmp_path):
    rows = load(written(tmp_path))
    assert rows.column_names == [
        "image", "question", "answer", "rejected", "row",
        "ds_name", "origin_dataset", "origin_split", "idx", "image_path", "image_hash",
    ]  # fmt: skip
    assert rows["rejected"][:] == ["A cat.", "A cow.", "A car.", "A cup."]


def test_the_rejected_column_is_mapped_and_another_of_that_name_is_kept(tmp_path):
    rows = load(written(tmp_path, worse=["No."] * 4), columns=Columns(rejected="worse"))
    assert rows[1]["rejected"] == "No."
    assert rows[1]["source_rejected"] == "A cow."


def test_without_pairs_rejected_is_a_column_like_any_other(tmp_path):
    rows = load(written(tmp_path, rejected=["", None, "A car.", "A cup."]), pairs=False)
    assert rows["rejected"][:] == ["", None, "A car.", "A cup."]


def test_an_image_folder_gives_pairs(tmp_path):
    (tmp_path / "1.png").write_bytes(picture())
    line = {"file_name": "1.png", "question": "What?", "chosen": "A dog.", "rejected": "A cat."}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    assert load(str(tmp_path))[0]["rejected"] == "A cat."


def test_csv_rejected_answers_stay_text(tmp_path):
    (tmp_path / "1.png").write_bytes(picture())
    (tmp_path / "a.csv").write_text("image,question,chosen,rejected\n1.png,How many?,3,4\n")
    assert load(str(tmp_path / "a.csv"))[0]["rejected"] == "4"


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (
            {"rejected": [1, 2, 3, 4]},
            r"'rejected' holds int64, but the rejected answer must be text",
        ),
        ({"rejected": ["a", "b", " ", "d"]}, r"row 2: the rejected answer is empty"),
    ],
)
def test_a_rejected_answer_is_checked_like_an_answer(tmp_path, column, said):
    with pytest.raises(DataError, match=said):
        load(written(tmp_path, **column))


def test_a_missing_rejected_column_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no column 'worse' .*Set data.columns.rejected="):
        load(written(tmp_path), columns=Columns(rejected="worse"))


def test_the_answer_cannot_be_its_own_rejected_answer(tmp_path):
    with pytest.raises(DataError, match="one column for two roles"):
        load(written(tmp_path), columns=Columns(rejected="chosen"))


def test_row_groups_of_every_size_give_the_same_rows(tmp_path):
    table = pa.table(
        {
            "image": [{"bytes": picture(), "path": f"{i}.png"} for i in range(150)],
            "question": [f"Question {i}?" for i in range(150)],
            "chosen": [f"Answer {i}." for i in range(150)],
        }
    )
    for size in (1, 64, 65, 150):
        pq.write_table(table, tmp_path / f"{size}.parquet", row_group_size=size)
        rows = load(str(tmp_path / f"{size}.parquet"), pairs=False)
        assert rows["answer"][:] == [f"Answer {i}." for i in range(150)]
        assert all(np.diff(rows["row"][:]) == 1)
