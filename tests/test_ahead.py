"""Rows are encoded ahead: with the same features, once, within a budget of disk space."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

import families
import fedvlm
from fedvlm.batches.ahead import fingerprint
from fedvlm.errors import DataError
from fedvlm.rounds.prepare import prepare
from fedvlm.rounds.progress import Quiet


class Counting(Quiet):
    """Counts the rows that are encoded."""

    rows = 0

    def encoded(self, done, rows):
        self.rows += 1

    def every(self, thing, name):
        """The thing, with a method whose calls are counted."""
        method = getattr(thing, name)

        def counted(this, *args, **kwargs):
            self.rows += 1
            return method(*args, **kwargs)

        members = {name: counted, "__getattr__": lambda this, other: getattr(thing, other)}
        return type("Counted", (), members)()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prepared(settings, *overrides):
    counting = Counting()
    engine, _, _ = prepare(fedvlm.load_config(settings, *overrides), counting)
    return engine.collator, counting.rows


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures as files, with questions."""
    path = tmp_path / "pictures"
    path.mkdir()
    random, lines = np.random.default_rng(0), []
    for n in range(12):
        pixels = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{n}.png")
        lines.append(f'{{"file_name": "{n}.png", "question": "What is {n}?", "chosen": "noise"}}')
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("family", ["tiny", "gemma3", "qwen2_vl", "florence2"])
def test_features_are_those_of_encoding_on_the_spot(small, family):
    small["model"] = {"name": "tiny" if family == "tiny" else families.folder(family)}
    small["data"]["scenes"] |= {"rows": 8}
    small["train"] |= {"rounds": 8}
    small["objective"] = {"name": "dpo"}
    collator, rows = prepared(small)
    assert rows == len(collator.rows)
    for index in range(len(collator.rows)):
        ours, theirs = collator._ahead[index], collator._encode(index)
        assert torch.equal(ours.prompt, theirs.prompt)
        assert len(ours.answers) == 2
        assert all(map(torch.equal, ours.answers, theirs.answers))
        for found, expected in ((ours.aligned, theirs.aligned), (ours.extras, theirs.extras)):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_a_second_run_reads_what_the_first_one_encoded(small):
    _, first = prepared(small)
    collator, second = prepared(small, f"output={small['output']}-2", "train.rounds=5")
    assert first == len(collator.rows)
    assert second == 0
    assert collator._ahead is not None


def test_runs_are_the_same_with_and_without(small, tmp_path):
    with_it, without = (
        fedvlm.run(small, f"output={tmp_path / str(mib)}", f"data.cache={mib}") for mib in (64, 0)
    )
    assert with_it.table == without.table


def test_few_visits_need_no_encoding_ahead(small):
    collator, rows = prepared(small, "train.rounds=1", "train.local_steps=1", "train.batch_size=2")
    assert rows == 0
    assert collator._ahead is None


def test_what_decides_the_features_decides_the_name(small, folder):
    small["data"] = {"path": str(folder)}
    small["partition"] = {"kind": "iid", "clients": 2, "min_rows": 2}

    def name(*overrides):
        collator, _ = prepared(small, "train.rounds=1", "train.local_steps=1", *overrides)
        return fingerprint(collator.rows, collator.prompter, collator.roles)

    before = name()
    assert name() == before
    assert name("data.max_length=300") != before
    assert name(f"model.name={families.folder('gemma3')}") != before
    picture = folder / "3.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    os.utime(picture, (1, 1))
    assert name() != before


def test_a_small_budget_leaves_rows_to_be_encoded_when_they_come(small, cache):
    collator, rows = prepared(small, "model.name=tiny", "data.cache=1")
    assert rows == 0
    assert collator._ahead is None
    assert not list(cache.glob("encoded-*"))
    assert len(collator.features(0).prompt) > 0


def test_older_data_sets_make_room(small, cache):
    small["model"] = {"name": "tiny"}
    prepared(small)
    (old,) = cache.glob("encoded-*.arrow")
    os.utime(old, (1, 1))
    size = old.stat().st_size / 2**20
    prepared(small, f"data.cache={int(size * 1.5)}", "seed=1")
    (new,) = cache.glob("encoded-*.arrow")
    assert new != old


def test_a_row_that_cannot_be_encoded_is_named(small, folder, cache):
    small["data"] = {"path": str(folder), "max_length": 40}
    small["partition"] = {"kind": "iid", "clients": 2, "min_rows": 2}
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[7] = lines[7].replace("What", "What " * 60)
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"row 7: the prompt needs .* tokens"):
        prepared(small)


def test_a_batch_that_another_thread_began_is_the_one_that_is_asked_for(small, monkeypatch):
    collator, _ = prepared(small, "data.cache=0")
    expected = {rows: collator.training(rows) for rows in [(0, 3), (1, 2)]}
    began, plain = [], collator._training
    monkeypatch.setattr(collator, "_training", lambda rows: began.append(rows) or plain(rows))
    collator.prefetch([0, 3])
    found = {rows: collator.training(rows) for rows in [(0, 3), (1, 2)]}
    assert began == [[0, 3], [1, 2]], "no batch is collated twice"
    collator.prefetch([1, 2])
    found[0, 3] = collator.training((0, 3))
    for rows, batch in expected.items():
        assert all(torch.equal(found[rows][name], value) for name, value in batch.items())


@pytest.mark.parametrize("family", ["tiny", "qwen2_vl"])
def test_a_picture_of_many_rows_is_opened_processed_and_kept_once(small, folder, family):
    names = [f"{n % 3}.png" for n in range(12)]
    lines = (folder / "metadata.jsonl").read_text()
    for n, name in enumerate(names):
        lines = lines.replace(f'"{n}.png"', f'"{name}"')
    (folder / "metadata.jsonl").write_text(lines)
    small["model"] = {"name": "tiny" if family == "tiny" else families.folder(family)}
    small["data"] = {"path": str(folder)}
    small["partition"] = {"kind": "iid", "clients": 2, "min_rows": 2}
    collator, _ = prepared(small, "train.rounds=1", "train.local_steps=1", "data.cache=0")
    assert collator._places_hold, "which opens some pictures once more"
    opened, processed = Counting(), Counting()
    pictures, images = collator.pictures, collator.prompter._once.image_processor
    collator._last, images._last = None, ()
    collator.pictures = opened.every(pictures, "open_all")
    images._processor = processed.every(images._processor, "__call__")
    assert collator.check(2**26, lambda *_: None, lambda *_: None) == {}
    assert (opened.rows, processed.rows) == (3, 3)
    table = collator._ahead._table
    assert len(set(table["picture"])) == 3
    assert sum(len(row) for row in table["features"]) < 4 * len(table["features"][0])

    collator.prompter._once = collator.prompter.processor
    for index, row in enumerate(collator.rows):
        ours = collator._ahead[index]
        theirs = collator.prompter.encode(
            pictures.open(row["image"]), row["question"], [row["answer"]]
        )
        assert torch.equal(ours.prompt, theirs.prompt)
        assert torch.equal(*ours.answers, *theirs.answers)
        assert ours.extras.keys() == theirs.extras.keys()
        assert all(torch.equal(ours.extras[k], v) for k, v in theirs.extras.items())
