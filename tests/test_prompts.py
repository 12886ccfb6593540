"""Prompts: chat templates, begin and end tokens, and questions that are too long."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from PIL import Image

import families
import fedvlm
from fedvlm.batches.prompts import Prompter
from fedvlm.errors import DataError
from fedvlm.models.load import load_model
from fedvlm.settings.sections import ModelConfig

IMAGE = Image.new("RGB", (32, 32), "red")


@pytest.fixture(scope="module")
def tiny():
    return load_model(ModelConfig(device="cpu"))


def prompter(family, **settings):
    name = family if family == "tiny" else families.folder(family)
    return Prompter(load_model(ModelConfig(name=name, device="cpu")), **settings)


@pytest.mark.parametrize("family", ["idefics3", "gemma3", "llava", "paligemma", "blip-2"])
def test_a_text_begins_once(family):
    encoder = prompter(family)
    ids = encoder.encode(IMAGE, "What?", ["red"]).prompt
    assert (ids == encoder.tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("gemma3", "<end_of_turn>"),
        ("smolvlm", "<end_of_utterance>"),
        ("qwen2_vl", "<|im_end|>"),
        ("llava", "</s>"),
        ("blip-2", "\n"),
    ],
)
def test_an_answer_ends_as_the_model_ends_a_turn(family, end):
    encoder = prompter(family)
    ids = encoder.answer_ids("What?", "dark red")
    assert encoder.tokenizer.decode(ids[-1:]) == end
    assert encoder.tokenizer.decode(ids[:-1]).strip() == "dark red"


def test_families_without_a_template_are_asked_as_they_were_trained():
    assert prompter("blip-2").prompt_text("Why?") == "Question: Why? Answer:"
    assert prompter("florence2").prompt_text("Why?") == "Why?"
    assert prompter("paligemma").prompt_text("Why?") == "<image>Why?"


def test_another_model_without_a_template_gets_image_and_question_on_a_line(tiny):
    processor = copy.deepcopy(tiny.processor)
    processor.chat_template = None
    encoder = Prompter(dataclasses.replace(tiny, processor=processor))
    assert encoder.prompt_text("Why?") == "<image>Why?\n"
    assert encoder.tokenizer.decode(encoder.answer_ids("Why?", "red")) == "red<|end|>"


def test_a_template_that_forgets_the_image_is_an_error(tiny):
    processor = copy.deepcopy(tiny.processor)
    processor.chat_template = (
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] if 'text' in p else '' }}"
        "{% endfor %}{% endfor %}"
    )
    encoder = Prompter(dataclasses.replace(tiny, processor=processor))
    with pytest.raises(DataError, match=r"processor of 'tiny' refuses .* 0 <image> tokens"):
        encoder.encode(IMAGE, "What?", ["red"])


def test_a_prompt_without_the_models_image_token_is_an_error(tiny):
    encoder = Prompter(tiny)
    encoder.image_id = encoder.tokenizer.pad_token_id  # processor and model disagree
    with pytest.raises(DataError, match="no image token, so the model would not see the image"):
        encoder.encode(IMAGE, "What?", ["red"])


def test_a_prompt_is_never_cut_and_the_number_to_raise_is_told(tiny):
    whole = Prompter(tiny).encode(IMAGE, "What colour is it?", ["red"])
    needed = len(whole.prompt) + 1
    fits = Prompter(tiny, max_length=needed).encode(IMAGE, "What colour is it?", ["red"])
    assert fits.prompt.tolist() == whole.prompt.tolist()
    with pytest.raises(DataError) as caught:
        Prompter(tiny, max_length=needed - 1).encode(IMAGE, "What colour is it?", ["red"])
    assert f"needs {needed - 1} tokens, 16 of them for the image" in str(caught.value)
    assert f"raise data.max_length to at least {needed}" in str(caught.value)


def test_a_prompt_beyond_the_models_positions_says_so(tiny):
    with pytest.raises(DataError, match=r"'tiny' takes at most 1024 .* shorten the question"):
        Prompter(tiny).encode(IMAGE, "so long a question " * 300, ["red"])


def test_a_long_answer_is_cut_at_its_end_and_counted(tiny):
    whole = Prompter(tiny).encode(IMAGE, "What?", ["red and blue and green"])
    encoder = Prompter(tiny, max_length=len(whole.prompt) + 3)
    found = encoder.encode(IMAGE, "What?", ["red and blue and green", "red"])
    assert found.answers[0].tolist() == whole.answers[0][:3].tolist()
    assert int(found.answers[1][-1]) in encoder.ends
    assert found.cut == len(whole.answers[0]) - 3


def test_a_run_names_the_row_whose_prompt_does_not_fit(small):
    small["data"]["max_length"] = 20
    with pytest.raises(DataError, match=r"row \d+: the prompt needs \d+ tokens"):
        fedvlm.run(small)
