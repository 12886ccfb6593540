"""A model with its processor that a program hands over is the frozen base of a run."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import fedvlm
import smallest
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.models import handed
from fedvlm.store.files import read_lines
from stopping import Stop
from test_more import same, trees


@pytest.fixture(scope="module")
def loaded():
    folder = smallest.model()
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def changed(loaded):
    """The model with other weights, as after an own pretraining."""
    model = handed.shared(loaded[0])
    for name, weight in model.named_parameters():
        if "q_proj" in name:
            weight.data = weight.data * 1.5
    return model.train().requires_grad_(True), loaded[1]


def settings(small, folder):
    few = small | {"output": str(folder), "model": {}}
    few["train"] = small["train"] | {"rounds": 1, "local_steps": 1}
    return few


def looks(model):
    """Everything about a model that a run might change."""
    weights = {n: (w.data_ptr(), w.requires_grad, w.clone()) for n, w in model.named_parameters()}
    layers = {n: (type(m), m.training) for n, m in model.named_modules()}
    return weights, layers, json.dumps(model.config.to_dict(), default=str)


def test_a_run_trains_on_the_model_and_leaves_it_as_it_was(small, tmp_path, changed, loaded):
    model, processor = changed
    before, template = looks(model), processor.chat_template
    few = settings(small, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        fedvlm.run(few, model=changed, progress=Stop(1))
    with pytest.raises(FedVLMError, match=r"hand it over again: fedvlm\.resume"):
        fedvlm.resume(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"the run began with 'handed:\w+', and the model"):
        fedvlm.resume(tmp_path / "run", model=loaded)
    run = fedvlm.resume(tmp_path / "run", model=changed)

    after = looks(model)
    assert after[1:] == before[1:]
    for name, (place, grad, weight) in before[0].items():
        assert after[0][name][:2] == (place, grad)
        assert torch.equal(after[0][name][2], weight), name
    assert processor.chat_template == template

    # It is the run of the folder that holds this model.
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    few["model"] = {"name": str(tmp_path / "model")}
    other = fedvlm.run(few | {"output": str(tmp_path / "other")})
    same(trees(run.folder), trees(other.folder))
    assert run.table == other.table
    losses = [read_lines(r.folder / "metrics.jsonl")[1]["train_loss"] for r in (run, other)]
    assert losses[0] == losses[1]

    # Later commands need the model's folder.
    for command in (fedvlm.export, lambda run: fedvlm.open_run(run).base):
        with pytest.raises(FedVLMError, match=r"was handed over .* add --set model\.name=FOLDER"):
            command(run.folder)
    place = f"model.name={tmp_path / 'model'}"
    assert fedvlm.open_run(run.folder, place).base.name == str(tmp_path / "model")


def test_a_model_that_was_loaded_and_not_changed_keeps_its_name(small, loaded, changed):
    assert handed.named(loaded) == {"name": smallest.model(), "dtype": "float32"}
    other = AutoProcessor.from_pretrained(smallest.model())
    other.tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    names = {handed.named(pair)["name"] for pair in ((loaded[0], other), changed)}
    assert len(names) == 2
    assert all(name.startswith("handed:") for name in names)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda pair: pair[0], r"it is a pair \(model, processor\)"),
        (lambda pair: (torch.nn.Linear(2, 2), pair[1]), "must be a model of transformers"),
        (lambda pair: (pair[0].model.text_model, pair[1]), "does not write texts about images"),
        (lambda pair: (pair[0], pair[1].tokenizer), "has no tokenizer"),
        (lambda pair: (handed.shared(pair[0]).half().float().to("meta"), pair[1]), "not in memory"),
    ],
)
def test_other_objects_are_refused(loaded, wrong, said):
    with pytest.raises(FedVLMError, match=said):
        handed.checked(wrong(loaded))


def test_a_model_is_given_once(small, loaded):
    with pytest.raises(ConfigError, match="leave one of them out"):
        fedvlm.run(small, model=loaded)
    with pytest.raises(ConfigError, match="leave this setting out"):
        fedvlm.run(small | {"model": {"quantization": "4bit"}}, model=loaded)
