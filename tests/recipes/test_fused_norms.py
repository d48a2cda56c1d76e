"""Fused norms give what the norms gave, where these are plain, and are gone behind the block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from recipes.fused_norms import fused_norms
from tests.helpers import assert_close
from tests.recipes.toys import llama


def drawn(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return norm.requires_grad_(False).apply(lambda m: m.weight.normal_()).requires_grad_(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_values_and_gradients_stay(dtype: torch.dtype, weights: torch.dtype) -> None:
    norm = drawn(LlamaRMSNorm(24, eps=1e-5)).to(weights)
    x = torch.randn(2, 5, 24).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = norm(x)
        with fused_norms(norm):
            found = norm(x)
    assert found.dtype == wanted.dtype
    tolerance = 1e-5 if dtype == weights == torch.float32 else 1e-2
    assert_close("y", wanted, found, tolerance)
    for a, b in zip(*(torch.autograd.grad(y.float().sin().sum(), (x, norm.weight)) for y in (wanted, found))):
        assert_close("gradient", a, b, tolerance)


def test_another_kind_of_norm_is_left_alone() -> None:
    norm = drawn(GemmaRMSNorm(24))
    with fused_norms(norm):
        assert "forward" not in vars(norm)


def test_behind_the_block_a_model_is_as_before() -> None:
    model = llama()
    ids = torch.arange(12).view(2, 6)
    before = model(ids).logits
    fused = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
    with fused_norms(model, model):
        assert all("forward" in vars(module) for module in fused)
        assert_close("logits", before, model(ids).logits, 1e-5)
    assert not any("forward" in vars(module) for module in fused)
    assert torch.equal(before, model(ids).logits)
    assert torch.equal(before, copy.deepcopy(model)(ids).logits)
