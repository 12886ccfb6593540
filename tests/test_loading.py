"""Every family loads. A model that cannot be loaded is refused with the reason."""

import collections
import importlib.util
import json
import logging
import pickle
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from families import FAMILIES, folder
from fedvlm.config import load
from fedvlm.errors import FedVLMError
from fedvlm.models import processors
from fedvlm.models.load import load_model
from fedvlm.models.names import native_name
from fedvlm.models.processors import load_processor
from fedvlm.settings.sections import ModelConfig

VIDEO = ("smolvlm", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
TEMPLATED = (*VIDEO, "idefics3", "llava", "llava_next", "gemma3")
RED, BLUE = (Image.new("RGB", (64, 48), colour) for colour in ((250, 20, 30), (10, 60, 240)))


def read(name, **settings):
    return load_model(ModelConfig(name=str(name), device="cpu", **settings))


def encode(processor, question, image):
    text = question
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turn = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
    pictures = [image] if isinstance(processor, hf.GitProcessor) else [[image]]
    return dict(processor(text=[text], images=pictures, return_tensors="pt"))


def logits(model, inputs):
    if model.config.is_encoder_decoder:
        inputs = {**inputs, "decoder_input_ids": torch.tensor([[1, 30, 40]])}
    return model(**inputs).logits


@pytest.fixture
def copied(tmp_path):
    """A copy of the tiny LLaVA's folder, for tests that damage it."""
    return Path(shutil.copytree(folder("llava"), tmp_path / "llava"))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_loads_answers_and_looks_at_image_and_question(family):
    loaded = read(folder(family))
    model, processor = loaded.model.eval(), loaded.processor
    assert not any(p.requires_grad for p in model.parameters())
    assert bool(getattr(processor, "chat_template", None)) == (family in TEMPLATED)
    inputs = encode(processor, "what colour is it", RED)
    seen = logits(model, inputs)
    assert seen.isfinite().all()
    other_image = logits(model, encode(processor, "what colour is it", BLUE))
    other_question = logits(model, encode(processor, "what kind is it", RED))
    for other in (other_image, other_question):
        assert (seen[:, -1] - other[:, -1]).abs().max() > 1e-2
    prompt = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    answer = model.generate(**inputs, max_new_tokens=4)[:, prompt:]
    assert 1 <= answer.shape[1] <= 5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_saved_again_has_its_class_and_gives_the_same_inputs(family, tmp_path):
    processor = load_processor(folder(family), True)
    processor.save_pretrained(tmp_path)
    files = [json.loads((Path(p) / "processor_config.json").read_text("utf-8"))
             for p in (folder(family), tmp_path)]  # fmt: skip
    if importlib.util.find_spec(
        "torchvision"
    ):  # then the processor has a video part, which is saved in full
        for file in files:
            file["video_processor"] = file.get("video_processor", {}).get("video_processor_type")
    assert files[0] == files[1]
    assert getattr(hf, files[1]["processor_class"]) in type(processor).mro()
    assert (files[1].get("video_processor") is not None) == (family in VIDEO)
    again = load_processor(str(tmp_path), True)
    one, other = (encode(p, "what is it", RED) for p in (processor, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="has torchvision")
def test_a_processor_without_its_video_part_says_so_and_can_be_pickled():
    processor = load_processor(folder("qwen2_vl"), True)
    with pytest.raises(FedVLMError, match="pictures only"):
        processor(text=["<|video_pad|>"], videos=[[RED, BLUE]])
    again = pickle.loads(pickle.dumps(processor))
    inputs = encode(processor, "what is it", RED), encode(again, "what is it", RED)
    assert all(torch.equal(inputs[0][key], inputs[1][key]) for key in inputs[0])


def test_a_processor_in_the_older_layout_of_files_loads_and_keeps_its_video_settings(tmp_path):
    path = Path(shutil.copytree(folder("qwen2_vl"), tmp_path / "old"))
    whole = json.loads((path / "processor_config.json").read_text("utf-8"))
    (path / "processor_config.json").unlink()
    pictures = {**whole["image_processor"], "processor_class": "Qwen2VLProcessor"}
    pictures["image_processor_type"] = "Qwen2VLImageProcessor"
    (path / "preprocessor_config.json").write_text(json.dumps(pictures), "utf-8")
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 3}
    (path / "video_preprocessor_config.json").write_text(json.dumps(video), "utf-8")
    template = path / "chat_template.jinja"
    (path / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    processor = load_processor(str(path), True)
    one, other = (
        encode(p, "is it", RED) for p in (processor, load_processor(folder("qwen2_vl"), True))
    )
    assert all(torch.equal(one[key], other[key]) for key in other)
    processor.save_pretrained(tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "processor_config.json").read_text("utf-8"))
    assert saved["video_processor"]["fps"] == 3


def test_smolvlm_needs_no_num2words_for_pictures(monkeypatch):
    smolvlm = sys.modules[hf.SmolVLMProcessor.__module__]
    monkeypatch.setattr(smolvlm, "num2words", None)
    monkeypatch.setattr(processors.importlib.util, "find_spec", lambda name: None)
    inputs = encode(load_processor(folder("smolvlm"), True), "what is it", RED)
    assert inputs["pixel_values"].shape == (1, 1, 3, 32, 32)
    assert smolvlm.num2words is None


@pytest.mark.parametrize(
    ("name", "native"),
    [
        ("microsoft/Florence-2-base", "florence-community/Florence-2-base"),
        ("microsoft/Florence-2-large-ft", "florence-community/Florence-2-large-ft"),
        ("liuhaotian/llava-v1.5-7b", "llava-hf/llava-1.5-7b-hf"),
        ("liuhaotian/llava-v1.6-mistral-7b", "llava-hf/llava-v1.6-mistral-7b-hf"),
        ("liuhaotian/llava-v1.6-34b", "llava-hf/llava-v1.6-34b-hf"),
        ("lmms-lab/llava-onevision-qwen2-7b-ov", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
        ("lmms-lab/llava-onevision-qwen2-0.5b-si", "llava-hf/llava-onevision-qwen2-0.5b-si-hf"),
        ("OpenGVLab/InternVL2_5-1B-MPO", "OpenGVLab/InternVL2_5-1B-MPO-hf"),
        ("OpenGVLab/InternVL3-1B", "OpenGVLab/InternVL3-1B-hf"),
        ("OpenGVLab/InternVL3_5-8B", "OpenGVLab/InternVL3_5-8B-HF"),
    ],
)
def test_a_release_with_its_own_code_is_answered_with_the_native_name(name, native):
    with pytest.raises(FedVLMError) as refusal:
        read(name)
    assert f"'{name}'" in str(refusal.value)
    assert f"'{native}'" in str(refusal.value)
    assert native_name(native) is None


def test_other_names_are_themselves():
    for name in ("HuggingFaceTB/SmolVLM-256M-Instruct", "Qwen/Qwen2-VL-2B-Instruct", "tiny"):
        assert native_name(name) is None


def test_a_folder_whose_model_needs_its_own_code_is_refused(copied):
    file = copied / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_llava.Llava"}
    file.write_text(json.dumps(config), "utf-8")
    with pytest.raises(FedVLMError, match=r"auto_map.*transformers' own format"):
        read(copied)
    config["_name_or_path"] = "microsoft/Florence-2-base"
    file.write_text(json.dumps(config), "utf-8")
    with pytest.raises(FedVLMError, match="florence-community/Florence-2-base'"):
        read(copied)


def test_a_folder_that_lacks_weights_is_refused(copied):
    file = copied / "model.safetensors"
    weights = load_file(file)
    for name in [n for n in weights if "o_proj" in n]:
        weights[name.replace("o_proj", "wo")] = weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        FedVLMError, match=r"lacks 2 weights of Llava.*layers\.0\.self_attn\.o_proj"
    ):
        read(copied)


def test_weights_that_are_not_used_are_a_warning(copied, caplog):
    file = copied / "model.safetensors"
    save_file({**load_file(file), "ema.decay": torch.ones(1)}, file, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "fedvlm"):
        read(copied)
    assert "1 weights are not used" in caplog.text
    assert "ema.decay" in caplog.text


def test_quantization_without_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FedVLMError, match=r"pip install 'fedvlm\[quant\]'"):
        read(folder("llava"), quantization="4bit")


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_quantized_model_is_close_and_its_other_weights_are_float32(kind):
    pytest.importorskip("bitsandbytes")
    whole = read(folder("llava"))
    packed = read(folder("llava"), quantization=kind, gradient_checkpointing=True)
    inputs = encode(whole.processor, "what is it", RED)
    with torch.no_grad():
        want, got = (logits(m.model.eval(), inputs) for m in (whole, packed))
    assert torch.corrcoef(torch.stack((want.flatten(), got.flatten())))[0, 1] > 0.85
    norms = [m for m in packed.model.modules() if isinstance(m, nn.LayerNorm)]
    assert norms[0].weight.dtype == torch.float32
    assert packed.model.get_memory_footprint() < whole.model.get_memory_footprint()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(family):
    results = []
    for checkpointing in (False, True):
        exact = {"dtype": "float64"}  # their sums may differ in order
        loaded = read(folder(family), gradient_checkpointing=checkpointing, **exact)
        torch.manual_seed(0)  # for the adapter and the dropout
        lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(loaded.model, lora).train()
        runs = collections.Counter()
        for name, module in model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_hook(lambda *_, name=name, runs=runs: runs.update([name]))
        inputs = encode(loaded.processor, "what is it", RED)
        inputs |= {n: v.double() for n, v in inputs.items() if v.is_floating_point()}
        loss = logits(model, inputs).square().mean()
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.item(), gradients, max(runs.values())))
    (loss, gradients, once), (other, others, twice) = results
    assert other == pytest.approx(loss, rel=1e-12)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-9, atol=1e-12)
    assert (once, twice) == (1, 2)


def test_a_family_without_gradient_checkpointing_is_refused(monkeypatch):
    monkeypatch.setattr(hf.LlavaForConditionalGeneration, "supports_gradient_checkpointing", False)
    with pytest.raises(FedVLMError, match="LlavaForConditionalGeneration does not support"):
        read(folder("llava"), gradient_checkpointing=True)


def test_the_new_settings_are_read_and_off_by_default():
    config = load({}, "model.quantization=8bit", "model.gradient_checkpointing=true")
    assert config.model.quantization == "8bit"
    assert config.model.gradient_checkpointing
    assert ModelConfig().quantization == "none"
    assert not ModelConfig().gradient_checkpointing
