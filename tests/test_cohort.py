"""The cohort engine against the reference engine: the same adapters, losses and answers.

AdamW turns rounding noise into steps of the learning rate where an element has almost no gradient.
Three more padding tokens move the reference engine itself by 7e-5 at a rate of 3e-3, and by 2e-3 at
1e-2; the element depends on the processor. So AdamW is compared in double precision, where the
engines agree to 1e-13. In single precision, plain SGD agrees to 1e-6.
"""

from __future__ import annotations

import json
import weakref

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

import families
import fedvlm
from fedvlm.algorithms.table import TABLE
from fedvlm.engines.choice import engine_class
from fedvlm.engines.cohort import CohortEngine, uniform
from fedvlm.engines.memory import kept_for_backward
from fedvlm.engines.reference import ReferenceEngine
from fedvlm.models.blocks import Ragged
from fedvlm.models.load import freeze_statistics
from fedvlm.rounds.prepare import prepare
from fedvlm.settings.sections import EngineConfig
from fedvlm.store import files
from fedvlm.tree import products
from pair import EXACT, TOLERANCE, Kept, assert_same, engines, play, prepared, switched

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def small(small):
    """Settings with little scoring, because this module makes many runs."""
    small["eval"] |= {"every": 0, "max_rows": 2, "max_new_tokens": 3}
    return small


def both(tmp_path, settings, *overrides, tolerance=TOLERANCE, factors=True):
    """Asserts that both engines send, keep, lose and answer the same in the same rounds."""
    played = [play(*side) for side in engines(settings, *overrides, folder=tmp_path)]
    assert_same(*played, tolerance, factors=factors)


OF_TRAINING = {
    "plain": [],
    "rounds of local epochs": [
        "train.local_steps=null",
        "train.local_epochs=1",
        "train.batch_size=5",
    ],
    "separate rates and decay": [
        "train.lr_a=0.002",
        "train.lr_b=0.0005",
        "train.weight_decay=0.1",
        "train.schedule=cosine",
        "train.warmup_rounds=1",
    ],
    "hard clipping": ["train.max_grad_norm=0.05"],
    "no clipping": ["train.max_grad_norm=null"],
    "sampled cohort": ["train.clients_per_round=2"],
    "sorted by length": ["train.sort_by_length=true"],
    "micro-batches": ["train.batch_size=5", "engine.micro_batch=2"],
}
OF_PREPARATION = {
    "dropout": ["lora.dropout=0.2"],
    "preferences": ["objective.name=dpo"],
    "ipo": ["objective.name=dpo", "objective.loss=ipo"],
    "passes of two": ["engine.clients=2"],
    "rslora on language": ["lora.rslora=true", "lora.target=language"],
    "checkpointing": ["model.gradient_checkpointing=true"],
    "checkpointing of preferences": [
        "model.gradient_checkpointing=true",
        "objective.name=dpo",
    ],
    "micro-batches of preferences": ["objective.name=dpo", "engine.micro_batch=3"],
    "micro-batches with dropout": ["lora.dropout=0.2", "engine.micro_batch=3"],
}
UNEQUAL = {"style": "quantity", "sites": 4, "rows": 14}
"""Scenes of sites with different numbers of rows."""


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Both engines for sites with different numbers of rows, prepared once."""
    return prepared(tmp_path_factory.mktemp("unequal"), **UNEQUAL)


@pytest.mark.parametrize("name", OF_TRAINING)
def test_every_setting_of_training_trains_the_same_adapters(unequal, name):
    settings, sides, folder = unequal
    rule = EXACT, "algorithm.name=plora", "train.average=none", *OF_TRAINING[name]
    played = [play(*switched(*side, settings, *rule, folder=folder)) for side in sides]
    assert_same(*played, TOLERANCE)


@pytest.mark.parametrize("name", OF_PREPARATION)
def test_every_setting_of_preparation_trains_the_same_adapters(small, tmp_path, name):
    small["data"]["scenes"] |= UNEQUAL
    small["train"] |= {"lr": 0.001}
    both(tmp_path, small, EXACT, *OF_PREPARATION[name])


@pytest.mark.parametrize("name", ["plain", "rounds of local epochs", "preferences"])
def test_engines_agree_to_rounding_with_plain_sgd(small, tmp_path, name):
    small["data"]["scenes"] |= UNEQUAL
    small["train"] |= {"optimizer": "sgd", "lr": 0.1}
    rule = (OF_TRAINING | OF_PREPARATION)[name]
    both(tmp_path, small, *rule, tolerance=1e-6)


SHARED_RULES = {
    "unequal ranks": ["algorithm.name=plora", "lora.ranks={site-0: 1}"],
    "a server's optimizer": ["algorithm.name=lora", "algorithm.server.name=adam"],
    "a proximal term": ["algorithm.name=plora", "algorithm.prox_mu=0.5"],
    "parts and layers": [
        "algorithm.name=share",
        "algorithm.share={'part:vision': B, 'layer:1-2': AB}",
    ],
    "scaffold by sgd": ["algorithm.name=scaffold", "train.optimizer=sgd", "train.lr=0.1"],
}
OF_THEIR_OWN = [name for name, entry in TABLE.items() if entry.pools or entry.spare]
ALGORITHMS = [name for name in TABLE if name not in ("share", "scaffold", *OF_THEIR_OWN)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Both engines, prepared once."""
    return prepared(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, *SHARED_RULES])
def test_every_algorithm_trains_the_same_adapters(pair, algorithm):
    settings, sides, folder = pair
    tree = settings | {"algorithm": {"name": algorithm}} if algorithm in TABLE else settings
    rule = SHARED_RULES.get(algorithm, ())
    played = [play(*switched(*side, tree, EXACT, *rule, folder=folder)) for side in sides]
    assert_same(*played, TOLERANCE, factors=algorithm != "flexlora")


@pytest.mark.parametrize("algorithm", OF_THEIR_OWN)
def test_algorithms_with_other_rows_or_ranks_train_the_same_adapters(small, tmp_path, algorithm):
    small["train"] |= {"lr": 0.001}
    spare = TABLE[algorithm].spare
    both(tmp_path, small, EXACT, f"algorithm.name={algorithm}", factors=not spare)


WHOLE = {
    "plora": ["algorithm.name=plora"],
    "auto of few": [
        "algorithm.name=auto",
        "train.clients_per_round=1",
        "train.finish_steps=3",
        "train.average=mean",
    ],
    "auto of all": ["algorithm.name=auto", "train.average=mean"],
    "preferences": ["algorithm.name=lora", "train.finish_steps=2", "objective.name=dpo"],
    "spare ranks": ["algorithm.name=fedex"],
    "eight bits": ["algorithm.name=ditto", "wire.compress=int8"],
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_runs_end_with_the_same_files(small, tmp_path, name):
    small["train"] |= {"lr": 0.001}
    runs = [
        fedvlm.run(small, EXACT, f"output={tmp_path / name_}", f"engine.name={name_}", *WHOLE[name])
        for name_ in ("reference", "cohort")
    ]
    theirs, ours = map(adapters, runs)
    moved = [t for tree in theirs.values() for n, t in tree.items() if "lora_B" in n]
    assert any(t.abs().max() > 1e-3 for t in moved)
    if name == "spare ranks":  # the factors of a matrix are not unique
        ours, theirs = ({c: products(t) for c, t in trees.items()} for trees in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for client, tree in theirs.items():
        for key, tensor in tree.items():
            assert (ours[client][key] - tensor).abs().max() <= TOLERANCE
    for line, other in zip(lines(runs[1]), lines(runs[0]), strict=True):
        assert line.get("train_loss", {}) == pytest.approx(other.get("train_loss", {}), abs=1e-4)
    for model in ("untuned", "global", "personal"):
        for answer, other in zip(runs[1].answers(model), runs[0].answers(model), strict=True):
            assert answer["prediction"] == other["prediction"]
            assert answer["loss"] == pytest.approx(other["loss"], abs=1e-3)


def adapters(results):
    paths = sorted((results.folder / "adapters").glob("*/adapter_model.safetensors"))
    return {path.parent.name: files.load_tree(path) for path in paths}


def lines(results):
    return files.read_lines(results.folder / "metrics.jsonl")


def test_adapters_beside_one_another_have_the_scores_they_have_alone(small, tmp_path):
    small |= {"engine": {"clients": 4}, "eval": {"batch_size": 5}, "model": {"device": "cpu"}}
    engine, partition, _ = prepare(fedvlm.load_config(small))
    rows = partition.splits["site-0"].train
    trees = [{n: t + k * torch.randn(t.shape) for n, t in engine.adapter.items()} for k in range(3)]
    with torch.no_grad():
        found = engine._validate(trees, rows)
        alone = [engine._validate([tree], rows)[0] for tree in trees]
    assert np.allclose(found, alone, rtol=1e-5)
    assert len({one.loss for one in found}) == 3
    assert all(0 < one.doubt <= 1 for one in found)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_trains_the_same_adapters(small, tmp_path, family):
    small["model"] = {"name": families.folder(family), "device": "cpu"}
    small["data"]["scenes"] |= {"rows": 10}
    small["train"] |= {"rounds": 1, "batch_size": 2, "optimizer": "sgd", "lr": 0.5}
    both(tmp_path, small, EXACT, tolerance=1e-9)


def test_clients_do_not_touch_each_other(small, tmp_path):
    """A client's adapter does not depend on the other clients of the pass."""
    small["algorithm"] = {"name": "local"}
    kept = []
    for width in (3, 1):
        words = (EXACT, f"engine.clients={width}", f"output={tmp_path / str(width)}")
        engine, partition, _ = prepare(fedvlm.load_config(small, *words), store=Kept(tmp_path))
        kept.append(play(engine, partition).kept)
    for client, tree in kept[0].items():
        other = kept[1][client]
        assert all(torch.allclose(t, other[n], atol=TOLERANCE) for n, t in tree.items())


SGD = {"rounds": 1, "local_steps": 2, "batch_size": 2, "optimizer": "sgd", "lr": 0.1}


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    """Rows whose pictures are of different shapes, so that models tile them differently."""
    folder = tmp_path_factory.mktemp("sized")
    random, lines = np.random.default_rng(0), []
    for number in range(18):
        width, height = [(64, 64), (40, 120), (150, 50)][number % 3]
        pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        row = {"file_name": f"{number}.png", "question": f"What is in {number}?", "chosen": "noise"}
        lines.append(json.dumps(row | {"site": f"site-{number // 6}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_next", "internvl", "idefics3"])
def test_pictures_of_different_sizes_train_the_same_adapters(small, tmp_path, sized, family):
    small |= {
        "model": {"name": families.folder(family), "device": "cpu"},
        "data": {"path": str(sized)},
        "partition": {"kind": "column", "column": "site", "min_rows": 4},
        "train": SGD,
    }
    both(tmp_path, small, tolerance=1e-5)


def test_a_layer_that_packs_is_never_cut_at_the_wrong_place(small, tmp_path, sized):
    small |= {
        "model": {"name": families.folder("qwen2_vl"), "device": "cpu"},
        "data": {"path": str(sized)},
        "partition": {"kind": "column", "column": "site", "min_rows": 4},
    }
    engine, _, _ = prepare(fedvlm.load_config(small, f"output={tmp_path / 'other'}"))
    rows = [0, 1, 2]
    assert not uniform([engine.collator.features(i) for i in rows])
    engine.stack.load([engine.adapter] * 3, engine.device)
    engine.stack.activate([0, 1, 2])
    with pytest.raises(Ragged, match="rows that differ in size"):
        engine._terms(np.array(rows))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_kept_image_features_change_nothing(small, tmp_path, family):
    small["model"] = {"name": families.folder(family), "device": "cpu"}
    small["data"]["scenes"] |= {"rows": 10}
    small["lora"] |= {"target": "language"}
    small["train"] = SGD
    engine, partition, _ = prepare(fedvlm.load_config(small), store=Kept(tmp_path))
    assert (engine._images is None) == (family == "git"), "GIT has no image features of its own"
    with_them = play(engine, partition)
    engine._images, engine.store = None, Kept(tmp_path)
    assert_same(play(engine, partition), with_them, 1e-5)


def test_a_budget_of_memory_decides_how_many_clients_share_a_pass(small, tmp_path):
    small["model"] = {"device": "cpu"}

    def width(*overrides):
        config = fedvlm.load_config(small, f"output={tmp_path / 'run'}", *overrides)
        return prepare(config)[0].width

    assert width() == 16
    assert width("engine.memory=1") == 1
    few, fewer = (width("engine.memory=120", f"train.batch_size={n}") for n in (2, 8))
    assert 16 > few > fewer > 1
    assert width("engine.memory=120", "train.batch_size=8", "engine.micro_batch=2") == few
    assert width("engine.memory=120", "engine.clients=5") == 5


def test_what_is_kept_for_the_backward_pass_is_counted_once():
    layer = torch.nn.Linear(8, 4)
    x = torch.ones(10, 8)
    results = []

    def forward():
        results.append(layer(x).exp())
        return results[0] * 2

    assert kept_for_backward(layer, forward) == (10 * 8 + 10 * 4) * 4
    freed = weakref.ref(results.pop())
    assert freed() is None, "the measured graph is freed"


def test_layers_of_experts_are_left_to_the_reference_engine(caplog):
    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = torch.nn.Linear(8, 2)
            self.experts = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2)])

    def engine(name, *layers):
        model = get_peft_model(Routed(), LoraConfig(r=2, target_modules=list(layers)))
        return engine_class(EngineConfig(name=name), model)

    assert engine("cohort", "gate") is CohortEngine
    assert not caplog.messages
    assert engine("cohort", "gate", "experts.0", "experts.1") is ReferenceEngine
    assert "2 layers of a mixture of experts, such as experts.0" in caplog.text
    assert engine("reference", "gate") is ReferenceEngine


def test_batch_norms_keep_their_statistics_and_rows_apart():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    freeze_statistics(model)
    before = model[1].running_mean.clone()
    model.train()
    rows = torch.randn(5, 3, 8, 8)
    beside, alone = model(rows)[:1], model(rows[:1])
    assert model.training
    assert not model[1].training
    assert torch.equal(model[1].running_mean, before)
    assert torch.allclose(beside, alone, atol=1e-6)
