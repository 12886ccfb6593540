"""The models, rows and versions that runs of the tests copy are those that they would read."""

from __future__ import annotations

import importlib.metadata

import torch

import families
import smallest
from fedvlm.data.sources import load_rows
from fedvlm.models import load
from fedvlm.models.load import load_model
from fedvlm.rounds import federate
from fedvlm.settings.sections import DataConfig, ModelConfig
from test_federate import bytes_of


def test_a_run_on_copies_writes_the_same_bytes(small, tmp_path, monkeypatch):
    from fedvlm.data import sources

    folders = [tmp_path / name for name in ("copied", "again", "read")]
    for folder in folders[:2]:
        federate.run(small, f"output={folder}")
    assert load.load_model is not load_model
    assert sources.load_rows is not load_rows
    monkeypatch.setattr(load, "load_model", load_model)
    monkeypatch.setattr(sources, "load_rows", load_rows)
    federate.run(small, f"output={folders[2]}")
    assert bytes_of(folders[0]) == bytes_of(folders[1]) == bytes_of(folders[2])


def test_a_copy_is_the_model_as_read_and_of_its_own():
    for name in ("tiny", smallest.model()):
        config = ModelConfig(name=name, device="cpu", gradient_checkpointing=True)
        read, one, other = load_model(config), load.load_model(config), load.load_model(config)
        assert one.model is not other.model
        assert one.model.config.to_dict() == read.model.config.to_dict()
        assert one.processor.to_json_string() == read.processor.to_json_string()
        for copied in (one, other):
            assert copied.model.training == read.model.training
            known = read.model.state_dict()
            assert all(torch.equal(t, known[n]) for n, t in copied.model.state_dict().items())
            assert not any(p.requires_grad for p in copied.model.parameters())
            next(copied.model.parameters()).fill_(1.0)


def test_a_folder_with_other_files_is_read_anew(tmp_path):
    kinds = []
    for family in ("idefics3", "git"):
        families.build(family, tmp_path)
        kinds.append(load.load_model(ModelConfig(name=str(tmp_path))).model.config.model_type)
    assert kinds == ["idefics3", "git"]


def test_rows_and_versions_are_those_that_are_read():
    from fedvlm.data import sources

    data = DataConfig(scenes={"sites": 2, "rows": 4})
    for seed in (0, 1, 0):
        assert sources.load_rows(data, seed).to_list() == load_rows(data, seed).to_list()
    for name in ("torch", "fedvlm"):
        metadata = importlib.metadata.distribution(name).metadata
        assert importlib.metadata.version(name) == metadata["Version"]
