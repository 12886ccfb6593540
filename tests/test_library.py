"""The rule of each algorithm, on clients whose loss is a formula."""

from __future__ import annotations

import pytest
import torch

from fedvlm import simulate
from fedvlm.algorithms.base import (
    Visit,
)
from fedvlm.algorithms.client_terms import CONTROL, proximal, scaffold
from fedvlm.algorithms.flex import flexlora, hetlora
from fedvlm.algorithms.mixing import apfl, ditto, mixing
from fedvlm.algorithms.server import ServerConfig, optimized
from fedvlm.algorithms.sharing import IAT, alternating, sharing
from fedvlm.config import load
from fedvlm.errors import ConfigError
from fedvlm.layers import select
from fedvlm.tree import part
from toy import (
    FEDAVG,
    INITIAL,
    LOCAL,
    A,
    B,
    clients,
    close,
    pull,
    target,
)

# Sharing


def test_rolora_trains_and_sends_b_and_a_by_turns():
    run = simulate(alternating(), clients(), INITIAL)
    sent = []
    for _ in range(4):
        before = run.model()
        run.run()
        (upload,) = {tuple(u) for u in run.uploads.values()}
        sent.append(upload)
        still = A if upload == (B,) else B
        assert torch.equal(run.model()[still], before[still])
        assert not torch.equal(run.model()[upload[0]], before[upload[0]])
    assert sent == [(B,), (A,), (B,), (A,)]


def test_iat_shares_b_of_the_image_side_and_a_of_the_language_model():
    shared = select(IAT)
    name = "base_model.model.model.{}.layers.0.q_proj.lora_{}.weight"
    for module, sent in (
        ("vision_tower", "B"),
        ("multi_modal_projector", "B"),
        ("text_model", "A"),
    ):
        assert [f for f in "AB" if shared(name.format(module, f))] == [sent]


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("layer:0-1", {0, 1}),
        ("layer:2-", {2, 3}),
        ("layer:3", {3}),
        ("part:vision", {0, 1}),
        ("part:language & layer:3-", {3}),
        ("part:language & q_proj & layer:0-2", {2}),
        ("part:projector", set()),
    ],
)
def test_a_share_map_can_name_parts_and_layers(pattern, layers):
    modules = [f"model.vision_tower.layers.{i}.fc1" for i in (0, 1)]
    modules += [f"model.text_model.layers.{i}.q_proj" for i in (2, 3)]
    shared = select({pattern: "B"})
    found = {int(m.split(".")[3]) for m in modules if shared(f"{m}.lora_B.weight")}
    assert found == layers


@pytest.mark.parametrize("pattern", ["part:tower", "layer:x", "layer:-", "(", "q & layer:"])
def test_a_share_pattern_that_cannot_be_read_is_refused(pattern):
    with pytest.raises(ConfigError, match="algorithm"):
        load({"algorithm": {"share": {pattern: "B"}}})


# Server optimizers


def server_steps(changes, **settings):
    """The server's value after each round, for means that differ from its state by ``changes``."""
    algorithm = optimized(FEDAVG, ServerConfig(**settings))
    state = algorithm.init({B: torch.tensor([[1.0]])})
    found = []
    for number, change in enumerate(changes, 1):
        state = {**state, **algorithm.server.update(state, {B: state[B] + change}, number)}
        found.append(state[B].item())
    return found


def test_fedavgm_sums_the_changes():
    first, second = server_steps([0.5, 0.1], name="avgm", lr=2.0, beta1=0.9)
    assert first == pytest.approx(1 + 2 * 0.5)
    assert second == pytest.approx(first + 2 * (0.9 * 0.5 + 0.1))


def test_fedadam_takes_the_step_that_the_paper_writes():
    tau, lr = 0.01, 0.1
    first, second = server_steps([0.5, -0.2], name="adam", lr=lr, tau=tau)
    m, v = 0.1 * 0.5, 0.99 * tau**2 + 0.01 * 0.25
    assert first == pytest.approx(1 + lr * m / (v**0.5 + tau))
    m, v = 0.9 * m - 0.1 * 0.2, 0.99 * v + 0.01 * 0.04
    assert second == pytest.approx(first + lr * m / (v**0.5 + tau))


def test_fedyogi_lowers_its_second_moment_by_no_more_than_the_change():
    tau, lr = 0.01, 0.1
    first, second = server_steps([0.5, 0.01], name="yogi", lr=lr, tau=tau, beta1=0.0)
    v = tau**2 + 0.01 * 0.25  # the squared change is above v, so v grows
    assert first == pytest.approx(1 + lr * 0.5 / (v**0.5 + tau))
    v = v - 0.01 * 1e-4  # the squared change is below v
    assert second == pytest.approx(first + lr * 0.01 / (v**0.5 + tau))


def test_fedadagrad_sums_squares_and_has_no_momentum_unless_asked():
    tau, lr = 0.01, 0.1
    first, second = server_steps([0.5, 0.2], name="adagrad", lr=lr, tau=tau)
    v = tau**2 + 0.25
    assert first == pytest.approx(1 + lr * 0.5 / (v**0.5 + tau))
    assert second == pytest.approx(first + lr * 0.2 / ((v + 0.04) ** 0.5 + tau))


def test_the_servers_moments_stay_at_the_server():
    algorithm = optimized(FEDAVG, ServerConfig(name="adam"))
    state = algorithm.init(INITIAL)
    assert len(state) == 3 * len(INITIAL)
    assert algorithm.send(state, Visit("c", 1.0)).keys() == INITIAL.keys()


def test_a_factor_that_rested_is_not_moved_by_the_servers_momentum():
    run = simulate(optimized(alternating(), ServerConfig(name="avgm")), clients(), INITIAL).run()
    before = run.model()
    run.run()
    assert torch.equal(run.model()[B], before[B])
    assert not torch.equal(run.model()[A], before[A])


@pytest.mark.parametrize("one", [flexlora, hetlora])
@pytest.mark.parametrize("name", ["avgm", "adam"])
def test_an_optimizer_steps_where_the_mean_is_not_of_factors(one, name):
    """flexlora averages products, and hetlora weighs by norms."""
    plain = simulate(one(), clients(), INITIAL, 1, steps=2)
    stepped = simulate(
        optimized(one(), ServerConfig(name=name, lr=0.5)), clients(), INITIAL, 1, steps=2
    )
    assert stepped.model().keys() == plain.model().keys()
    if name == "avgm":  # half of the step, without momentum in round 1
        half = {n: (INITIAL[n] + t) / 2 for n, t in plain.model().items()}
        assert close(stepped.model(), half)
    assert not close(stepped.model(), INITIAL)


# Client terms


def test_fedprox_adds_the_pull_to_the_download():
    mu, lr = 0.5, 0.1
    run = simulate(proximal(FEDAVG, mu), clients(1), INITIAL, lr=lr, steps=2).run()
    now, (_, gradient) = INITIAL, run.clients["c0"]
    for _ in range(2):
        now = {n: t - lr * (gradient(n, t) + mu * (t - INITIAL[n])) for n, t in now.items()}
    assert close(run.uploads["c0"], now)


def test_fedprox_with_a_strong_pull_stays_at_the_download():
    lr = 0.001
    run = simulate(proximal(FEDAVG, 1 / lr), clients(1), INITIAL, lr=lr, steps=50).run()
    free = simulate(FEDAVG, clients(1), INITIAL, lr=lr, steps=50).run()
    moved = (run.model()[A] - INITIAL[A]).norm()
    assert moved < 0.03 * (free.model()[A] - INITIAL[A]).norm()


def test_the_pull_leaves_personal_factors_alone():
    plora = sharing({"": "B"})
    runs = [
        simulate(algorithm, clients(), INITIAL, steps=3).run(2)
        for algorithm in (plora, proximal(plora, 2.0))
    ]
    assert close(runs[0].kept["c1"], runs[1].kept["c1"])
    assert not close(runs[0].uploads["c1"], runs[1].uploads["c1"])


def curved():
    """Two clients of different curvature: several local steps pull FedAvg off the optimum."""
    return {"flat": (1.0, pull(target(0), 0.5)), "steep": (3.0, pull(target(1), 4.0))}


def optimum():
    weights = {"flat": 1.0 * 0.5, "steep": 3.0 * 4.0}
    total = sum(weights.values())
    flat, steep = target(0), target(1)
    return {n: (weights["flat"] * flat[n] + weights["steep"] * steep[n]) / total for n in INITIAL}


def test_scaffold_finds_the_optimum_that_fedavg_misses():
    runs = {
        name: simulate(algorithm, curved(), INITIAL, lr=0.1, steps=10).run(100)
        for name, algorithm in (("scaffold", scaffold()), ("fedavg", FEDAVG))
    }
    far = {name: (run.model()[A] - optimum()[A]).abs().max().item() for name, run in runs.items()}
    assert far["scaffold"] < 1e-3 < 0.05 < far["fedavg"]


def test_scaffolds_server_control_is_the_mean_of_the_clients_also_when_some_rest():
    run = simulate(scaffold(), curved(), INITIAL, lr=0.1, steps=3)
    for cohort in (None, ["flat"], ["steep"], None):
        run.run(1, cohort)
    own = {c: part(kept, CONTROL) for c, kept in run.kept.items()}
    for name, control in part(run.state, CONTROL).items():
        mean = (1.0 * own["flat"][name] + 3.0 * own["steep"][name]) / 4.0
        assert torch.allclose(control, mean, atol=1e-5)


# Mixing


def test_a_mixture_of_nothing_but_the_mean_is_fedavg_and_of_b_alone_plora():
    for mix, other in (({"A": 1, "B": 1}, "AB"), ({"A": 0, "B": 1}, "B"), ({"A": 0, "B": 0}, "")):
        mixed = simulate(mixing(mix), clients(), INITIAL).run(3)
        plain = simulate(sharing({"": other}), clients(), INITIAL).run(3)
        for client in mixed.clients:
            assert mixed.uploads[client].keys() == plain.uploads[client].keys()
            assert close(mixed.model(client), plain.model(client))


def test_a_round_of_a_mixture_begins_between_the_own_model_and_the_mean():
    run = simulate(mixing({"A": 0.25, "B": 0.75}), clients(), INITIAL).run()
    own, mean, model = run.kept["c2"], run.state, run.model("c2")
    assert torch.allclose(model[A], 0.75 * own[A] + 0.25 * mean[A])
    assert torch.allclose(model[B], 0.25 * own[B] + 0.75 * mean[B])
    assert close(run.model(), mean)


def test_ditto_without_a_pull_is_local_training_beside_fedavg():
    run = simulate(ditto(0.0), clients(), INITIAL, steps=2).run(3)
    alone = simulate(LOCAL, clients(), INITIAL, steps=2).run(3)
    shared = simulate(FEDAVG, clients(), INITIAL, steps=2).run(3)
    for client in run.clients:
        assert close(run.model(client), alone.model(client))
    assert close(run.model(), shared.model())


def test_dittos_personal_model_is_pulled_to_the_download_and_not_to_what_it_trained():
    mu, lr = 2.0, 0.1
    run = simulate(ditto(mu), clients(), INITIAL, lr=lr).run(1)
    down, own = dict(run.state), dict(run.kept["c1"])
    run.run(1)
    (_, gradient) = run.clients["c1"]
    step = {n: v - lr * (gradient(n, v) + mu * (v - down[n])) for n, v in own.items()}
    assert close(run.kept["c1"], step)


def test_apfls_mixture_takes_the_steps_of_its_own_model():
    mix, lr = {"A": 0.25, "B": 0.5}, 0.1
    run = simulate(apfl(mix), clients(), INITIAL, lr=lr).run(1)
    w, v = dict(run.state), dict(run.kept["c1"])
    mixed = run.model("c1")
    assert torch.allclose(mixed[A], 0.25 * w[A] + 0.75 * v[A], atol=1e-6)
    run.run(1)
    (_, gradient) = run.clients["c1"]
    for n, shared in ((A, 0.25), (B, 0.5)):
        own = 1 - shared
        expected = v[n] - (lr / own**2) * own * gradient(n, mixed[n])
        assert torch.allclose(run.kept["c1"][n], expected, atol=1e-5)


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algorithm": {"name": "fedex", "prox_mu": 1}}, r"prox_mu has no meaning.*fedex"),
        ({"algorithm": {"name": "lora", "mix_a": 0.1}}, "mix_a has no meaning"),
        ({"algorithm": {"name": "local", "server": {"name": "adam"}}}, "server has no meaning"),
        (
            {"algorithm": {"name": "lora", "server": {"lr": 0.5}}},
            "lr has no meaning without an optimizer",
        ),
        ({"algorithm": {"name": "local", "x": 1}}, r"unknown key 'algorithm\.x'; .* no settings"),
        ({"algorithm": {"name": "auto", "server_l": 1}}, r"did you mean 'algorithm\.server_lr'\?"),
        ({"algorithm": {"name": "scaffold"}}, r"set train\.optimizer=sgd"),
        ({"algorithm": {"name": "pair"}, "lora": {"rank": 3}}, "even, got 3"),
        ({"algorithm": {"name": "apfl", "mix_b": 1.0}}, "below 1"),
        ({"algorithm": {"name": "lora"}, "lora": {"spare": 4}}, "spare has no meaning"),
        ({"algorithm": {"name": "pair"}, "lora": {"ranks": {"x": 2}}}, "ranks has no meaning"),
        ({"lora": {"ranks": {"x": 9}}}, "rank 9, more than lora.rank=8"),
        ({"lora": {"ranks": {"(": 2}}}, "no regular expression"),
        (
            {"algorithm": {"name": "lora", "server": {"name": "adam"}, "server_lr": 0.5}},
            r"set algorithm\.server\.lr",
        ),
    ],
)
def test_a_setting_that_means_nothing_to_the_algorithm_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        load(settings)
