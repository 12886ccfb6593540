"""One table of generic properties: a new algorithm is a new row."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from fedvlm.algorithms.sharing import sharing
from fedvlm.algorithms.table import (
    NOBODY,
    TABLE,
    Client,
    Upload,
    Work,
    build,
    check_share,
    spare_ranks,
)
from fedvlm.errors import ConfigError
from fedvlm.settings.sections import AlgorithmConfig, LoraConfig
from fedvlm.tree import Mean, digest, factor, module, pad, plain, products, rank, step

NAMES = [
    f"base_model.model.{part}.layers.{i}.q_proj.lora_{f}.weight"
    for part in ("vision_tower", "text")
    for i in range(2)
    for f in "AB"
]
SENDS = {
    "auto": "AB",
    "plora": "B",
    "lora": "AB",
    "fedsa": "A",
    "ffa": "B",
    "fedalora": "B",
    "rolora": "B",
    "iat": "AB",
    "local": "",
    "lora+ft": "AB",
    "lora+es": "AB",
    "fedprox": "AB",
    "scaffold": "AB",
    "mix": "AB",
    "ditto": "AB",
    "apfl": "AB",
    "fedex": "AB",
    "flora": "AB",
    "flexlora": "AB",
    "hetlora": "AB",
    "pair": "AB",
    "feddpa": "AB",
    "fedalt": "AB",
    "similar": "AB",
    "clustered": "AB",
    "centralized": "AB",
    "centralized+name": "AB",
}
KEEPS = dict.fromkeys(SENDS, "") | {
    "plora": "A",
    "fedalora": "A",
    "fedsa": "B",
    **dict.fromkeys(("auto", "iat", "local", "scaffold", "mix", "ditto", "apfl"), "AB"),
    **dict.fromkeys(("pair", "feddpa", "fedalt"), "AB"),
}
TRAINS = {name: "B" if name in ("ffa", "rolora") else "AB" for name in SENDS}
SENDS_WHAT_IT_KEEPS = {"auto", "mix", "fedalt", "scaffold"}  # a copy, or the change of it
SENDS_AND_KEEPS_TWO_MODELS = {"ditto", "apfl", "pair", "feddpa"}
CLIENT = Client("c", 3.0)
LORA = LoraConfig(rank=2)


def algorithm_of(name, **settings):
    return build(AlgorithmConfig(name=name, **settings), LORA)


def tree(seed, ranks=2):
    g = torch.Generator().manual_seed(seed)
    shapes = {"A": (ranks, 5), "B": (4, ranks)}
    return {n: torch.randn(shapes[factor(n)], generator=g) for n in NAMES}


def adapter_for(name, seed=0):
    """An initial adapter of the shape that an algorithm asks for."""
    begun = {n: t if factor(n) == "A" else torch.zeros_like(t) for n, t in tree(seed).items()}
    return pad(begun, 0, spare_ranks(name, LORA))


def trained(algorithm, start, seed=1):
    """An adapter after training: random where the last phase trains, else as it was."""
    phase, end, ranks = algorithm.phases[-1], dict(start), rank(start)
    for n, t in tree(seed, ranks).items():
        if phase.trains(n):
            where = phase.mask(n, t) if phase.mask else torch.ones(1, dtype=torch.bool)
            end[n] = torch.where(where, t, start[n])
    return end


def work(algorithm, down, end, mine=None):
    """A round whose phases all ended with the same adapter."""
    n, start = len(algorithm.phases), algorithm.start(end, down, mine or {})
    return Work(down, mine or {}, (end,) * n, ({"A": 1.0, "B": 1.0},) * n, start)


def aggregated(algorithm, state, upload, client=CLIENT):
    """The server's state after a round with one client."""
    if algorithm.gather and upload:
        return algorithm.gather(state, [Upload(client, upload)])
    mean = Mean()
    if upload:
        mean.add(algorithm.lift(upload, client), client.weight)
    return algorithm.update(state, mean.tree()) if upload else state


def factors(names):
    return "".join(sorted({factor(n) for n in names}))


def test_every_row_of_the_table_is_covered_here():
    assert {*SENDS, "share"} == {*TABLE}


@pytest.mark.parametrize("name", SENDS)
def test_a_client_sends_and_keeps_what_the_table_says(name):
    algorithm, adapter = algorithm_of(name), adapter_for(name)
    state = algorithm.init(adapter)
    down = algorithm.download(state, CLIENT)
    start = algorithm.start(adapter, down, {})
    assert digest(start) == digest(adapter), "everyone begins at the common initial adapter"
    assert factors(n for n in NAMES if algorithm.phases[0].trains(n)) == TRAINS[name]
    upload, mine = algorithm.finish(work(algorithm, down, trained(algorithm, start)))
    assert factors(upload) == SENDS[name]
    assert factors(mine) == KEEPS[name]
    if name not in SENDS_WHAT_IT_KEEPS | SENDS_AND_KEEPS_TWO_MODELS:
        assert not upload.keys() & mine.keys(), "what is personal never leaves"
    told = {"cohort/few"} if name == "auto" else set()  # whether less than half take part
    assert plain(upload).keys() <= down.keys() <= state.keys() | told


@pytest.mark.parametrize("name", [n for n in SENDS if n != "apfl"])  # its two models differ
def test_one_client_alone_continues_where_it_stopped(name):
    """With a single client, the mean is its own upload, so sharing changes nothing."""
    algorithm, adapter = algorithm_of(name), adapter_for(name)
    state = algorithm.init(adapter)
    down = algorithm.download(state, CLIENT)
    end = trained(algorithm, algorithm.start(adapter, down, {}))
    upload, mine = algorithm.finish(work(algorithm, down, end))
    state = aggregated(algorithm, state, upload)
    again = algorithm.start(adapter, algorithm.download(state, CLIENT), mine)
    found, expected = (products(again), products(end)) if name in PRODUCTS else (again, end)
    for key in expected:
        assert torch.allclose(found[key], expected[key], atol=1e-5)


PRODUCTS = ("fedex", "flora", "flexlora")  # these put the same product into other factors


@pytest.mark.parametrize("name", SENDS)
def test_its_functions_leave_their_arguments_alone(name):
    algorithm = algorithm_of(name, server_lr=0.5)
    adapter = adapter_for(name)
    state = algorithm.init(adapter)
    down = algorithm.download(state, CLIENT)
    end = trained(algorithm, algorithm.start(adapter, down, {}))
    before = [digest(t) for t in (adapter, state, down, end)]
    upload, mine = algorithm.finish(work(algorithm, down, end))
    sent, kept = digest(upload), digest(mine)
    new = aggregated(algorithm, state, upload)
    algorithm.start(adapter, algorithm.download(new, CLIENT), mine)
    algorithm.finish(work(algorithm, down, end, mine))
    assert [digest(t) for t in (adapter, state, down, end)] == before
    assert (digest(upload), digest(mine)) == (sent, kept)


@pytest.mark.parametrize("name", SENDS)
def test_nobody_in_particular_gets_the_global_model(name):
    algorithm, adapter = algorithm_of(name), adapter_for(name)
    state = algorithm.init(adapter)
    upload, _ = algorithm.finish(work(algorithm, algorithm.download(state, CLIENT), adapter))
    for now in (state, aggregated(algorithm, state, upload)):
        assert algorithm.start(adapter, algorithm.download(now, NOBODY), {}).keys() == set(NAMES)


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
    upload, mine = last.finish(work(last, {}, tree(1)))
    assert not upload
    assert digest(mine) == digest(tree(1))
    assert digest(last.start(tree(0), tree(2), mine)) == digest(mine), "the tuned factors win"


def test_a_share_map_takes_the_first_pattern_that_is_found():
    algorithm = sharing({"vision": "B", r"text\.layers\.1": "none", "text": "A"})
    upload, mine = algorithm.finish(work(algorithm, {}, tree(1)))
    shared = {f"{module(n)}:{factor(n)}" for n in upload}
    assert shared == {
        "vision_tower.layers.0.q_proj:B",
        "vision_tower.layers.1.q_proj:B",
        "text.layers.0.q_proj:A",
    }
    assert upload.keys() | mine.keys() == set(NAMES)


def test_presets_are_share_maps():
    for name, factors_ in (("plora", "B"), ("lora", "AB"), ("fedsa", "A")):
        preset = build(AlgorithmConfig(name=name))
        own = build(AlgorithmConfig(name="share", share={".*": factors_}))
        sent, own_sent = (x.finish(work(x, {}, tree(1)))[0] for x in (preset, own))
        assert sent.keys() == own_sent.keys()


def test_a_share_pattern_without_a_module_is_refused():
    config = AlgorithmConfig(name="share", share={"vision": "B", "turret": "A"})
    with pytest.raises(ConfigError, match=r"'turret' matches none of the 4 adapted modules"):
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
