"""The factors of many clients in a few tensors."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fedvlm
import smallest
from fedvlm.engines.stacked import Session, clip, make_optimizer
from fedvlm.models.lora import handles
from fedvlm.models.runs import Runs
from fedvlm.models.stack import Stack, whole
from fedvlm.rounds.prepare import prepare
from fedvlm.settings.train import TrainConfig

SIZES = {"q": (6, 5), "k": (4, 5), "o": (6, 6), "p": (6, 6)}
BESIDE = [("q.lora_A", "k.lora_A")]
CPU = torch.device("cpu")


def adapters(clients):
    shapes = {}
    for name, (out, into) in SIZES.items():
        shapes |= {f"{name}.lora_A": (2, into), f"{name}.lora_B": (out, 2)}
    return [{n: torch.randn(s) for n, s in shapes.items()} for _ in range(clients)]


def loaded(trees, trains=None, beside=BESIDE):
    runs = Runs()
    runs.load(trees, dict.fromkeys(trees[0], CPU), trains, beside)
    return runs


@pytest.mark.parametrize("beside", [BESIDE, []])
def test_runs_give_back_the_adapters_they_got(beside):
    trees = adapters(3)
    runs = loaded(trees, beside=beside)
    assert len(runs.all_trained) < len(trees[0])
    for tree, found in zip(trees, runs.trees(), strict=True):
        assert list(found) == list(tree)
        assert all(torch.equal(t, found[n]) and found[n].is_contiguous() for n, t in tree.items())
    for name, place in runs.places.items():
        assert torch.equal(place.of(place.run.detach()), torch.stack([t[name] for t in trees]))


def test_only_factors_that_are_all_trained_or_all_not_share_a_piece():
    runs = loaded(adapters(2), lambda name: name != "k.lora_A")
    assert "k.lora_A" not in runs.trained
    assert runs.places["q.lora_A"].run is not runs.places["k.lora_A"].run
    assert not runs.places["k.lora_A"].run.requires_grad
    together = loaded(adapters(2), lambda name: "lora_A" in name).places
    assert together["q.lora_A"].run is together["k.lora_A"].run


def test_runs_stay_the_same_objects_for_adapters_of_the_same_form():
    runs, others = loaded(adapters(2)), adapters(2)
    before = runs.all_trained
    assert not runs.load(others, dict.fromkeys(others[0], CPU), beside=BESIDE)
    assert all(a is b for a, b in zip(before, runs.all_trained, strict=True))
    assert torch.equal(runs.trees()[1]["o.lora_B"], others[1]["o.lora_B"])
    assert runs.load(adapters(3), dict.fromkeys(others[0], CPU), beside=BESIDE)


def test_each_client_is_clipped_by_its_own_norm():
    runs = loaded(adapters(3))
    for run in runs.all_trained:
        run.grad.copy_(torch.randn(run.shape) * torch.tensor([0.01, 1.0, 5.0]).view(-1, 1, 1))
    expected = []
    for client in range(3):
        alone = [torch.zeros(p.grad[client].shape) for p in runs.trained.values()]
        for own, place in zip(alone, runs.trained.values(), strict=True):
            own.grad = place.grad[client].clone()
        torch.nn.utils.clip_grad_norm_(alone, 1.0)
        expected.append([own.grad for own in alone])
    clip(runs.all_trained, 1.0)
    for client, grads in enumerate(expected):
        for place, grad in zip(runs.trained.values(), grads, strict=True):
            assert torch.allclose(place.grad[client], grad, atol=1e-7)


def test_a_resumed_optimizer_has_each_clients_moments_wherever_they_lie():
    def session(runs):
        optimizer = make_optimizer(runs.of_factor(), TrainConfig(), 1.0)
        return Session(optimizer, runs.trained, runs.clients)

    runs = loaded(adapters(3))
    before = session(runs)
    for run in runs.all_trained:
        run.grad.normal_()
    before.optimizer.step()
    fresh = session(loaded(runs.trees()[1:], beside=()))
    after = before.resumed(fresh, [1, 2], 1)
    assert after is fresh
    for name, place in fresh.trained.items():
        old = runs.trained[name]
        for key in ("exp_avg", "exp_avg_sq"):
            theirs, ours = before.optimizer.state[old.run], after.optimizer.state[place.run]
            assert torch.equal(place.of(ours[key]), old.of(theirs[key])[1:])
            assert int(ours["step"]) == 1
    assert before.resumed(session(runs), [0, 1, 2], 1) is before


def test_layers_that_read_one_tensor_are_found(tmp_path):
    settings = {
        "output": str(tmp_path / "run"),
        "model": {"name": smallest.model()},
        "data": {"scenes": {"sites": 2, "rows": 8}},
        "partition": {"min_rows": 4},
    }
    stack = prepare(fedvlm.load_config(settings))[0].stack
    found = {tuple(name.rpartition(".")[2] for name in group) for group in stack._beside}
    assert {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")} <= found
    q = next(
        layer
        for name, layer in stack.layers.items()
        if name.endswith("text_model.layers.0.self_attn.q_proj")
    )
    assert q.beside is not None


class Two(torch.nn.Module):
    """Two layers, which read one tensor or two."""

    def __init__(self):
        super().__init__()
        self.q, self.k = torch.nn.Linear(5, 6), torch.nn.Linear(5, 4)

    def forward(self, x, change=lambda x: x):
        return self.q(x), self.k(change(x))


def two():
    """Two layers with the factors of two clients, the layers found to be neighbours."""
    model = get_peft_model(Two(), LoraConfig(r=2, lora_alpha=6, target_modules=["q", "k"]))
    tree = {n: p.detach().clone() for n, p in sorted(handles(model).items())}
    trees = [{n: torch.randn(t.shape) for n, t in tree.items()} for _ in range(2)]
    stack = Stack(model.requires_grad_(False))
    x = torch.randn(4, 3, 5)
    for watched in (False, True):
        stack.load(trees, CPU)
        stack.activate([0, 1])
        stack.batch(4, 1, lambda: True)
        if not watched:
            with stack.watching():
                model(x)
    return model, stack, trees, x


def test_whole_weights_and_thin_products_are_alike(monkeypatch):
    torch.manual_seed(0)
    model, stack, _, x = two()
    found = {}
    for inputs in (x, x.clone().requires_grad_()):
        for shared in (-1_000_000, 1_000_000):
            monkeypatch.setattr("fedvlm.models.stack.SHARED", shared)
            whole.cache_clear()
            assert whole(((6, 5), (4, 5)), 2, 12, 2) is (shared < 0)
            stack.runs.zero_grad()
            inputs.grad = None
            q, k = model(inputs)
            (q.square().sum() + k.sum()).backward()
            grads = [run.grad.clone() for run in stack.runs.all_trained]
            found[shared] = [q, k, *grads, *([inputs.grad] if inputs.requires_grad else [])]
        whole.cache_clear()
        for one, other in zip(*found.values(), strict=True):
            assert one.abs().max() > 0
            assert torch.allclose(one, other, atol=1e-4)


def test_a_backward_pass_refuses_a_second_derivative():
    model, _, _, x = two()
    inputs = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(inputs)[0].square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_layer_that_reads_another_tensor_than_its_neighbour_is_computed_with_it():
    model, stack, trees, x = two()

    def expected(name, x):
        layer, head = stack.layers[f"base_model.model.{name}"], f"base_model.model.{name}"
        a, b = (torch.stack([t[f"{head}.lora_{f}.weight"] for t in trees]) for f in "AB")
        rows = x.view(2, -1, 5)
        return (rows @ layer.weight.T + 3 * rows @ a.mT @ b.mT).view(
            4, 3, -1
        ) + layer.base_layer.bias

    def changed(x):
        return x.add_(1.0)

    assert stack.layers["base_model.model.q"].beside is stack.layers["base_model.model.k"].beside
    for change in (lambda x: x, lambda x: 2 * x, changed):
        own = x.clone()
        q, k = model(own, change)
        assert torch.allclose(q, expected("q", x), atol=1e-5)
        assert torch.allclose(k, expected("k", change(x.clone())), atol=1e-5)
