"""A damaged or odd model folder is refused with one sentence, and templates are never ignored."""

import contextlib
import json
import logging
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedvlm.errors import FedVLMError
from fedvlm.models import folder as folders
from fedvlm.models.folder import check_folder
from fedvlm.models.load import ASSETS, load_model, load_shapes
from fedvlm.models.processors import choose_template, load_processor
from fedvlm.settings.sections import ModelConfig

TINY = ASSETS / "tiny"
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
LISTED = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def copied(tmp_path):
    """A copy of the bundled model's folder, for tests that damage it."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def refusal(name):
    with pytest.raises(FedVLMError) as found:
        load_model(ModelConfig(name=str(name), device="cpu"))
    assert len(str(found.value)) <= 2000
    return str(found.value)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def moved(path, template=None):
    """Moves the chat template into the tokenizer's configuration; returns its text."""
    jinja, config = path / "chat_template.jinja", path / "tokenizer_config.json"
    text = template or jinja.read_text("utf-8")
    jinja.unlink()
    write(config, json.loads(config.read_text("utf-8")) | {"chat_template": text})
    return text


# Chat templates


def test_a_template_in_the_tokenizer_only_is_used_and_saved(copied, tmp_path, caplog):
    text = moved(copied)
    with caplog.at_level(logging.WARNING, "fedvlm"):
        processor = load_processor(str(copied), True)
    assert processor.chat_template == text == load_processor(str(TINY), True).chat_template
    assert not caplog.records
    processor.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text("utf-8") == text


@pytest.mark.parametrize("template", [PLAIN, LISTED, "{{ nothing.at.all }}", "{% broken"])
def test_a_template_without_the_image_is_not_used_and_the_warning_says_why(
    copied, caplog, template
):
    moved(copied, template)
    with caplog.at_level(logging.WARNING, "fedvlm"):
        processor = load_processor(str(copied), True)
    assert not processor.chat_template
    (record,) = caplog.records
    assert "the tokenizer's chat template is not used: " in record.getMessage()
    assert len(record.getMessage()) < 2000


def test_the_processors_template_wins_and_a_fitting_other_is_named(caplog):
    processor = load_processor(str(TINY), True)
    own = processor.chat_template
    with caplog.at_level(logging.WARNING, "fedvlm"):
        processor.tokenizer.chat_template = PLAIN  # the text model's template, as in many releases
        choose_template(processor, "here")
        assert not caplog.records
        processor.tokenizer.chat_template = own + "{# another #}"
        choose_template(processor, "here")
    assert "the processor's is used" in caplog.text
    assert processor.chat_template == own


# Adapters


def test_an_adapter_beside_the_model_is_refused(copied):
    write(copied / "adapter_config.json", {"base_model_name_or_path": "some/base"})
    assert "holds an adapter beside the model" in refusal(copied)
    assert "merge it (fedvlm export --merge) or remove its files" in refusal(copied)
    with pytest.raises(FedVLMError, match="adapter beside the model"):
        load_shapes(ModelConfig(name=str(copied), device="cpu"))


@pytest.mark.parametrize("content", [{"base_model_name_or_path": "some/base"}, "[]", "{"])
def test_an_adapter_alone_is_named_as_such(tmp_path, content):
    write(tmp_path / "adapter_config.json", content)
    assert "is an adapter and no whole model; its base model is '" in refusal(tmp_path)


def test_a_hub_model_with_an_adapter_is_refused():
    with pytest.raises(FedVLMError, match=r"'a/b' holds an adapter .of the base model 'c/d'"):
        folders.refuse_adapter("a/b", {"base_model_name_or_path": "c/d"})
    folders.refuse_adapter("a/b", {})


# Files


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", "", "its config.json is no JSON"),
        ("config.json", "[1]", "its config.json must hold a JSON object, but it holds a list"),
        ("config.json", '{"model_type": "smolvlm", ', "its config.json is no JSON"),
        ("config.json", "[" * 100_000, "its config.json is no JSON"),
        ("config.json", '{"model_type": 7}', "its config.json names no model_type"),
        ("config.json", '{"model_type": "llama"}', "holds a 'llama' model, which does not write"),
        ("config.json", '{"model_type": "clip"}', "holds a 'clip' model, which does not write"),
        ("config.json", '{"model_type": "unheard-of"}', "unheard-of"),
        ("tokenizer_config.json", "null", "its tokenizer_config.json must hold a JSON object"),
        ("processor_config.json", "\ud800".encode("utf-8", "replace").decode(), "is no JSON"),
        ("tokenizer.json", '{"version": "1.0"}', "does not load as a vision-language model"),
        ("model.safetensors", "", "its model.safetensors is empty"),
        ("model.safetensors", "short", "its model.safetensors is damaged or cut"),
    ],
)
def test_a_damaged_file_is_named(copied, file, content, said):
    write(copied / file, content)
    assert said in refusal(copied)


def test_cut_weights_are_found_by_their_head(copied):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert "its model.safetensors is damaged or cut" in refusal(copied)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["config.json"], "it has no config.json"),
        (["model.safetensors"], "it has no weights (model.safetensors or"),
        (["tokenizer.json", "tokenizer_config.json"], "does not load as a vision-language model"),
        (["processor_config.json"], "does not load as a vision-language model"),
    ],
)
def test_a_missing_file_is_named(copied, missing, said):
    for file in missing:
        (copied / file).unlink()
    assert said in refusal(copied)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": "one.safetensors"}}, "it has no 'one.safetensors', which its"),
        ({"weight_map": {"a": "../x.safetensors"}}, "'../x.safetensors', a file outside of it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd', a file outside of it"),
        ({"weight_map": {"a": "s/../../x"}}, "a file outside of it"),
        ({"weight_map": {"a": 3}}, "names '3', a file outside of it"),
        ({"weight_map": {"a": "\0"}}, "a file outside of it"),
        ({"weight_map": []}, "has no weight_map"),
        ([], "must hold a JSON object"),
    ],
)
def test_an_index_names_files_of_its_folder(copied, index, said):
    (copied / "model.safetensors").unlink()
    write(copied / "model.safetensors.index.json", index)
    assert said in refusal(copied)


def test_whole_shards_load(copied):
    whole = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    names, shards = sorted(whole), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({n: whole[n] for n in part}, copied / file, metadata={"format": "pt"})
        shards |= dict.fromkeys(part, file)
    write(copied / "model.safetensors.index.json", {"metadata": {}, "weight_map": shards})
    assert load_model(ModelConfig(name=str(copied), device="cpu")).model is not None


def test_weights_of_other_shapes_are_named(copied):
    file = copied / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config["text_config"]["intermediate_size"] += 1
    write(file, config)
    assert "its weights have other shapes than its config.json asks for" in refusal(copied)


def test_names_that_are_no_folder_are_one_short_message(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "(it is a file)" in refusal(tmp_path / "file")
    assert "without ~" in refusal("~/model")
    for name in ("a b", "é", "a\0b", "/a\0b", "x" * 5000, "/" + "x" * 5000, "a\nb", " "):
        refusal(name)


def test_folders_with_odd_names_load(copied, tmp_path):
    odd = copied.rename(tmp_path / "mödel of\nus [x]")
    assert load_model(ModelConfig(name=str(odd), device="cpu")).name == str(odd)


def test_a_folder_that_cannot_be_read_is_named(copied, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folders.os, "listdir", refuse)
    with pytest.raises(FedVLMError, match=r"cannot be read \(Permission denied\)"):
        check_folder(str(copied))


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_a_damaged_description_is_refused_or_loads(tmp_path_factory, data):
    files = sorted(p.name for p in TINY.iterdir() if p.suffix in (".json", ".jinja"))
    path = tmp_path_factory.mktemp("fuzzed") / "model"
    shutil.copytree(TINY, path)
    file = path / data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[at:]
    else:
        content[at] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content))
    with contextlib.suppress(FedVLMError):
        load_model(ModelConfig(name=str(path), device="cpu"))
    shutil.rmtree(path)
