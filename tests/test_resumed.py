"""A resumed run takes the data and the model that it began with, wherever they are now."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedvlm
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.models.load import ASSETS
from fedvlm.rounds import federate
from fedvlm.rounds.federate import resume
from stopping import Stop


def _saved(folder, change=lambda frame: frame):
    """A parquet file of scenes, changed."""
    frame = fedvlm.scenes(style="mixed", sites=3, rows=16).to_pandas()
    change(frame).to_parquet(folder / "rows.parquet", index=False)
    return {"path": str(folder / "rows.parquet"), "columns": {"answer": "chosen"}}


def _other_questions(frame):
    return frame.assign(question=[f"{q} " + "Please." for q in frame["question"]])


def _other_pictures(frame):
    return frame.assign(image=[frame["image"][0]] * len(frame))


CHANGES = {
    "differ in question": _other_questions,
    "differ in image": _other_pictures,
    "there are 44 rows, and there were 48": lambda frame: frame.head(44),
}


def test_other_data_are_not_resumed(small, tmp_path, monkeypatch):
    small["data"] = _saved(tmp_path)
    small["partition"] |= {"kind": "iid", "clients": 3}
    with pytest.raises(KeyboardInterrupt):
        federate.run(small, progress=Stop(1))
    for said, change in CHANGES.items():
        _saved(tmp_path, change)
        with pytest.raises(FedVLMError, match=f"not what they were when the run .*{said}"):
            federate.resume(small["output"])
    _saved(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        federate.resume(small["output"], progress=Stop(0))


@pytest.fixture
def stopped(small, tmp_path):
    """A stopped run on a folder of data and a folder of a model."""
    for place in ("data", "model"):
        (tmp_path / place).mkdir()
    shutil.copytree(ASSETS / "tiny", tmp_path / "model" / "tiny")
    small["data"] = _saved(tmp_path / "data")
    small["model"] = {"name": str(tmp_path / "model" / "tiny")}
    small["partition"] |= {"kind": "iid", "clients": 3}
    with pytest.raises(KeyboardInterrupt):
        federate.run(small, progress=Stop(4))
    return small


def test_a_run_resumes_where_its_data_and_model_have_moved_to(stopped, tmp_path):
    whole = federate.run(stopped | {"output": str(tmp_path / "whole")})
    shutil.move(tmp_path / "data", tmp_path / "new data")
    shutil.move(tmp_path / "model", tmp_path / "new model")
    with pytest.raises(FedVLMError, match="is not there any more; if it has moved"):
        resume(stopped["output"])
    data = f"data.path={tmp_path / 'new data' / 'rows.parquet'}"
    model = f"model.name={tmp_path / 'new model' / 'tiny'}"
    moved = resume(stopped["output"], data, model)
    assert moved.table["models"] == whole.table["models"]


def test_another_model_is_not_resumed(stopped, tmp_path):
    weights = tmp_path / "model" / "tiny" / "model.safetensors"
    tree = load_file(weights)
    last = sorted(tree)[-1]
    save_file(tree | {last: torch.zeros_like(tree[last])}, weights, {"format": "pt"})
    with pytest.raises(FedVLMError, match="the base model is not what it was"):
        resume(stopped["output"])


def test_no_other_setting_changes_when_a_run_resumes(stopped):
    with pytest.raises(ConfigError, match=r"'train\.lr=1': a resumed run keeps its settings"):
        resume(stopped["output"], "train.lr=1")
