"""The kernels of the weighted sum of branches against its reference in fp64: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixers import BackendError
from mixers.ops import triton_support, weighted_sum
from tests.helpers import assert_close

pytestmark = pytest.mark.skipif(
    triton_support.unavailable() is not None, reason="no Triton, or nowhere to run it"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def differentiated(backend: str, first: Tensor, second: Tensor, weights: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (first, second, weights)]
    parts = [leaves[2][:, :, i, :, None] for i in range(2)]
    y = weighted_sum(leaves[:2], parts, backend=backend)
    weigh = torch.cos(torch.arange(y.numel(), device=DEVICE, dtype=torch.float64)).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaves, weigh.to(y))]


def check(
    batch: int, length: int, heads: int, width: int, per: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    first = torch.randn(batch, heads, length, width, device=DEVICE).to(dtype).transpose(1, 2)
    second = torch.randn(batch, length, heads, width, device=DEVICE).to(dtype)
    weights = torch.rand(batch, length, 2, per, device=DEVICE).to(dtype)
    found = differentiated("triton", first, second, weights)
    expected = differentiated("reference", first.double(), second.double(), weights.double())
    for name, a, b in zip(("y", "dfirst", "dsecond", "dweights"), expected, found):
        assert b.dtype == dtype
        assert_close(name, a, b, tolerance)


@settings(max_examples=8)
@given(length=st.integers(1, 90), width=st.sampled_from([8, 24, 64]), per_head=st.booleans())
def test_kernels_equal_the_reference(length: int, width: int, per_head: bool) -> None:
    check(2, length, 3, width, 3 if per_head else 1, torch.float32, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype) -> None:
    rounded = dtype == torch.bfloat16 and triton_support.interpreting()
    check(1, 33, 4, 32, 1, dtype, 2e-2 if rounded else TOLERANCE[dtype])


def test_kernels_leave_three_branches_to_the_reference() -> None:
    ys, weights = [torch.ones(1, 2, 1, 8, device=DEVICE)] * 3, [torch.ones(1, 2, 1, 1, device=DEVICE)] * 3
    with pytest.raises(BackendError, match="two branches"):
        weighted_sum(ys, weights, backend="triton")


def test_compiles_without_a_break() -> None:
    ys = [torch.randn(1, 7, 2, 8, device=DEVICE, requires_grad=True) for _ in range(2)]
    logits = torch.randn(1, 7, 2, 1, device=DEVICE, requires_grad=True)

    def run(first: Tensor, second: Tensor, logits: Tensor) -> Tensor:
        weights = logits.softmax(2)
        parts = [weights[:, :, i, :, None] for i in range(2)]
        return weighted_sum([first * 2, second], parts, backend="triton").sin()

    expected = torch.autograd.grad(run(*ys, logits).sum(), [*ys, logits])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*ys, logits).sum(), [*ys, logits])
    for a, b in zip(expected, found):
        assert_close("gradient", a, b, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("per", [1, 28])
@pytest.mark.parametrize(("length", "width"), [(4_099, 128), (4_099, 96), (50_000, 32)])
def test_at_size(dtype: torch.dtype, per: int, length: int, width: int) -> None:
    check(2, length, 28, width, per, dtype, TOLERANCE[dtype])
