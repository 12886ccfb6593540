"""The equation of each baseline of 2024 and later, on clients whose loss is a formula."""

from __future__ import annotations

import torch

from fedvlm import simulate
from fedvlm.algorithms.residual import corrected
from fedvlm.tree import products
from test_library_ranks import mean_product
from toy import FEDAVG, INITIAL, A, B, clients, close


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
