"""A base model with layers in a store of weights, by the hooks of accelerate, has the same results.

accelerate cannot spread a model over two CPUs. Layers on disk take the same path: hooks bring their
weights and inputs to the device that computes, and the layer's own weight is nowhere.
"""

import logging

import pytest
import torch

import fedvlm
import smallest
from fedvlm.deploy.policy import Policy
from fedvlm.engines import memory
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.models import spread
from fedvlm.models.load import load_model
from fedvlm.settings.sections import ModelConfig
from fedvlm.store import files
from test_sharded import assert_close, assert_told_the_same, tensors_of

PLACES = {
    **dict.fromkeys(("model.vision_model.embeddings", "model.vision_model.post_layernorm"), "cpu"),
    "model.vision_model.encoder.layers.0": "cpu",
    "model.vision_model.encoder.layers.1": "disk",
    "model.vision_model.encoder.layers.2": "disk",
    "model.connector": "disk",
    **dict.fromkeys(("model.text_model.embed_tokens", "model.text_model.norm"), "cpu"),
    "model.text_model.rotary_emb": "cpu",
    "model.text_model.layers.0": "disk",
    "model.text_model.layers.1": "cpu",
    "lm_head": "disk",
}
SETTINGS = {
    "model": {"name": smallest.model(), "dtype": "float64"},
    "data": {"scenes": {"sites": 3, "rows": 16}},
    "partition": {"min_rows": 4},
    "algorithm": {"name": "plora"},
    "train": {"rounds": 1, "local_steps": 2, "batch_size": 4, "optimizer": "sgd", "lr": 0.1},
    "eval": {"every": 0, "max_rows": 2, "max_new_tokens": 3},
    "lora": {"rank": 2},
}


@pytest.fixture(scope="module", params=["cohort", "reference"])
def runs(request, tmp_path_factory):
    """A run whose model is in memory, and one that has most layers on disk."""
    to, name = tmp_path_factory.mktemp("spread"), f"engine.name={request.param}"
    spread = {**SETTINGS, "model": {**SETTINGS["model"], "device_map": PLACES}}
    whole = fedvlm.run(SETTINGS, name, f"output={to / 'whole'}")
    return whole.folder, fedvlm.run(spread, name, f"output={to / 'spread'}").folder


def test_layers_on_disk_train_and_answer_the_same(runs):
    whole, spread = runs
    assert_close(tensors_of(spread), tensors_of(whole), 1e-12)
    assert_told_the_same(spread, whole)


def test_a_merged_export_of_a_spread_run_is_whole_and_the_same(runs, tmp_path):
    folders = [
        fedvlm.export(run, client="site-1", merge=True, to=tmp_path / run.name) for run in runs
    ]
    whole, spread = (files.load_tree(folder / "model.safetensors") for folder in folders)
    assert_close(spread, whole, 1e-12)


def test_stored_weights_are_not_in_memory_and_a_warning_gives_their_size(caplog):
    with caplog.at_level(logging.WARNING, "fedvlm"):
        model = load_model(ModelConfig(name=smallest.model(), device_map=PLACES)).model
    whole = load_model(ModelConfig(name=smallest.model())).model
    total = sum(spread.held(whole).values())
    assert sum(spread.held(model).values()) < 0.6 * total
    size = (total - sum(spread.held(model).values())) / 1e6
    assert f"{size:.1f} MB of weights lie in memory or on disk" in caplog.text
    assert "model.gradient_checkpointing=true" in caplog.text


def test_auto_is_the_cpu_where_there_is_no_gpu(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, "fedvlm"):
        loaded = load_model(ModelConfig(name=smallest.model(), device_map="auto"))
    assert loaded.device.type == "cpu"
    assert "there is no GPU here" in caplog.text


def test_one_process_holds_the_whole_base_and_a_warning_tells_so(caplog):
    with caplog.at_level(logging.WARNING, "fedvlm"):
        shared = load_model(ModelConfig(name=smallest.model(), shard=True)).model
    whole = load_model(ModelConfig(name=smallest.model())).model
    assert spread.held(shared) == spread.held(whole)
    assert "model.shard: there is one process" in caplog.text


def test_auto_leaves_room_on_every_gpu(monkeypatch):
    class Card:
        total_memory = 10 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    most = spread.placement(ModelConfig(device_map="auto"))["max_memory"]
    assert most[0] == most[1] == 6 * 2**30
    assert most["cpu"] > 0
    most = spread.placement(ModelConfig(device_map="auto", device_memory=512))["max_memory"]
    assert most[0] == most[1] == 512 * 2**20
    # A run takes 8 GiB of each GPU. The fuller one decides for both.
    weights = {torch.device("cuda", 0): 6 * 2**30, torch.device("cuda", 1): 2**30}
    assert memory.room("auto", weights) == pytest.approx(2 * 2 * 2**30)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.device_map=both"], r"device_map is none, auto, or a mapping .* \(got 'both'\)"),
        (["model.device_map={lm_head: gpu}"], "puts 'lm_head' on 'gpu'; a place is the number"),
        (["model.device_map=auto", "model.device=cpu"], "leave out device=cpu"),
        (["model.device_map=auto", "model.quantization=4bit"], "quantization=4bit is not tested"),
        (["model.device_map=auto", "model.shard=true"], "shard is for several processes"),
        (["model.shard=true", "model.quantization=8bit"], "quantization=8bit is not tested"),
        (["model.device_memory=9"], "device_memory=9 has a meaning for device_map=auto only"),
    ],
)
def test_places_that_contradict_other_settings_are_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        fedvlm.load_config(None, *words)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (
            {"model": "cpu", "head": "cpu"},
            "'head' is no module of .*; its parts are model, lm_head",
        ),
        ({"model": "cpu"}, "1 weights have no place, such as 'lm_head.weight'"),
        ({"": 7}, "there is no GPU 7 here, but 0 GPUs"),
    ],
)
def test_places_that_the_model_or_the_machine_lacks_are_refused(places, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FedVLMError, match=said):
        load_model(ModelConfig(name=smallest.model(), device_map=places))


def test_a_site_places_its_model_itself(tmp_path):
    config = fedvlm.load_config(None, "model.device_map=auto", "model.device_memory=9")
    for own in ("none", "auto"):
        policy = Policy(set={"model.device_map": own})
        assert policy.localized(config, "rows", tmp_path).model == ModelConfig(device_map=own)


def test_a_spread_model_is_for_one_process(monkeypatch, tmp_path):
    started = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"device_map=auto spreads .* but 2 were started"):
        fedvlm.run(None, "model.device_map=auto", f"output={tmp_path / 'run'}")
