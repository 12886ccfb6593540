"""Rows that share a picture have the features that the processor alone would give them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import families
import fedvlm
from fedvlm.batches.places import Place, Prompt
from fedvlm.batches.prompts import Prompter
from fedvlm.models.load import load_model
from fedvlm.rounds.prepare import prepare

QUESTIONS = (
    "What is this?",
    " a space before, and two after  ",
    "\nlines\n\nof text\n",
    "\u00e4\u00f6\u00fc \u4e2d\u6587 \U0001f642\u200d",
    "?",
    "",
    "<b>1 < 2</b> [INST] {{ user }} {% if %}",
    "<image> and <|im_end|> are text </s>",
    "a long one " * 40,
)
ANSWERS = ("yes", " no ", "two\nlines", "<image></s>")
PLACED = {
    "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen2_vl",
    "qwen3_vl", "smolvlm",
}  # fmt: skip


def prompter(family):
    settings = fedvlm.load_config({"model": {"name": families.folder(family)}}).model
    return Prompter(load_model(settings))


def picture(seed, size=(64, 48)):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same(ours, theirs):
    assert torch.equal(ours.prompt, theirs.prompt)
    assert ours.prompt.dtype == theirs.prompt.dtype
    assert all(map(torch.equal, ours.answers, theirs.answers))
    assert ours.cut == theirs.cut
    for found, expected in ((ours.aligned, theirs.aligned), (ours.extras, theirs.extras)):
        assert found.keys() == expected.keys()
        assert all(found[k].dtype == v.dtype for k, v in expected.items())
        assert all(torch.equal(found[k], v) for k, v in expected.items())


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_further_question_has_the_features_that_the_processor_makes(family):
    reference, fast = prompter(family), prompter(family)
    fast.places, placed = True, []
    plain = fast._placed
    fast._placed = lambda *args: placed.append(plain(*args)) or placed[-1]
    for image in (picture(0), picture(1, (30, 90))):
        fast.prepare((question, [answer]) for question in QUESTIONS for answer in ANSWERS)
        for question in QUESTIONS:
            same(
                fast.encode([image], question, ANSWERS),
                reference.encode(image, question, ANSWERS),
            )
    assert any(placed) == (family in PLACED)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_texts_of_many_rows_are_those_of_single_rows(family):
    single, many = prompter(family), prompter(family)
    many.prepare((question, [answer]) for question in QUESTIONS for answer in ANSWERS)
    assert bool(many._texts._tokens) == many.has_template
    for question in QUESTIONS:
        assert many.prompt_text(question) == single.prompt_text(question)
        assert many.text_length(question) == single.text_length(question)
        for answer in ANSWERS:
            assert torch.equal(
                many.answer_ids(question, answer), single.answer_ids(question, answer)
            )


class Token:
    """An added token with its flags."""

    def __init__(self, **flags):
        vars(self).update(dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False))
        vars(self).update(flags)


TEXT, PROMPT = [5, 1, 6], Prompt(torch.tensor([5, 2, 9, 9, 3, 6]), {}, {})


@pytest.mark.parametrize(
    ("text", "added"),
    [
        ([5, 6], {}),
        ([5, 1, 1, 6], {}),
        ([4, 1, 6], {}),
        ([5, 1, 7], {}),
        (TEXT, {2: None}),
        (TEXT, {2: Token(lstrip=True)}),
        (TEXT, {3: Token(rstrip=True)}),
        (TEXT, {1: Token(normalized=True)}),
        (TEXT, {3: Token(single_word=True)}),
    ],
    ids=[
        "no mark", "two marks", "other text before", "other text behind", "no added token",
        "white space before", "white space behind", "other normalization", "whole words",
    ],
)  # fmt: skip
def test_a_place_is_not_learned_where_other_texts_could_differ(text, added):
    known = {n: Token() for n in (1, 2, 3)}
    found = Place.learned(TEXT, PROMPT, {1}, known).prompt([7, 8, 1])
    assert found.ids.tolist() == [7, 8, 2, 9, 9, 3]
    known = {n: token for n, token in (known | added).items() if token}
    assert Place.learned(text, PROMPT, {1}, known) is None


def test_a_text_without_the_mark_or_with_two_is_left_to_the_processor():
    place = Place.learned(TEXT, PROMPT, {1}, {n: Token() for n in (1, 2, 3)})
    assert place.prompt([5, 6]) is None
    assert place.prompt([1, 5, 1]) is None


def test_aligned_inputs_that_differ_around_a_picture_are_left_to_the_processor():
    known = {n: Token() for n in (1, 2, 3)}
    alike, differ = torch.tensor([0, 1, 1, 1, 1, 0]), torch.tensor([0, 1, 1, 1, 1, 2])
    place = Place.learned(TEXT, PROMPT._replace(aligned={"types": alike}), {1}, known)
    assert place.prompt([7, 1, 8, 8]).aligned["types"].tolist() == [0, 1, 1, 1, 1, 0, 0]
    assert Place.learned(TEXT, PROMPT._replace(aligned={"types": differ}), {1}, known) is None


@pytest.fixture
def shared(tmp_path, small, monkeypatch):
    """Three pictures with five questions each, one of which is too long for its picture."""
    monkeypatch.setenv("FEDVLM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for n in range(15):
        picture(n % 3).save(folder / f"{n % 3}.png")
        question = "What " * (200 if n == 7 else n + 1)
        lines.append({"file_name": f"{n % 3}.png", "question": question, "chosen": "noise"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    small["data"] = {"path": str(folder), "max_length": 150, "on_error": "skip"}
    small["partition"] = {"kind": "iid", "clients": 2, "min_rows": 2}
    small["model"] = {"name": "tiny"}
    return small


def encoded(settings):
    engine, partition, _ = prepare(fedvlm.load_config(settings, "train.rounds=20"))
    assert engine.collator._ahead is not None
    return engine.collator, partition


def test_rows_that_are_too_long_are_left_out_and_counted_as_before(shared, caplog):
    fast, partition = encoded(shared)
    assert fast.prompter.places
    assert len(fast.rows) == 14
    assert "1 of 15 rows" in caplog.text
    assert sum(sum(counts.values()) for counts in partition.counts().values()) == 14
    for index in range(14):
        same(fast._ahead[index], without_cut(fast._encode(index)))


def without_cut(features):
    """Features as they are read again: the number of cut tokens is kept beside them."""
    return replace(features, cut=0)


def test_a_processor_that_disagrees_makes_every_prompt_itself(shared, monkeypatch):
    monkeypatch.setattr(
        Place, "prompt", lambda self, text: Prompt(torch.tensor([1]), {}, self.extras)
    )
    slow, _ = encoded(shared)
    assert not slow.prompter.places
    for index in range(14):
        same(slow._ahead[index], without_cut(slow._encode(index)))
