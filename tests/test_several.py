"""Several pictures a question, in every family whose prompt has a place for each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import families
from fedvlm.batches.collate import Collator
from fedvlm.batches.objectives import sft_terms
from fedvlm.errors import DataError
from fedvlm.models.frozen import ImageFeatures
from fedvlm.models.load import load_model
from fedvlm.settings.sections import ModelConfig

ONE = ("blip-2", "blip-2-t5", "florence2", "git")  # families of one picture a question
SEVERAL = [name for name in families.FAMILIES if name not in ONE]

RANDOM = np.random.default_rng(0)


def noise(width, height):
    return Image.fromarray(RANDOM.integers(0, 255, (height, width, 3), dtype=np.uint8))


A, B, C = noise(64, 64), noise(40, 90), noise(64, 30)
PICTURES = ([A], [A, B], [B, A], A, [C, A, B])
ROWS = [{"image": each, "question": "What changed?", "answer": "the colour"} for each in PICTURES]


def batches_of(family):
    loaded = load_model(ModelConfig(name=families.folder(family), device="cpu"))
    return loaded.model.eval(), Collator(ROWS, loaded)


@torch.no_grad()
@pytest.mark.parametrize("family", SEVERAL)
def test_a_model_sees_all_pictures_of_a_row_in_their_order(family):
    model, batches = batches_of(family)
    every = range(len(ROWS))
    alone = [sft_terms(model, batches.training([row])).loss.item() for row in every]
    one, two, turned, plain, three = alone
    assert plain == one, "a list of one picture is the picture"
    assert len({round(loss, 5) for loss in (one, two, turned, three)}) == 4
    together = sft_terms(model, batches.training(every)).loss.tolist()
    assert together == pytest.approx(alone, rel=1e-5)
    features = ImageFeatures(model, batches.picture, 1 << 28)
    assert features.usable(4)
    for rows in (list(every), [4, 0, 2, 1]):
        with features.given(rows):
            found = sft_terms(model, batches.training(rows)).loss.tolist()
        assert found == pytest.approx([alone[row] for row in rows], rel=1e-5)


@pytest.mark.parametrize("family", ONE)
def test_a_family_of_one_picture_refuses_rows_with_several(family):
    _, batches = batches_of(family)
    found = batches.check(0, lambda *_: None, lambda *_: None)
    assert list(found) == [1, 2, 4]
    name = f"the prompt of '.*' (family '{batches.prompter.family}')"
    assert found[4].startswith("there are 3 pictures, but the prompt of ")
