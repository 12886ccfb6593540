"""Image features that LoRA does not change: computed once a picture, kept for later runs."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch

import fedvlm
from fedvlm.models.frozen import ImageFeatures, handed_on
from fedvlm.models.load import identity, locate
from fedvlm.models.spool import ALIGN, Spool, leaves, nbytes
from fedvlm.rounds import comparison
from fedvlm.rounds.prepare import prepare
from fedvlm.tree import digest


@pytest.mark.parametrize(
    ("override", "kept"),
    [("lora.target=language", True), ("engine.cache=0", False), ("lora.target=projector", False)],
)
def test_features_are_kept_only_where_lora_does_not_change_them(small, override, kept):
    small["lora"] |= {"target": "language"}
    engine, partition, _ = prepare(fedvlm.load_config(small, override))
    assert (engine._images is not None) == kept
    if kept:
        calls = []
        tower = engine.model.get_submodule("base_model.model.model.vision_model")
        tower.register_forward_hook(lambda *_: calls.append(1))
        rows = partition.splits["site-1"].train[:4]
        engine.stack.activate([0])
        first = engine._terms(rows).loss
        assert len(calls) == 4
        assert engine._terms(rows).loss.tolist() == first.tolist()
        assert len(calls) == 4


def test_rows_beyond_the_memory_are_kept_on_disk_and_beyond_that_computed(small, tmp_path):
    small["lora"] |= {"target": "language"}
    engine, partition, _ = prepare(fedvlm.load_config(small, f"output={tmp_path / 'run'}"))
    rows = [int(row) for row in partition.splits["site-0"].train[:6]]
    expected = [leaves(engine._images.of(row)) for row in rows]
    one = nbytes(expected[0])
    spool = Spool(tmp_path / "not-yet", budget=3 * (one + ALIGN * len(expected[0])))
    images = ImageFeatures(engine.model, engine.collator.picture, 2 * one, spool)
    for _ in range(2):
        for row, values in zip(rows, expected, strict=True):
            assert all(map(torch.equal, leaves(images.of(row)), values))
    pictures = [digest(engine.collator.picture(row)) for row in rows]
    assert list(images._kept) == pictures[:2]
    assert list(images._places) == pictures[2:5]
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_a_disk_that_is_full_costs_time_and_nothing_else(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    spool = Spool(tmp_path, budget=10**6)
    kept = spool.put({"a": [torch.arange(5.0).bfloat16(), torch.empty(0, 3)]})
    monkeypatch.setattr(os, "pwrite", refuse)
    assert spool.put({"a": torch.ones(3)}) is None
    whole, empty = spool.get(kept)["a"]
    assert torch.equal(whole, torch.arange(5.0).bfloat16())
    assert empty.shape == (0, 3)


def language(small, tmp_path, *overrides):
    """An engine that trains the language model only, and six rows of a client."""
    small["lora"] |= {"target": "language"}
    config = fedvlm.load_config(small, f"output={tmp_path / 'run'}", *overrides)
    engine, partition, _ = prepare(config)
    return engine, [int(row) for row in partition.splits["site-0"].train[:6]]


@pytest.fixture
def looks(monkeypatch):
    """A list that grows by one whenever the features of a picture are computed."""
    look, seen = ImageFeatures._look, []
    monkeypatch.setattr(ImageFeatures, "_look", lambda *a: seen.append(a) or look(*a))
    return seen


def test_a_picture_of_several_rows_is_looked_at_once(small, tmp_path, looks):
    engine, rows = language(small, tmp_path)
    same = {row: engine.collator.picture(rows[row % 2]) for row in range(4)}
    images = ImageFeatures(engine.model, same.__getitem__, 2**30)
    looks.clear()
    found = [leaves(images.of(row)) for row in range(4)]
    assert len(looks) == 2
    assert all(map(torch.equal, found[0], found[2]))
    assert not torch.equal(found[0][0], found[1][0])


def test_a_later_run_takes_over_what_an_earlier_one_kept(small, tmp_path, looks):
    with handed_on():
        engine, rows = language(small, tmp_path)
        first = [leaves(engine._images.of(row)) for row in rows]
        engine, rows = language(small, tmp_path, "algorithm.name=lora")
        looks.clear()
        for row, values in zip(rows, first, strict=True):
            assert all(map(torch.equal, leaves(engine._images.of(row)), values))
        assert not looks
        engine, rows = language(small, tmp_path, "model.dtype=bfloat16")
        looks.clear()
        assert leaves(engine._images.of(rows[5]))[0].dtype == torch.bfloat16
        assert len(looks) == 1
    engine, rows = language(small, tmp_path, "model.dtype=bfloat16")
    looks.clear()
    engine._images.of(rows[5])
    assert len(looks) == 1, "outside of the scope, runs reuse nothing"


def test_what_an_earlier_run_kept_is_given_up_for_what_this_one_needs(small, tmp_path):
    engine, rows = language(small, tmp_path)
    images = ImageFeatures(engine.model, engine.collator.picture, 2**30)
    one = nbytes(images.of(rows[0]))

    def next_run():
        return ImageFeatures(engine.model, engine.collator.picture, 4 * one)

    with handed_on():
        earlier = next_run()
        for row in rows[:3]:
            earlier.of(row)
        images = next_run()
        held = []
        for row in (rows[0], rows[3], rows[4], rows[5], rows[1]):
            images.of(row)
            held.append((len(images._kept), len(images._earlier)))
    assert held == [(1, 2), (2, 2), (3, 0), (4, 0), (4, 0)], "four at most"


def test_runs_that_are_compared_have_the_bytes_of_runs_alone(small, tmp_path, looks):
    small["lora"] |= {"target": "language"}
    small["train"] |= {"rounds": 1}
    names = ("lora", "mix")
    together = comparison.compare(names, small, f"output={tmp_path / 'together'}").folder
    looked_at, alone = len(looks), {}
    for name in names:
        looks.clear()
        run = fedvlm.run(small, f"algorithm.name={name}", f"output={tmp_path / name}").folder
        alone[name] = len(looks)
        for file in (*run.glob("adapters/*/adapter_model.safetensors"), *run.glob("answers/*")):
            other = together / f"{name}-seed-0" / file.relative_to(run)
            assert other.read_bytes() == file.read_bytes()
    assert looked_at == max(alone.values()) + 1, "the second run computes one"


def test_a_models_files_are_part_of_what_it_is(small, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(locate("tiny")[0], folder)
    config = fedvlm.load_config(small, f"model.name={folder}").model
    before = identity(config)
    assert identity(config) == before
    assert identity(config.model_copy(update={"dtype": "bfloat16"})) != before
    os.utime(folder / "model.safetensors", (0, 0))
    assert identity(config) != before
