"""Norms in fewer operations: the same values and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fedvlm.models.norms import shorten


def norm(kind, dtype):
    torch.manual_seed(0)
    module = kind(48).to(dtype).requires_grad_(False)
    module.weight += torch.rand(48, dtype=torch.float64).to(dtype)
    return module


def passed(module, dtype):
    torch.manual_seed(1)
    x = (3 * torch.randn(5, 7, 48)).to(dtype).requires_grad_()
    y = module(x)
    y.backward(torch.randn(y.shape).to(dtype))
    return y.detach(), x.grad


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)])
def test_a_shorter_norm_has_the_same_values_and_gradients(dtype, most):
    module = norm(LlamaRMSNorm, dtype)
    theirs = passed(module, dtype)
    assert shorten(torch.nn.ModuleList([module])) == 1
    for own, other in zip(passed(module, dtype), theirs, strict=True):
        assert own.dtype == other.dtype
        assert (own - other).abs().max() <= most * other.abs().max()
    x = torch.randn(3, 48).to(dtype)
    assert torch.equal(module(x), norm(LlamaRMSNorm, dtype)(x)), "without gradients: its own pass"


def test_other_norms_are_left_alone():
    trained = norm(LlamaRMSNorm, torch.float32).requires_grad_(True)
    others = [norm(GemmaRMSNorm, torch.float32), norm(LlamaRMSNorm, torch.float64), trained]
    assert shorten(torch.nn.ModuleList(others)) == 0
    assert not any("forward" in vars(module) for module in others)


def test_a_norm_of_the_same_name_that_computes_another_function_is_left_alone():
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 0.01

    assert shorten(torch.nn.ModuleList([norm(OddRMSNorm, torch.float32)])) == 0
