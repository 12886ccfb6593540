"""Generic properties of all algorithms; a new algorithm is a new row of the table."""

import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fedvlm
from fedvlm.algorithms.base import (
    NOBODY,
    Averaged,
    Local,
    Score,
    Sent,
    Trained,
    Upload,
    Visit,
    step,
)
from fedvlm.algorithms.sharing import sharing
from fedvlm.algorithms.table import ALIASES, TABLE, build, check_fit, find, names, spare_ranks
from fedvlm.config import load
from fedvlm.errors import ConfigError
from fedvlm.settings.method import LoraConfig
from fedvlm.tree import Mean, digest, factor, module, pad, plain, products, rank
from fedvlm.tree import step as moved_to

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
    "fedprox": "AB",
    "scaffold": "AB",
    "mix": "AB",
    "ditto": "AB",
    "apfl": "AB",
    "fedex": "AB",
    "flora": "AB",
    "flexlora": "AB",
    "hetlora": "AB",
    "lorafair": "AB",
    "fedrot": "AB",
    "pair": "AB",
    "feddpa": "AB",
    "fedalt": "AB",
    "fedmosaic": "AB",
    "similar": "AB",
    "clustered": "AB",
    "fedlease": "AB",
    "fedtree": "AB",
    "centralized": "AB",
    "centralized+name": "AB",
}
KEEPS = dict.fromkeys(SENDS, "") | {
    "plora": "A",
    "fedalora": "A",
    "fedsa": "B",
    "auto": "B",
    **dict.fromkeys(("iat", "local", "scaffold", "mix", "ditto", "apfl"), "AB"),
    **dict.fromkeys(("pair", "feddpa", "fedalt", "fedmosaic"), "AB"),
}
TRAINS = {name: "B" if name in ("ffa", "rolora") else "AB" for name in SENDS}
# The same tensors, or their change.
SENDS_WHAT_IT_KEEPS = {"auto", "mix", "fedalt", "fedmosaic", "scaffold"}
SENDS_AND_KEEPS_TWO_MODELS = {"ditto", "apfl", "pair", "feddpa"}
VISIT = Visit("c", 3.0, round=1)
LAST = Visit("c", 3.0, round=9, final=True)
LORA = LoraConfig(rank=2)


def algorithm_of(name, **settings):
    kind = TABLE[name].settings
    known = {k: v for k, v in settings.items() if k in kind.model_fields}
    return build(kind(name=name, **known), LORA)


def tree(seed, ranks=2):
    g = torch.Generator().manual_seed(seed)
    shapes = {"A": (ranks, 5), "B": (4, ranks)}
    return {n: torch.randn(shapes[factor(n)], generator=g) for n in NAMES}


def adapter_for(name, seed=0):
    """An initial adapter of the shape that an algorithm asks for."""
    begun = {n: t if factor(n) == "A" else torch.zeros_like(t) for n, t in tree(seed).items()}
    return pad(begun, 0, spare_ranks(name, LORA))


def trained(ask, seed=1):
    """An adapter after a stretch of training: random factors where trained, else unchanged."""
    random, end = tree(seed, rank(ask.begin)), {}
    for name, t in ask.begin.items():
        end[name] = random[name] if ask.trains(name) else t
        if ask.mask and ask.trains(name):
            end[name] = torch.where(ask.mask(name, t), end[name], t)
    return end


def worked(algorithm, adapter, down, mine=None, visit=VISIT, end=None):
    """Runs a client's round; each stretch of training ends with the same adapter.

    Returns:
        The upload, the requests for training, and the adapter after the last stretch.
    """
    begin = algorithm.model(adapter, down, mine or {})
    program = algorithm.work(Local(visit, begin, down, mine or {}, 5))
    ask, stretches, last = step(program), [], begin
    while not isinstance(ask, Sent):
        if isinstance(ask, Score):
            ask = step(program, ())
        else:
            stretches.append(ask)
            last = trained(ask) if end is None else end
            ask = step(program, Trained(last, {"A": 1.0, "B": 1.0}))
    return SimpleNamespace(up=ask.up, keep=ask.keep, stretches=stretches, end=last)


def aggregated(algorithm, state, upload, visit=VISIT):
    """The server's state after a round with one client."""
    server = algorithm.server
    if not upload:
        return state
    if isinstance(server, Averaged):
        mean = Mean()
        mean.add(*server.lift(upload, visit))
        return {**state, **server.update(state, mean.tree(), visit.round)}
    return {**state, **server.update(state, [Upload(visit, upload)], visit.round)}


def factors(names):
    return "".join(sorted({factor(n) for n in names}))


def test_every_row_of_the_table_is_covered_here():
    assert {*SENDS, "share"} == {*TABLE}


@pytest.mark.parametrize("name", SENDS)
def test_a_client_sends_and_keeps_what_the_table_says(name):
    algorithm, adapter = algorithm_of(name), adapter_for(name)
    state = algorithm.init(adapter)
    down = algorithm.send(state, VISIT)
    begin = algorithm.model(adapter, down, {})
    assert digest(begin) == digest(adapter), "every client begins at the common initial adapter"
    round_ = worked(algorithm, adapter, down)
    assert factors(n for n in NAMES if round_.stretches[0].trains(n)) == TRAINS[name]
    assert factors(round_.up) == SENDS[name]
    assert factors(round_.keep) == KEEPS[name]
    if name not in SENDS_WHAT_IT_KEEPS | SENDS_AND_KEEPS_TWO_MODELS:
        assert not round_.up.keys() & round_.keep.keys(), "personal tensors never leave the client"
    assert plain(round_.up).keys() <= down.keys() <= state.keys()


@pytest.mark.parametrize("name", [n for n in SENDS if n != "apfl"])  # it has two models
def test_one_client_alone_continues_where_it_stopped(name):
    """With a single client, the mean is its own upload, so sharing changes nothing."""
    algorithm, adapter = algorithm_of(name), adapter_for(name)
    state = algorithm.init(adapter)
    down = algorithm.send(state, VISIT)
    last = worked(algorithm, adapter, down).stretches[-1]
    end = trained(replace(last, begin=algorithm.model(adapter, down, {})))
    round_ = worked(algorithm, adapter, down, end=end)
    state = aggregated(algorithm, state, round_.up)
    again = algorithm.model(adapter, algorithm.send(state, VISIT), round_.keep)
    found, expected = (products(again), products(end)) if name in PRODUCTS else (again, end)
    for key in expected:
        assert torch.allclose(found[key], expected[key], atol=1e-5)


PRODUCTS = ("fedex", "flora", "flexlora")  # these change the factors, not their product


@pytest.mark.parametrize("name", SENDS)
def test_its_functions_leave_their_arguments_alone(name):
    algorithm = algorithm_of(name, server_lr=0.5)
    adapter = adapter_for(name)
    state = algorithm.init(adapter)
    down = algorithm.send(state, VISIT)
    end = worked(algorithm, adapter, down).end
    before = [digest(t) for t in (adapter, state, down, end)]
    round_ = worked(algorithm, adapter, down, end=end)
    sent, kept = digest(round_.up), digest(round_.keep)
    new = aggregated(algorithm, state, round_.up)
    algorithm.model(adapter, algorithm.send(new, VISIT), round_.keep)
    worked(algorithm, adapter, down, round_.keep, end=end)
    worked(algorithm, adapter, down, round_.keep, LAST, end=end)
    assert [digest(t) for t in (adapter, state, down, end)] == before
    assert (digest(round_.up), digest(round_.keep)) == (sent, kept)


@pytest.mark.parametrize("name", SENDS)
def test_nobody_in_particular_gets_the_global_model(name):
    algorithm, adapter = algorithm_of(name), adapter_for(name)
    state = algorithm.init(adapter)
    up = worked(algorithm, adapter, algorithm.send(state, VISIT), end=adapter).up
    for now in (state, aggregated(algorithm, state, up)):
        assert algorithm.model(adapter, algorithm.send(now, NOBODY), {}).keys() == set(NAMES)


@pytest.mark.parametrize("name", SENDS)
def test_a_final_round_sends_nothing(name):
    algorithm, adapter = algorithm_of(name), adapter_for(name)
    if algorithm.final:
        down = algorithm.send(algorithm.init(adapter), LAST)
        assert not worked(algorithm, adapter, down, visit=LAST).up


# The table


def test_the_names_of_the_field_are_understood():
    for alias, name in ALIASES.items():
        assert find(alias) is TABLE[name]
        assert load(None, f"algorithm.name={alias}").algorithm.name == name
    assert set(ALIASES) >= {"fedavg", "fedit"}


def test_settings_belong_to_their_algorithm_and_to_no_other():
    known = {n: set(TABLE[n].settings.model_fields) - {"name"} for n in TABLE}
    assert known["local"] == known["fedex"] == set()
    assert known["plora"] == {"server_lr", "server", "prox_mu"}
    assert known["auto"] == {"server_lr"}
    assert names()[: len(TABLE)] == list(TABLE)


def test_no_algorithm_is_mentioned_by_name_outside_the_table():
    """The name of an algorithm in an engine or the round loop shows a gap in the protocol."""
    src = Path(fedvlm.__file__).parent
    for room in ("engines", "rounds", "planning", "deploy", "after", "batches", "models"):
        for path in (src / room).rglob("*.py"):
            code = re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            found = re.findall(r"algorithm\.name\s*[=!]=\s*['\"]", code)
            assert not found, path


def test_an_algorithm_is_frozen():
    with pytest.raises(FrozenInstanceError):
        algorithm_of("auto").final = False


def test_the_server_moves_by_its_learning_rate_towards_the_mean():
    algorithm = algorithm_of("lora", server_lr=0.25)
    a, b = tree(0), tree(1)
    moved = algorithm.server.update(algorithm.init(a), b, 1)
    for n in NAMES:
        assert torch.allclose(moved[n], 0.75 * a[n] + 0.25 * b[n])


def test_a_share_map_takes_the_first_pattern_that_is_found():
    algorithm = sharing({"vision": "B", r"text\.layers\.1": "none", "text": "A"})
    round_ = worked(algorithm, tree(0), {}, end=tree(1))
    shared = {f"{module(n)}:{factor(n)}" for n in round_.up}
    assert shared == {
        "vision_tower.layers.0.q_proj:B",
        "vision_tower.layers.1.q_proj:B",
        "text.layers.0.q_proj:A",
    }
    assert round_.up.keys() | round_.keep.keys() == set(NAMES)


def test_presets_are_share_maps():
    for name, factors_ in (("plora", "B"), ("lora", "AB"), ("fedsa", "A")):
        pair = algorithm_of(name), algorithm_of("share", share={".*": factors_})
        sent, own_sent = (worked(x, tree(0), {}, end=tree(1)).up for x in pair)
        assert sent.keys() == own_sent.keys()


def test_a_share_pattern_without_a_module_is_refused():
    config = TABLE["share"].settings(name="share", share={"vision": "B", "turret": "A"})
    with pytest.raises(ConfigError, match=r"'turret' matches none of the 4 adapted modules"):
        check_fit(config, NAMES)


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
    assert digest(moved_to(a, b, 1.0)) == digest(b)


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
