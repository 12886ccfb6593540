"""The bundled tiny model: building, training, saving, and the answers of the shipped model."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedvlm.data import compose, questions, render

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import _tiny as tiny
import hints
import muon
import train_tiny

SIZES = [(64, 64), (32, 32), (400, 100), (50, 333), (1, 1)]


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny.TINY, local_files_only=True)


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(tiny.TINY, local_files_only=True).eval()


@pytest.fixture(scope="module")
def fresh(processor):
    return tiny.build_model(processor.tokenizer, vision_layers=1, text_layers=1).eval()


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", "--steps", "4", "--minutes", "1000000"])
    arguments = train_tiny.parse()
    arguments.pictures, arguments.questions = 2, 3
    return arguments


def prompt(processor, question: str) -> str:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([turn], add_generation_prompt=True)


def held_out(count: int, seed: int = 991) -> list[tuple[Image.Image, questions.Item]]:
    """Generic scenes with one question each, from a seed that training never used."""
    rng, made = random.Random(f"test/{seed}"), []
    while len(made) < count:
        scene = compose.generic_scene(rng)
        kinds, weights = tuple(questions.GENERIC), tuple(questions.GENERIC.values())
        item = questions.ask(rng, rng.choices(kinds, weights)[0], scene)
        if item is not None:
            made.append((render.render(scene), item))
    return made


def answers(model, processor, rows) -> list[str]:
    """Greedy answers to a left-padded batch."""
    texts = [prompt(processor, item.question) for _, item in rows]
    pictures = [[image] for image, _ in rows]
    batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=40)[:, batch["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(ids, skip_special_tokens=True)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_encodes_and_decodes_to_itself(text):
    tokenizer = _tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def _tokenizer():
    if not hasattr(_tokenizer, "made"):
        _tokenizer.made = tiny.FastTokenizer.from_pretrained(tiny.TINY, local_files_only=True)
    return _tokenizer.made


def test_the_tokenizer_comes_from_the_corpus_alone():
    made = [tiny.build_tokenizer(tiny.corpus(scenes=200), 600) for _ in range(2)]
    assert made[0].get_vocab() == made[1].get_vocab()
    assert len(made[0]) == 600


def test_prompt_and_answer_and_end_are_the_template_of_the_dialogue(processor):
    asked = [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]
    told = [{"type": "text", "text": "dark red"}]
    dialogue = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    text = processor.apply_chat_template(dialogue)
    assert text == prompt(processor, "What colour is it?") + "dark red" + tiny.END
    ids = processor.tokenizer
    assert ids(text)["input_ids"] == (
        ids(prompt(processor, "What colour is it?"))["input_ids"]
        + ids("dark red")["input_ids"]
        + [ids.eos_token_id]
    )


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_of_any_size_becomes_sixteen_tokens(processor, size):
    image = Image.new("RGB", size, (200, 30, 90))
    batch = processor(text=[prompt(processor, "?")], images=[[image]], return_tensors="pt")
    image_id = processor.tokenizer.convert_tokens_to_ids(tiny.IMAGE)
    assert batch["pixel_values"].shape == (1, 1, 3, 64, 64)
    assert (batch["input_ids"] == image_id).sum() == 16


def test_training_sees_the_pixels_and_tokens_that_the_processor_makes(processor):
    (scene, picture, items) = train_tiny.sample(0, 0, 1, 1)[0]
    packed = train_tiny.pack([(scene, picture, items)], processor.tokenizer)
    text = prompt(processor, items[0].question) + items[0].chosen
    inputs = processor(text=[text], images=[[Image.fromarray(picture)]], return_tensors="pt")
    assert torch.equal(packed["input_ids"], inputs["input_ids"])
    assert torch.allclose(packed["pixel_values"], inputs["pixel_values"], atol=1e-6)


def test_questions_packed_in_one_row_give_the_logits_that_each_gives_alone(processor, fresh):
    rows = train_tiny.sample(0, 3, 2, 3)
    packed = train_tiny.forward(fresh, train_tiny.pack(rows, processor.tokenizer))[0]
    alone = []
    for _, picture, items in rows:
        for item in items:
            text = prompt(processor, item.question)
            length = len(processor.tokenizer(item.chosen)["input_ids"]) + 1
            image = Image.fromarray(picture)
            inputs = processor(text=[text + item.chosen], images=[[image]], return_tensors="pt")
            alone.append(fresh(**inputs).logits[0, -length:])
    assert torch.allclose(packed, torch.cat(alone), atol=1e-4)


def test_hints_point_at_the_things():
    thing = render.Thing("star", "blue", "large", 3, 48.0, 44.0, 12.0)
    scene, star = render.Scene((thing,), (0, 0, 0)), render.SHAPES.index("star")
    patches = hints.patch_labels(scene).reshape(8, 8, 4)
    assert patches[5, 5].tolist() == [1 + star, 3, 1, 1]
    assert (patches[:3] == 0).all()
    cells = hints.cell_labels(scene).reshape(4, 4, 5)
    assert cells[2, 2].tolist() == [star, 2, 0, 1, 1]
    assert (cells[:2] == hints.IGNORED).all()


def test_a_resumed_training_equals_an_uninterrupted_one(processor, recipe, tmp_path):
    tokenizer = processor.tokenizer

    def begin():
        model = tiny.build_model(tokenizer, vision_layers=1, text_layers=1)
        torch.manual_seed(0)
        head = hints.Hints(128, tokenizer)
        return model, head, train_tiny.build_optimizers(model, head, recipe)

    def go(parts, steps):
        for step in steps:
            done = step / recipe.steps
            train_tiny.schedule(parts[2], step, done, recipe)
            train_tiny.train_step(parts[0], parts[1], tokenizer, parts[2], recipe, step, done)

    whole, first, second = begin(), begin(), begin()
    go(whole, range(4))
    go(first, range(2))
    train_tiny.save_state(tmp_path, *first, 2, 0.5)
    assert train_tiny.resume(tmp_path, *second) == (2, 0.5)
    go(second, range(2, 4))
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_moves_a_matrix_by_an_orthogonal_step():
    for shape in ((3, 8, 32), (2, 32, 8)):
        made = muon.orthogonal(torch.randn(shape))
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_saving_and_loading_gives_the_same_answers(processor, fresh, tmp_path):
    from transformers import AutoModelForImageTextToText

    half = copy.deepcopy(fresh)
    for weight in half.parameters():
        weight.data = weight.data.half().float()
    tiny.save(fresh, processor, tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    rows = held_out(2)
    texts = [prompt(processor, item.question) for _, item in rows]
    images = [[image] for image, _ in rows]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert again.dtype == torch.float32
    assert torch.allclose(half(**inputs).logits, again(**inputs).logits, atol=1e-5)


def test_the_shipped_folder_is_small():
    assert sum(path.stat().st_size for path in tiny.TINY.iterdir()) < 8_000_000


def test_the_shipped_model_answers_generic_questions(shipped, processor):
    rows = held_out(120)
    said = answers(shipped, processor, rows)
    right = [a == item.chosen for a, (_, item) in zip(said, rows, strict=True)]
    assert np.mean(right) >= 0.85


def test_a_left_padded_batch_gives_the_answers_of_single_prompts(shipped, processor):
    rows = held_out(10, seed=5)
    together = answers(shipped, processor, rows)
    assert together == [answers(shipped, processor, [row])[0] for row in rows]
