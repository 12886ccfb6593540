"""Fast paths over many small tensors: each gives what one tensor after another gives."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save

from fedvlm.algorithms.mixing import blend
from fedvlm.batches.draw import Length, batches
from fedvlm.engines.wire import Origin, norm
from fedvlm.store.files import save_tree
from fedvlm.tree import LONG, SMALL, Mean, change, factor, grouped

SHAPES = [(2, 32), (64, 2), (), (0, 3), (SMALL + 1,), *[(SMALL,)] * (LONG // SMALL + 1)]


def tree(seed, shapes=SHAPES, kind=torch.float32):
    torch.manual_seed(seed)
    return {f"layer.{n}.lora_{'AB'[n % 2]}": torch.randn(s).to(kind) for n, s in enumerate(shapes)}


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mean_is_bit_for_bit_that_of_each_tensor(kind):
    uploads = [tree(seed, kind=kind) for seed in range(3)]
    uploads[1] = dict(reversed(uploads[1].items()))
    mean, weights = Mean(), [3.0, 1.5, 7.0]
    for upload, weight in zip(uploads, weights, strict=True):
        mean.add(upload, weight)
    for name, found in mean.tree().items():
        first, *rest = [upload[name].to(found.dtype) for upload in uploads]
        total = first * weights[0]
        for tensor, weight in zip(rest, weights[1:], strict=True):
            total.add_(tensor, alpha=weight)
        assert torch.equal(found, total / sum(weights))
    with pytest.raises(ValueError, match="shapes"):
        mean.add({name: tensor[..., None] for name, tensor in uploads[0].items()}, 1.0)


def test_vectors_hold_each_tensor_once_and_stay_short():
    whole = tree(0) | {"count": torch.tensor(3)}
    groups = grouped(whole)
    assert sorted(name for names in groups for name in names) == sorted(whole)
    assert max(sum(whole[name].numel() for name in names) for names in groups) <= LONG
    assert len({whole[name].dtype for name in groups[0]}) == 1


def test_a_distance_is_the_norm_of_the_change():
    down, up = tree(0), tree(1) | {"new": torch.ones(3), "choice": torch.tensor(7)}
    up["layer.0.lora_A"] = torch.ones(5, 5)  # another shape than the download's
    found = Origin(down).distance(up)
    assert found == pytest.approx(norm(change(down, up)), rel=1e-6)
    assert found == pytest.approx(
        math.sqrt(sum(float(t.double().square().sum()) for t in change(down, up).values()) - 49)
    )
    for value in (math.nan, math.inf):
        up["layer.1.lora_B"][3, 1] = value
        assert not math.isfinite(Origin(down).distance(up))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_blend_is_that_of_each_factor(share):
    mix, down, mine = {"A": 1.0, "B": share}, tree(0), tree(1)
    del down["layer.0.lora_A"], mine["layer.1.lora_B"]
    for name, found in blend(mix, down, mine).items():
        if name in down and name in mine:
            part = mix[factor(name)]
            assert torch.equal(found, part * down[name] + (1 - part) * mine[name])
        else:
            assert found is (down | mine)[name]


@pytest.mark.parametrize(("rows", "size", "steps"), [(3, 2, 5), (7, 3, 1), (2, 4, 3), (20, 2, 4)])
def test_batches_are_drawn_by_one_generator_for_rows_and_one_for_their_order(rows, size, steps):
    own, lengths = np.arange(100, 100 + rows), {100 + k: (7 * k) % 5 for k in range(rows)}
    order, common, expected = np.random.default_rng(1), np.random.default_rng(2), []
    while len(expected) < steps:
        taken = order.permutation(own)[: (steps - len(expected)) * size]
        taken = taken[np.argsort([lengths[row] for row in taken], kind="stable")]
        cut = [taken[k : k + size] for k in range(0, len(taken), size)]
        expected += [cut[n] for n in common.permutation(len(cut))]
    found = list(batches(own, size, steps, 1, Length(lengths.__getitem__, 2)))
    assert [list(one) for one in found] == [list(one) for one in expected]


@pytest.mark.parametrize("more", [{}, {"half": torch.ones(2, 5).bfloat16()}])
def test_a_saved_tree_has_the_bytes_of_the_library(tmp_path, more):
    whole = tree(0) | {"count": torch.tensor(3), "turned": torch.randn(4, 6).t()} | more
    expected = save({name: tensor.contiguous() for name, tensor in whole.items()})
    assert save_tree(tmp_path / "tree", whole) == expected == (tmp_path / "tree").read_bytes()
