"""Each algorithm's own rule, on clients whose loss is a formula: wrong if the rule were."""

from __future__ import annotations

import pytest
import torch

from fedvlm.algorithms import Client, Upload, build
from fedvlm.algorithms.client_terms import CONTROL, proximal, scaffold
from fedvlm.algorithms.exact import exact
from fedvlm.algorithms.flex import flexlora, hetlora, ranked
from fedvlm.algorithms.mixing import apfl, ditto, mixing
from fedvlm.algorithms.server import optimized
from fedvlm.algorithms.sharing import IAT, alternating, select, sharing
from fedvlm.algorithms.similarity import clustered, similar
from fedvlm.config import load
from fedvlm.errors import ConfigError
from fedvlm.sections import AlgorithmConfig, LoraConfig, ServerConfig
from fedvlm.tree import cut, factorized, pad, part, products, rank
from toy import A, B, Federation, adapter, pull

FEDAVG = sharing({"": "AB"})
LOCAL = sharing({})
INITIAL = adapter()


def target(seed):
    g = torch.Generator().manual_seed(100 + seed)
    return {n: torch.randn(t.shape, generator=g) for n, t in INITIAL.items()}


def clients(count=3):
    """Clients with different optima and numbers of examples."""
    return {f"c{k}": (1.0 + k, pull(target(k))) for k in range(count)}


def masked(gradient, ranks):
    """The first ranks' own, and none in the others, which are zero in both factors."""

    def found(name, now):
        own = {name: gradient(name, cut({name: now}, 0, 2)[name])}
        return pad(cut(own, 0, ranks), 0, rank({name: now}) - ranks)[name]

    return found


def with_spare(count=3):
    """Clients whose adapter has more than the two ranks that they train."""
    return {c: (weight, masked(g, 2)) for c, (weight, g) in clients(count).items()}


def close(one, other, atol=1e-6):
    return all(torch.allclose(one[n], t, atol=atol) for n, t in other.items())


# Sharing


def test_rolora_trains_and_sends_b_and_a_by_turns():
    run = Federation(alternating(), clients(), INITIAL)
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
    """Where the server is after rounds whose means differ from its state by these numbers."""
    algorithm = optimized(FEDAVG, ServerConfig(**settings))
    state = algorithm.init({B: torch.tensor([[1.0]])})
    found = []
    for change in changes:
        state = algorithm.update(state, {B: state[B] + change})
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
    v = tau**2 + 0.01 * 0.25  # the change squared is above v: v grows
    assert first == pytest.approx(1 + lr * 0.5 / (v**0.5 + tau))
    v = v - 0.01 * 1e-4  # and now below it
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
    assert algorithm.download(state, Client("c", 1.0)).keys() == INITIAL.keys()


def test_a_factor_that_rested_is_not_moved_by_the_servers_momentum():
    run = Federation(optimized(alternating(), ServerConfig(name="avgm")), clients(), INITIAL).run()
    before = run.model()
    run.run()
    assert torch.equal(run.model()[B], before[B])
    assert not torch.equal(run.model()[A], before[A])


# Client terms


def test_fedprox_adds_the_pull_to_the_download():
    mu, lr = 0.5, 0.1
    run = Federation(proximal(FEDAVG, mu), clients(1), INITIAL, lr=lr, steps=2).run()
    now, (_, gradient) = INITIAL, run.clients["c0"]
    for _ in range(2):
        now = {n: t - lr * (gradient(n, t) + mu * (t - INITIAL[n])) for n, t in now.items()}
    assert close(run.uploads["c0"], now)


def test_fedprox_with_a_strong_pull_stays_at_the_download():
    lr = 0.001
    run = Federation(proximal(FEDAVG, 1 / lr), clients(1), INITIAL, lr=lr, steps=50).run()
    free = Federation(FEDAVG, clients(1), INITIAL, lr=lr, steps=50).run()
    moved = (run.model()[A] - INITIAL[A]).norm()
    assert moved < 0.03 * (free.model()[A] - INITIAL[A]).norm()


def test_the_pull_leaves_personal_factors_alone():
    plora = sharing({"": "B"})
    runs = [
        Federation(algorithm, clients(), INITIAL, steps=3).run(2)
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
        name: Federation(algorithm, curved(), INITIAL, lr=0.1, steps=10).run(100)
        for name, algorithm in (("scaffold", scaffold()), ("fedavg", FEDAVG))
    }
    far = {name: (run.model()[A] - optimum()[A]).abs().max().item() for name, run in runs.items()}
    assert far["scaffold"] < 1e-3 < 0.05 < far["fedavg"]


def test_scaffolds_server_control_is_the_mean_of_the_clients_also_when_some_rest():
    run = Federation(scaffold(), curved(), INITIAL, lr=0.1, steps=3)
    for cohort in (None, ["flat"], ["steep"], None):
        run.run(1, cohort)
    own = {c: part(kept, CONTROL) for c, kept in run.kept.items()}
    for name, control in part(run.state, CONTROL).items():
        mean = (1.0 * own["flat"][name] + 3.0 * own["steep"][name]) / 4.0
        assert torch.allclose(control, mean, atol=1e-5)


# Mixing


def test_a_mixture_of_nothing_but_the_mean_is_fedavg_and_of_b_alone_plora():
    for mix, other in (({"A": 1, "B": 1}, "AB"), ({"A": 0, "B": 1}, "B"), ({"A": 0, "B": 0}, "")):
        mixed = Federation(mixing(mix), clients(), INITIAL).run(3)
        plain = Federation(sharing({"": other}), clients(), INITIAL).run(3)
        for client in mixed.clients:
            assert mixed.uploads[client].keys() == plain.uploads[client].keys()
            assert close(mixed.model(client), plain.model(client))


def test_a_round_of_a_mixture_begins_between_the_own_model_and_the_mean():
    run = Federation(mixing({"A": 0.25, "B": 0.75}), clients(), INITIAL).run()
    own, mean, model = run.kept["c2"], run.state, run.model("c2")
    assert torch.allclose(model[A], 0.75 * own[A] + 0.25 * mean[A])
    assert torch.allclose(model[B], 0.25 * own[B] + 0.75 * mean[B])
    assert close(run.model(), mean)


def test_ditto_without_a_pull_is_local_training_beside_fedavg():
    run = Federation(ditto(0.0), clients(), INITIAL, steps=2).run(3)
    alone = Federation(LOCAL, clients(), INITIAL, steps=2).run(3)
    shared = Federation(FEDAVG, clients(), INITIAL, steps=2).run(3)
    for client in run.clients:
        assert close(run.model(client), alone.model(client))
    assert close(run.model(), shared.model())


def test_dittos_personal_model_is_pulled_to_the_download_and_not_to_what_it_trained():
    mu, lr = 2.0, 0.1
    run = Federation(ditto(mu), clients(), INITIAL, lr=lr).run(1)
    down, own = dict(run.state), dict(run.kept["c1"])
    run.run(1)
    (_, gradient) = run.clients["c1"]
    step = {n: v - lr * (gradient(n, v) + mu * (v - down[n])) for n, v in own.items()}
    assert close(run.kept["c1"], step)


def test_apfls_mixture_takes_the_steps_of_its_own_model():
    mix, lr = {"A": 0.25, "B": 0.5}, 0.1
    run = Federation(apfl(mix), clients(), INITIAL, lr=lr).run(1)
    w, v = dict(run.state), dict(run.kept["c1"])
    mixed = run.model("c1")
    assert torch.allclose(mixed[A], 0.25 * w[A] + 0.75 * v[A], atol=1e-6)
    run.run(1)
    (_, gradient) = run.clients["c1"]
    for n, shared in ((A, 0.25), (B, 0.5)):
        own = 1 - shared
        expected = v[n] - (lr / own**2) * own * gradient(n, mixed[n])
        assert torch.allclose(run.kept["c1"][n], expected, atol=1e-5)


# Exact aggregation


def mean_product(run):
    total = sum(w for w, _ in run.clients.values())
    parts = [
        (w / total) * next(iter(products(run.uploads[c]).values()))
        for c, (w, _) in run.clients.items()
    ]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("restart", [False, True])
def test_the_global_models_product_is_the_mean_of_the_clients_products(restart):
    initial = pad(INITIAL, 0, 6)
    run = Federation(exact(2, 6, restart=restart), with_spare(), initial, steps=2)
    frozen = torch.zeros(4, 5)  # what has been added to the frozen weight
    for _ in range(3):
        run.run()
        wanted = frozen + mean_product(run)
        (found,) = products(run.model()).values()
        assert torch.allclose(found, wanted, atol=1e-6)
        (begin,) = products(cut(run.model(), 0, 2)).values()
        frozen = wanted - begin
    (naive,) = products(Federation(FEDAVG, clients(), INITIAL, steps=2).run(3).model()).values()
    assert not torch.allclose(found, naive, atol=1e-3), "the mean's factors would not do"


def test_what_fedex_adds_is_never_trained_and_never_sent():
    run = Federation(exact(2, 6), with_spare(), pad(INITIAL, 0, 6), steps=2).run(2)
    down = dict(run.state)
    run.run()
    assert close(cut(run.works["c0"].end, 2, 8), cut(down, 2, 8), atol=0)
    assert rank(run.uploads["c0"]) == 2


def test_florAs_clients_begin_each_round_with_the_initial_adapter():
    run = Federation(exact(2, 6, restart=True), with_spare(), pad(INITIAL, 0, 6), steps=2).run(2)
    assert close(cut(run.model(), 0, 2), INITIAL, atol=0)
    (moved,) = products(run.model()).values()
    assert moved.abs().max() > 0.01


def test_too_few_spare_ranks_give_the_nearest_matrix():
    run = Federation(exact(2, 1, restart=True), with_spare(), pad(INITIAL, 0, 1), steps=2).run()
    wanted, (found,) = mean_product(run), products(run.model()).values()
    lost = torch.linalg.svdvals(wanted)[1:].norm()
    assert (wanted - found).norm() == pytest.approx(lost.item(), rel=1e-4)


def test_factors_of_a_matrix_have_its_product_and_can_go_on_learning():
    matrix = torch.outer(torch.arange(4.0), torch.arange(5.0))  # rank 1
    found = factorized({"layers.0.q_proj": matrix}, INITIAL, 2)
    assert torch.allclose(products(found)["layers.0.q_proj"], matrix, atol=1e-5)
    assert (found[A].norm(dim=1) > 0).all(), "a rank of zeros in both factors would be dead"
    none = factorized({"layers.0.q_proj": 0 * matrix}, INITIAL, 2)
    assert none[B].norm() == 0
    assert (none[A].norm(dim=1) > 0).all()


# Unequal ranks


def test_flexlora_gives_every_client_the_largest_singular_values_of_the_mean_product():
    algorithm = ranked(flexlora(), {"c0": 1}, 2)
    run = Federation(algorithm, clients(), INITIAL, steps=3).run()
    wanted = mean_product(run)
    u, s, v = torch.linalg.svd(wanted)
    for client, ranks in (("c0", 1), ("c2", 2)):
        down = algorithm.download(run.state, Client(client, 1.0))
        assert int(down["rank"]) == ranks
        (found,) = products({n: down[n] for n in (A, B)}).values()
        assert torch.allclose(found, u[:, :ranks] * s[:ranks] @ v[:ranks], atol=1e-5)


def test_hetlora_weighs_by_the_norm_of_the_product():
    algorithm = hetlora()
    given = [(Client("x", 5.0), 1.0), (Client("y", 1.0), 3.0)]
    trees = [{A: torch.full((2, 5), size), B: torch.ones(4, 2)} for _, size in given]
    run = Federation(algorithm, {}, INITIAL)
    from fedvlm.tree import Mean

    mean = Mean()
    for (client, _), tree in zip(given, trees, strict=True):
        mean.add(algorithm.lift(tree, client), client.weight)
    state = algorithm.update(run.state, mean.tree())
    assert torch.allclose(state[A], torch.full((2, 5), (1 * 1 + 3 * 3) / 4))


RANKED = ("plora", "lora", "fedsa", "ffa", "rolora", "local", "mix", "ditto", "apfl", "fedprox")


@pytest.mark.parametrize("name", [*RANKED, "flexlora", "hetlora", "scaffold", "similar"])
def test_a_client_of_a_lower_rank_has_and_sends_no_more(name):
    lora = LoraConfig(rank=2, ranks={"c0": 1})
    algorithm = build(AlgorithmConfig(name=name), lora)
    run = Federation(algorithm, clients(), INITIAL, steps=2)
    for name_, (weight, gradient) in list(run.clients.items()):
        run.clients[name_] = (weight, masked(gradient, 1 if name_ == "c0" else 2))
    run.run(3)
    model = run.model("c0")
    assert torch.equal(model[A][1], torch.zeros(5))
    assert torch.equal(model[B][:, 1], torch.zeros(4))
    assert run.model("c1")[A][1].abs().min() > 0
    small = {n: t for n, t in run.uploads["c0"].items() if n in (A, B)}
    assert not small or rank(small) == 1
    assert not run.kept["c0"] or rank(run.kept["c0"]) == 1


def test_equal_ranks_change_nothing():
    plain = Federation(FEDAVG, clients(), INITIAL, steps=2).run(2)
    same = Federation(ranked(FEDAVG, {"c": 2}, 2), clients(), INITIAL, steps=2).run(2)
    assert close(plain.model("c1"), same.model("c1"), atol=0)
    assert ranked(FEDAVG, None, 2) is FEDAVG


# Two adapters in one


def halves(tree):
    return cut(tree, 0, 1), cut(tree, 1, 2)


def test_a_pair_averages_one_half_and_keeps_the_other():
    run = Federation(build(AlgorithmConfig(name="pair"), LoraConfig(rank=2)), clients(), INITIAL)
    run.run(2)
    models = [halves(run.model(c)) for c in run.clients]
    assert close(models[0][0], models[1][0], atol=0)
    assert not close(models[0][1], models[1][1])
    assert rank(run.uploads["c0"]) == 1


def test_feddpa_trains_the_shared_half_alone_and_the_own_half_beside_the_downloaded_one():
    algorithm = build(AlgorithmConfig(name="feddpa"), LoraConfig(rank=2))
    run = Federation(algorithm, clients(), INITIAL, steps=2).run(1)
    down, own = dict(run.state), dict(run.kept["c1"])
    run.run(1)
    first, last = run.works["c1"].ends
    assert halves(first)[1][B].abs().max() == 0, "the own half is off while the shared one learns"
    assert not close(halves(first)[0], down)
    assert close(halves(last)[0], down, atol=0)
    assert not close(halves(last)[1], own)


def test_fedalts_frozen_half_is_the_mean_of_the_other_clients():
    algorithm = build(AlgorithmConfig(name="fedalt"), LoraConfig(rank=2))
    run = Federation(algorithm, clients(3), INITIAL, steps=2).run(1)
    sent = dict(run.uploads)
    world, own = halves(run.model("c0"))
    for n in (A, B):
        assert torch.allclose(world[n], (2.0 * sent["c1"][n] + 3.0 * sent["c2"][n]) / 5.0)
        assert torch.equal(own[n], run.kept["c0"][n])
    run.run(1, ["c0"])
    assert close(halves(run.works["c0"].end)[0], world, atol=0), "it is frozen"
    assert close(halves(run.model("c0"))[0], world, atol=0), "and the others have sent no more"
    assert not close(halves(run.model("c1"))[0], halves(run.model("c2"))[0])


# Similarity


def camps():
    """Two camps of clients with opposite optima."""
    opposite = {n: -t for n, t in target(0).items()}
    return {
        "a0": (1.0, pull(target(0))),
        "b0": (1.0, pull(opposite)),
        "a1": (3.0, pull(target(0), 0.5)),
        "b1": (1.0, pull(opposite, 0.5)),
    }


ZERO = {n: torch.zeros_like(t) for n, t in INITIAL.items()}


def test_likeness_decides_between_the_own_model_and_fedavg():
    cold, warm = (Federation(similar(t), camps(), ZERO).run(1) for t in (0.001, 1e6))
    mean = Federation(FEDAVG, camps(), ZERO).run(1).model()
    assert close(warm.model("a0"), mean, atol=1e-5)
    sent = cold.uploads
    camp = {n: (sent["a0"][n] + 3 * sent["a1"][n]) / 4 for n in (A, B)}
    assert close(cold.model("a0"), camp, atol=1e-5), "who is alike is weighed by examples"
    assert close(cold.model(), mean, atol=1e-6)


def test_clusters_are_found_from_the_uploads_alone():
    run = Federation(clustered(2), camps(), ZERO).run(1)
    for _ in range(2):
        for camp in ("a", "b"):
            sent = [(run.clients[f"{camp}{k}"][0], run.uploads[f"{camp}{k}"]) for k in (0, 1)]
            mean = {n: sum(w * t[n] for w, t in sent) / sum(w for w, _ in sent) for n in (A, B)}
            assert close(run.model(f"{camp}0"), mean)
            assert close(run.model(f"{camp}1"), mean)
        run.run(1)


def test_one_cluster_is_fedavg_and_more_than_clients_are_local_models():
    one = Federation(clustered(1), camps(), ZERO).run(3)
    assert close(one.model("a0"), Federation(FEDAVG, camps(), ZERO).run(3).model())
    many = Federation(clustered(9), clients(), INITIAL).run(3)
    alone = Federation(LOCAL, clients(), INITIAL).run(3)
    assert close(many.model("c2"), alone.model("c2"))


def test_a_client_that_has_sent_nothing_gets_the_mean_of_all():
    for algorithm in (similar(0.1), clustered(2)):
        run = Federation(algorithm, camps(), ZERO).run(1)
        down = algorithm.download(run.state, Client("new", 2.0))
        assert close(down, Federation(FEDAVG, camps(), ZERO).run(1).model())


def test_who_rests_keeps_the_say_of_its_last_upload():
    algorithm = similar(1e6)
    run = Federation(algorithm, camps(), ZERO).run(1)
    before = dict(run.uploads)
    run.run(1, ["a0"])
    wanted = {
        n: (run.uploads["a0"][n] + before["b0"][n] + 3 * before["a1"][n] + before["b1"][n]) / 6
        for n in (A, B)
    }
    assert close(run.model("b1"), wanted, atol=1e-5)
    assert algorithm.gather(run.state, [Upload(Client("a0", 1.0), ZERO)])["weight/b1"] == 1.0


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algorithm": {"name": "fedex", "prox_mu": 1}}, r"prox_mu has no meaning.*fedex"),
        ({"algorithm": {"name": "lora", "mix_a": 0.1}}, "mix_a has no meaning"),
        ({"algorithm": {"name": "local", "server": {"name": "adam"}}}, "server has no meaning"),
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
