"""The rules of algorithms on ranks and similarity, on clients whose loss is a formula."""

from __future__ import annotations

import pytest
import torch

from fedvlm import simulate
from fedvlm.algorithms.base import Local, Upload, Visit
from fedvlm.algorithms.exact import exact
from fedvlm.algorithms.flex import flexlora, hetlora, ranked
from fedvlm.algorithms.similarity import clustered, similar
from fedvlm.algorithms.table import TABLE, build
from fedvlm.errors import FedVLMError
from fedvlm.settings.method import LoraConfig
from fedvlm.tree import cut, factorized, pad, products, rank
from toy import (
    FEDAVG,
    INITIAL,
    LOCAL,
    A,
    B,
    clients,
    close,
    masked,
    pull,
    target,
    with_spare,
)


def built(name, **settings):
    """An algorithm of the table for an adapter of two ranks."""
    return build(TABLE[name].settings(name=name, **settings), LoraConfig(rank=2))


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
    run = simulate(exact(2, 6, restart=restart), with_spare(), initial, steps=2)
    frozen = torch.zeros(4, 5)  # what has been added to the frozen weight
    for _ in range(3):
        run.run()
        wanted = frozen + mean_product(run)
        (found,) = products(run.model()).values()
        assert torch.allclose(found, wanted, atol=1e-6)
        (begin,) = products(cut(run.model(), 0, 2)).values()
        frozen = wanted - begin
    (naive,) = products(simulate(FEDAVG, clients(), INITIAL, steps=2).run(3).model()).values()
    assert not torch.allclose(found, naive, atol=1e-3), "the means of the factors differ"


def test_what_fedex_adds_is_never_trained_and_never_sent():
    run = simulate(exact(2, 6), with_spare(), pad(INITIAL, 0, 6), steps=2).run(2)
    down = dict(run.state)
    run.run()
    assert close(cut(run.ends["c0"][-1], 2, 8), cut(down, 2, 8), atol=0)
    assert rank(run.uploads["c0"]) == 2


def test_florAs_clients_begin_each_round_with_the_initial_adapter():
    run = simulate(exact(2, 6, restart=True), with_spare(), pad(INITIAL, 0, 6), steps=2).run(2)
    assert close(cut(run.model(), 0, 2), INITIAL, atol=0)
    (moved,) = products(run.model()).values()
    assert moved.abs().max() > 0.01


def test_too_few_spare_ranks_give_the_nearest_matrix():
    run = simulate(exact(2, 1, restart=True), with_spare(), pad(INITIAL, 0, 1), steps=2).run()
    wanted, (found,) = mean_product(run), products(run.model()).values()
    lost = torch.linalg.svdvals(wanted)[1:].norm()
    assert (wanted - found).norm() == pytest.approx(lost.item(), rel=1e-4)


def test_factors_of_a_matrix_have_its_product_and_can_go_on_learning():
    matrix = torch.outer(torch.arange(4.0), torch.arange(5.0))  # rank 1
    found = factorized({"layers.0.q_proj": matrix}, INITIAL, 2)
    assert torch.allclose(products(found)["layers.0.q_proj"], matrix, atol=1e-5)
    assert (found[A].norm(dim=1) > 0).all(), "a rank with zeros in both factors gets no gradient"
    none = factorized({"layers.0.q_proj": 0 * matrix}, INITIAL, 2)
    assert none[B].norm() == 0
    assert (none[A].norm(dim=1) > 0).all()


# Unequal ranks


def test_flexlora_gives_every_client_the_largest_singular_values_of_the_mean_product():
    algorithm = ranked(flexlora(), {"c0": 1}, 2)
    run = simulate(algorithm, clients(), INITIAL, steps=3).run()
    wanted = mean_product(run)
    u, s, v = torch.linalg.svd(wanted)
    for client, ranks in (("c0", 1), ("c2", 2)):
        down = algorithm.send(run.state, Visit(client, 1.0))
        assert int(down["rank"]) == ranks
        (found,) = products({n: down[n] for n in (A, B)}).values()
        assert torch.allclose(found, u[:, :ranks] * s[:ranks] @ v[:ranks], atol=1e-5)


def test_hetlora_weighs_by_the_norm_of_the_product():
    algorithm = hetlora()
    given = [(Visit("x", 5.0), 1.0), (Visit("y", 1.0), 3.0)]
    trees = [{A: torch.full((2, 5), size), B: torch.ones(4, 2)} for _, size in given]
    run = simulate(algorithm, {}, INITIAL)
    from fedvlm.tree import Mean

    mean = Mean()
    for (visit, _), tree in zip(given, trees, strict=True):
        mean.add(*algorithm.server.lift(tree, visit))
    state = algorithm.server.update(run.state, mean.tree(), 1)
    assert torch.allclose(state[A], torch.full((2, 5), (1 * 1 + 3 * 3) / 4))


RANKED = [n for n, e in TABLE.items() if e.ranks and n != "share"]


@pytest.mark.parametrize("name", RANKED)
def test_a_client_of_a_lower_rank_has_and_sends_no_more(name):
    lora = LoraConfig(rank=2, ranks={"c0": 1})
    algorithm = build(TABLE[name].settings(name=name), lora)
    run = simulate(algorithm, clients(), INITIAL, steps=2)
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


@pytest.mark.parametrize("told", [0, -1, 2, 10**12])
def test_a_client_refuses_a_rank_that_its_download_does_not_have(told):
    algorithm = ranked(FEDAVG, {"c0": 1}, 2)
    visit = Visit("c0", 1.0, round=1)
    down = algorithm.send(algorithm.init(INITIAL), visit) | {"rank": torch.tensor(told)}
    with pytest.raises(FedVLMError, match=f"states rank {told}"):
        algorithm.model(INITIAL, down, {})
    with pytest.raises(FedVLMError, match=f"states rank {told}"):
        next(algorithm.work(Local(visit, INITIAL, down, {}, 1)))


def test_equal_ranks_change_nothing():
    plain = simulate(FEDAVG, clients(), INITIAL, steps=2).run(2)
    same = simulate(ranked(FEDAVG, {"c": 2}, 2), clients(), INITIAL, steps=2).run(2)
    assert close(plain.model("c1"), same.model("c1"), atol=0)
    assert ranked(FEDAVG, None, 2) is FEDAVG


# Two adapters in one


def halves(tree):
    return cut(tree, 0, 1), cut(tree, 1, 2)


def test_a_pair_averages_one_half_and_keeps_the_other():
    run = simulate(built("pair"), clients(), INITIAL)
    run.run(2)
    models = [halves(run.model(c)) for c in run.clients]
    assert close(models[0][0], models[1][0], atol=0)
    assert not close(models[0][1], models[1][1])
    assert rank(run.uploads["c0"]) == 1


def test_feddpa_trains_the_shared_half_alone_and_the_own_half_beside_the_downloaded_one():
    algorithm = built("feddpa")
    run = simulate(algorithm, clients(), INITIAL, steps=2).run(1)
    down, own = dict(run.state), dict(run.kept["c1"])
    run.run(1)
    first, last = run.ends["c1"]
    assert halves(first)[1][B].abs().max() == 0, "off while the shared half trains"
    assert not close(halves(first)[0], down)
    assert close(halves(last)[0], down, atol=0)
    assert not close(halves(last)[1], own)


def test_fedalts_frozen_half_is_the_mean_of_the_other_clients():
    algorithm = built("fedalt")
    run = simulate(algorithm, clients(3), INITIAL, steps=2).run(1)
    sent = dict(run.uploads)
    world, own = halves(run.model("c0"))
    for n in (A, B):
        assert torch.allclose(world[n], (2.0 * sent["c1"][n] + 3.0 * sent["c2"][n]) / 5.0)
        assert torch.equal(own[n], run.kept["c0"][n])
    run.run(1, ["c0"])
    assert close(halves(run.ends["c0"][-1])[0], world, atol=0), "the first half is frozen"
    assert close(halves(run.model("c0"))[0], world, atol=0), "the others sent nothing new"
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


def test_similarity_decides_between_the_own_model_and_fedavg():
    cold, warm = (simulate(similar(t), camps(), ZERO).run(1) for t in (0.001, 1e6))
    mean = simulate(FEDAVG, camps(), ZERO).run(1).model()
    assert close(warm.model("a0"), mean, atol=1e-5)
    sent = cold.uploads
    camp = {n: (sent["a0"][n] + 3 * sent["a1"][n]) / 4 for n in (A, B)}
    assert close(cold.model("a0"), camp, atol=1e-5), "similar clients are weighted by examples"
    assert close(cold.model(), mean, atol=1e-6)


def test_clusters_are_found_from_the_uploads_alone():
    run = simulate(clustered(2), camps(), ZERO).run(1)
    for _ in range(2):
        for camp in ("a", "b"):
            sent = [(run.clients[f"{camp}{k}"][0], run.uploads[f"{camp}{k}"]) for k in (0, 1)]
            mean = {n: sum(w * t[n] for w, t in sent) / sum(w for w, _ in sent) for n in (A, B)}
            assert close(run.model(f"{camp}0"), mean)
            assert close(run.model(f"{camp}1"), mean)
        run.run(1)


def test_one_cluster_is_fedavg_and_more_than_clients_are_local_models():
    one = simulate(clustered(1), camps(), ZERO).run(3)
    assert close(one.model("a0"), simulate(FEDAVG, camps(), ZERO).run(3).model())
    many = simulate(clustered(9), clients(), INITIAL).run(3)
    alone = simulate(LOCAL, clients(), INITIAL).run(3)
    assert close(many.model("c2"), alone.model("c2"))


def test_a_client_that_has_sent_nothing_gets_the_mean_of_all():
    for algorithm in (similar(0.1), clustered(2)):
        run = simulate(algorithm, camps(), ZERO).run(1)
        down = algorithm.send(run.state, Visit("new", 2.0))
        assert close(down, simulate(FEDAVG, camps(), ZERO).run(1).model())


def test_the_last_upload_of_a_resting_client_still_counts():
    algorithm = similar(1e6)
    run = simulate(algorithm, camps(), ZERO).run(1)
    before = dict(run.uploads)
    run.run(1, ["a0"])
    wanted = {
        n: (run.uploads["a0"][n] + before["b0"][n] + 3 * before["a1"][n] + before["b1"][n]) / 6
        for n in (A, B)
    }
    assert close(run.model("b1"), wanted, atol=1e-5)
    assert (
        algorithm.server.update(run.state, [Upload(Visit("a0", 1.0), ZERO)], 3)["weight/b1"] == 1.0
    )
