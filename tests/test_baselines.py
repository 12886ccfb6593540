"""The equation of each baseline of 2024 and later, on clients whose loss is a formula."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fedvlm import simulate
from fedvlm.algorithms import branches as trees
from fedvlm.algorithms.base import NOBODY, Upload, Visit
from fedvlm.algorithms.branches import branches
from fedvlm.algorithms.dendrogram import cuts, silhouette
from fedvlm.algorithms.experts import experts
from fedvlm.algorithms.relevance import relevance
from fedvlm.algorithms.residual import corrected
from fedvlm.algorithms.rotation import rotating, turned
from fedvlm.tree import cut, pad, products
from test_library_ranks import ZERO, camps, mean_product
from toy import FEDAVG, INITIAL, A, B, clients, close, pull, target


def averaged(run, name):
    """The mean of a factor over the clients, weighted by examples."""
    total = sum(w for w, _ in run.clients.values())
    return sum(w * run.uploads[c][name] for c, (w, _) in run.clients.items()) / total


# LoRA-FAIR


def test_lorafairs_b_is_the_minimum_of_the_distance_and_the_ridge():
    ridge = 0.3
    run = simulate(corrected(ridge), clients(), INITIAL, steps=3).run()
    a, b = run.state[A], run.state[B]
    assert torch.allclose(a, averaged(run, A), atol=1e-6)
    slope = (b @ a - mean_product(run)) @ a.T + ridge * (b - averaged(run, B))
    assert slope.abs().max() < 1e-5, "the gradient vanishes at the minimum"


def test_lorafairs_product_is_nearer_to_the_mean_product_than_fedavgs():
    runs = [simulate(one, clients(), INITIAL, steps=3).run() for one in (corrected(1e-6), FEDAVG)]
    near, far = (
        (next(iter(products(run.model()).values())) - mean_product(run)).norm() for run in runs
    )
    assert near < 0.9 * far
    large = simulate(corrected(1e9), clients(), INITIAL, steps=3).run(3)
    assert close(large.model(), simulate(FEDAVG, clients(), INITIAL, steps=3).run(3).model())


# FedRot-LoRA


def turn(seed, ranks=2):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(ranks, ranks, generator=g))[0]


@pytest.mark.parametrize("by", ["A", "B"])
def test_no_other_turn_is_nearer_to_the_download(by):
    tree, goal, name = target(1), target(2), {"A": A, "B": B}[by]
    found = turned(tree, goal, by)
    assert torch.allclose(found[B] @ found[A], tree[B] @ tree[A], atol=1e-5)
    least = (found[name] - goal[name]).norm()
    for seed in range(100):
        other = {A: turn(seed).T @ tree[A], B: tree[B] @ turn(seed)}
        assert least <= (other[name] - goal[name]).norm() + 1e-5


def test_factors_that_are_only_turned_do_not_cancel_in_the_mean():
    goal = target(1)
    same = [{A: turn(s).T @ goal[A], B: goal[B] @ turn(s)} for s in (3, 4)]
    for tree in same:
        assert close(turned(tree, goal, "A"), goal, atol=1e-5)
        assert close(turned(tree, goal, "B"), goal, atol=1e-5)
        assert not close(tree, goal, atol=0.1)


def test_clients_turn_by_b_in_odd_rounds_and_by_a_in_even_ones():
    run = simulate(rotating(), clients(), INITIAL, steps=2).run()
    assert close(run.uploads["c1"], run.ends["c1"][-1]), "the first B of a download is zero"
    for by in ("A", "B"):
        down = dict(run.state)
        run.run()
        assert close(run.uploads["c1"], turned(run.ends["c1"][-1], down, by), atol=1e-5)


def test_ranks_without_overlap_are_not_turned():
    tree, goal = target(1), {A: target(2)[A], B: torch.zeros(4, 2)}
    assert close(turned(tree, goal, "B"), tree, atol=0)
    for by in ("A", "B"):  # a client that lacks the second rank
        one, other = (pad(cut(target(k), 0, 1), 0, 1) for k in (1, 2))
        assert cut(turned(one, other, by), 1, 2)[A].abs().max() < 1e-12


# FedMosaic's RELA


def test_relas_mean_weighs_the_others_by_the_cosines_of_decayed_changes():
    algorithm = relevance(2, 0.5)
    run = simulate(algorithm, clients(4), INITIAL, steps=2)
    begin = dict.fromkeys(run.clients, cut(INITIAL, 1, 2))
    trend = {}
    for number in (1, 2, 3):
        run.run(1, None if number != 2 else ["c0", "c2"])
        for c in run.clients if number != 2 else ("c0", "c2"):
            change = torch.cat([(run.uploads[c][n] - begin[c][n]).flatten() for n in (A, B)])
            trend[c] = (trend[c] + change) / 2 if number > 1 else change
            begin[c] = run.uploads[c]
    others = ["c0", "c2", "c3"]
    cosines = [torch.cosine_similarity(trend["c1"], trend[c], dim=0) for c in others]
    weights = torch.softmax(torch.stack(cosines) / 0.5, 0)
    down = algorithm.send(run.state, Visit("c1", 2.0))
    for n in (A, B):
        wanted = sum(w * begin[c][n] for w, c in zip(weights, others, strict=True))
        assert torch.allclose(down[n], wanted, atol=1e-6)
    assert close(cut(run.model("c1"), 0, 1), down, atol=0), "the first half is the download"
    assert close(cut(run.model("c1"), 1, 2), run.kept["c1"], atol=0)


def test_rela_favours_the_own_camp_and_ends_as_the_plain_mean():
    cold, warm = (simulate(relevance(2, t), camps(), ZERO).run(1) for t in (0.01, 1e6))
    assert close(cut(cold.model("a0"), 0, 1), cold.uploads["a1"], atol=1e-5)
    sent = [warm.uploads[c] for c in ("a1", "b0", "b1")]
    assert close(cut(warm.model("a0"), 0, 1), {n: sum(t[n] for t in sent) / 3 for n in (A, B)})
    new = warm.algorithm.send(warm.state, Visit("new", 1.0))
    total = sum(w * warm.uploads[c][B] for c, (w, _) in warm.clients.items())
    assert torch.allclose(new[B], total / 6, atol=1e-6)


# Clustering


def line(*places):
    points = torch.tensor(places, dtype=torch.float64)
    return (points[:, None] - points[None]).abs()


def test_average_linkage_merges_the_clusters_of_the_least_mean_distance():
    found = [labels.tolist() for labels in cuts(line(0.0, 1.0, 10.0, 12.0, 30.0))]
    assert found == [
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 4],
        [0, 0, 2, 2, 4],
        [0, 0, 2, 3, 4],
        [0, 1, 2, 3, 4],
    ]
    assert [labels.tolist() for labels in cuts(line(5.0))] == [[0]]


def test_the_silhouette_is_that_of_its_definition():
    gaps, labels = line(0.0, 1.0, 10.0, 12.0, 30.0, 31.5), torch.tensor([0, 0, 2, 2, 2, 5])
    widths = []
    for i, own in enumerate(labels.tolist()):
        means = {}
        for group in (0, 2, 5):
            inside = [gaps[i, j] for j, g in enumerate(labels.tolist()) if g == group and j != i]
            means[group] = sum(inside) / len(inside) if inside else None
        a, b = means.pop(own), min(means.values())
        widths.append(0.0 if a is None else float((b - a) / max(a, b)))
    assert silhouette(gaps, labels) == pytest.approx(sum(widths) / 6)
    assert silhouette(torch.zeros(4, 4), torch.tensor([0, 0, 1, 1])) == 0


# FedLEASE


def three_camps():
    return {
        f"{camp}{k}": (1.0 + k, pull(target(camp), 1 + k / 4)) for camp in range(3) for k in (0, 1)
    }


@pytest.mark.parametrize(("found", "groups"), [(camps, 2), (three_camps, 3)])
def test_fedlease_finds_the_number_of_groups(found, groups):
    run = simulate(experts(4), found(), INITIAL if groups == 3 else ZERO).run()
    for _ in range(2):
        models = {c: run.model(c) for c in run.clients}
        assert len({tuple(m[B].flatten().tolist()) for m in models.values()}) == groups
        for client, model in models.items():
            mates = [c for c in run.clients if c[0] == client[0]]
            total = sum(run.clients[c][0] for c in mates)
            mean = {
                n: sum(run.clients[c][0] * run.uploads[c][n] for c in mates) / total for n in (A, B)
            }
            assert close(model, mean)
        run.run()


def test_fedlease_compares_b_only_and_is_fedavg_for_two_clients():
    algorithm, b = experts(2), target(0)[B]
    sent = {
        "x": {A: target(1)[A], B: b},
        "y": {A: target(2)[A], B: b + 0.01},
        "z": {A: target(1)[A], B: -b},
    }
    uploads = [Upload(Visit(c, 1.0, round=1), tree) for c, tree in sent.items()]
    state = algorithm.server.update(algorithm.init(INITIAL), uploads, 1)
    assert close(algorithm.send(state, Visit("z", 1.0)), sent["z"], atol=0)
    assert not close(algorithm.send(state, Visit("x", 1.0)), sent["x"])
    two = simulate(algorithm, clients(2), INITIAL).run(2)
    plain = simulate(FEDAVG, clients(2), INITIAL).run(2)
    assert close(two.model("c0"), plain.model())
    assert close(algorithm.send(state, NOBODY), algorithm.send(state, Visit("new", 1.0)), atol=0)


# FedTreeLoRA


def test_fedtrees_groups_are_nested_grow_slowly_and_follow_the_layers_silhouettes():
    alike, pairs_ = line(0, 1, 2, 3, 4, 5.0), line(0, 0.1, 8, 8.1, 20, 20.1)
    distances = torch.stack([0.1 * alike, pairs_, pairs_, alike])

    def counts(*settings):
        layers = torch.stack(trees.grouped(distances, *settings), 1)
        for upper, lower in pairwise(layers):
            for own in lower.unique():
                assert len(upper[lower == own].unique()) == 1, "a group lies inside one above it"
        return [len(layer.unique()) for layer in layers]

    assert counts(0.99, 3) == [1, 1, 1, 1], "one group has the best score"
    assert counts(0.8, 3) == [1, 3, 3, 3], "and never fewer groups than a layer before"
    assert counts(0.6, 2) == [1, 2, 3, 3], "one more group a layer"
    assert counts(0.8, 1) == [1, 1, 1, 1]


def test_fedtree_shares_the_first_layer_with_all_and_the_last_with_its_group():
    key = "base_model.model.{}.layers.{}.q_proj.lora_{}.weight"
    names = [
        key.format(part, i, f) for part in ("text", "vision_tower") for i in (0, 1) for f in "AB"
    ]
    shapes = {"A": (2, 5), "B": (4, 2)}
    initial = {n: torch.zeros(shapes[n.split("lora_")[1][0]]) for n in names}
    order = [names[4:6], names[6:], names[:2], names[2:4]]
    assert trees.layers(initial) == order, "the image side first"

    def upload(k):
        g = torch.Generator().manual_seed(k)
        tree = {n: t + torch.randn(t.shape, generator=g) / 10 for n, t in initial.items()}
        return {n: t + (10.0 * (k % 2) if n in order[3] else 0.0) for n, t in tree.items()}

    algorithm, sent = branches(0.3, 3), {f"c{k}": upload(k) for k in range(5)}
    uploads = [Upload(Visit(c, 1.0, round=1), tree) for c, tree in sent.items()]
    state = algorithm.server.update(algorithm.init(initial), uploads, 1)
    down = algorithm.send(state, Visit("c1", 1.0))
    assert down.keys() == initial.keys()
    for n in names:
        mates = ("c1", "c3") if n in order[3] else sent
        assert torch.allclose(down[n], sum(sent[c][n] for c in mates) / len(mates), atol=1e-5)
    everyone = algorithm.send(state, Visit("new", 1.0))
    assert close(everyone, {n: sum(t[n] for t in sent.values()) / 5 for n in names}, atol=1e-5)
