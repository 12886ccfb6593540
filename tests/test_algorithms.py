"""One table of generic properties: a new algorithm is a new row."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from fedvlm.algorithms import TABLE, Client, build, check_share
from fedvlm.algorithms.sharing import sharing
from fedvlm.errors import ConfigError
from fedvlm.sections import AlgorithmConfig
from fedvlm.tree import Mean, digest, factor, module, split, step

NAMES = [
    f"base_model.model.{part}.layers.{i}.q_proj.lora_{f}.weight"
    for part in ("vision", "text")
    for i in range(2)
    for f in "AB"
]
SENDS = {"plora": "B", "lora": "AB", "fedsa": "A", "ffa": "B", "local": "", "lora+ft": "AB"}
KEEPS = {"plora": "A", "lora": "", "fedsa": "B", "ffa": "", "local": "AB", "lora+ft": ""}
TRAINS = {name: "B" if name == "ffa" else "AB" for name in SENDS}
CLIENT = Client("c", 3.0)


def tree(seed):
    g = torch.Generator().manual_seed(seed)
    shapes = {"A": (2, 5), "B": (4, 2)}
    return {n: torch.randn(shapes[factor(n)], generator=g) for n in NAMES}


def factors(names):
    return "".join(sorted({factor(n) for n in names}))


def test_every_row_of_the_table_is_covered_here():
    assert {*SENDS, "share"} == {*TABLE}


@pytest.mark.parametrize("name", SENDS)
def test_a_client_sends_and_keeps_what_the_table_says(name):
    algorithm = build(AlgorithmConfig(name=name))
    adapter = tree(0)
    state = algorithm.init(adapter)
    down = algorithm.download(state, CLIENT)
    start = algorithm.start(adapter, down, {})
    assert digest(start) == digest(adapter), "everyone begins at the common initial adapter"
    assert factors(n for n in NAMES if algorithm.phases[0].trains(n)) == TRAINS[name]
    upload, mine = algorithm.finish(down, tree(1))
    assert factors(upload) == SENDS[name]
    assert factors(mine) == KEEPS[name]
    assert not upload.keys() & mine.keys(), "what is personal never leaves"
    assert upload.keys() == state.keys() == down.keys()


@pytest.mark.parametrize("name", SENDS)
def test_one_client_alone_continues_where_it_stopped(name):
    """With a single client, the mean is its own upload, so sharing changes nothing."""
    algorithm = build(AlgorithmConfig(name=name))
    adapter = tree(0)
    state = algorithm.init(adapter)
    trained = [n for n in NAMES if algorithm.phases[0].trains(n)]
    end = {**adapter, **split(tree(1), lambda n: n in trained)[0]}
    upload, mine = algorithm.finish(algorithm.download(state, CLIENT), end)
    mean = Mean()
    if upload:
        mean.add(upload, CLIENT.weight)
    state = algorithm.update(state, mean.tree())
    again = algorithm.start(adapter, algorithm.download(state, CLIENT), mine)
    for key in end:
        assert torch.allclose(again[key], end[key], atol=1e-6)


@pytest.mark.parametrize("name", SENDS)
def test_its_functions_leave_their_arguments_alone(name):
    algorithm = build(AlgorithmConfig(name=name, server_lr=0.5))
    adapter, end = tree(0), tree(1)
    before = digest(adapter), digest(end)
    state = algorithm.init(adapter)
    upload, mine = algorithm.finish(state, end)
    algorithm.update(state, upload)
    algorithm.start(adapter, state, mine)
    assert (digest(adapter), digest(end)) == before


def test_an_algorithm_is_frozen():
    with pytest.raises(FrozenInstanceError):
        build(AlgorithmConfig()).phases = ()


def test_the_server_moves_by_its_learning_rate_towards_the_mean():
    algorithm = build(AlgorithmConfig(name="lora", server_lr=0.25))
    a, b = tree(0), tree(1)
    moved = algorithm.update(algorithm.init(a), b)
    for n in NAMES:
        assert torch.allclose(moved[n], 0.75 * a[n] + 0.25 * b[n])


def test_local_tuning_at_the_end_keeps_everything_and_sends_nothing():
    last = build(AlgorithmConfig(name="lora+ft", ft_steps=7)).final
    assert last.phases[0].steps == 7
    upload, mine = last.finish({}, tree(1))
    assert not upload
    assert digest(mine) == digest(tree(1))
    assert digest(last.start(tree(0), tree(2), mine)) == digest(mine), "the tuned factors win"


def test_a_share_map_takes_the_first_pattern_that_is_found():
    algorithm = sharing({"vision": "B", r"text\.layers\.1": "none", "text": "A"})
    upload, mine = algorithm.finish({}, tree(1))
    shared = {f"{module(n)}:{factor(n)}" for n in upload}
    assert shared == {
        "vision.layers.0.q_proj:B",
        "vision.layers.1.q_proj:B",
        "text.layers.0.q_proj:A",
    }
    assert upload.keys() | mine.keys() == set(NAMES)


def test_presets_are_share_maps():
    for name, factors_ in (("plora", "B"), ("lora", "AB"), ("fedsa", "A")):
        preset = build(AlgorithmConfig(name=name))
        own = build(AlgorithmConfig(name="share", share={".*": factors_}))
        assert preset.finish({}, tree(1))[0].keys() == own.finish({}, tree(1))[0].keys()


def test_a_share_pattern_without_a_module_is_refused():
    config = AlgorithmConfig(name="share", share={"vision": "B", "tower": "A"})
    with pytest.raises(ConfigError, match=r"'tower' matches none of the 4 adapted modules"):
        check_share(config, NAMES)


def test_the_mean_weighs_by_examples_and_refuses_other_tensors():
    mean = Mean()
    mean.add({"x": torch.tensor([1.0])}, 1)
    mean.add({"x": torch.tensor([4.0])}, 2)
    assert mean.tree()["x"].item() == pytest.approx(3.0)
    with pytest.raises(ValueError, match="differ"):
        mean.add({"y": torch.tensor([1.0])}, 1)
    with pytest.raises(ValueError, match="positive"):
        mean.add({"x": torch.tensor([1.0])}, 0)
    assert Mean().tree() == {}


def test_the_mean_does_not_change_what_it_is_given():
    first = {"x": torch.ones(2)}
    mean = Mean()
    mean.add(first, 1)
    mean.add({"x": torch.zeros(2)}, 1)
    assert first["x"].tolist() == [1.0, 1.0]


def test_a_full_step_is_exactly_the_end():
    a, b = tree(0), tree(1)
    assert digest(step(a, b, 1.0)) == digest(b)


def test_a_digest_sees_names_shapes_and_values():
    x = torch.arange(6.0)
    digests = {
        digest({"a": x}),
        digest({"b": x}),
        digest({"a": x.view(2, 3)}),
        digest({"a": x + 1e-6}),
        digest({"a": x.bfloat16()}),
    }
    assert len(digests) == 5


@pytest.mark.parametrize("name", ["base_model.x.weight", "lora_a", ""])
def test_a_name_that_is_no_factor_is_refused(name):
    with pytest.raises(ValueError, match="no LoRA factor"):
        factor(name)
