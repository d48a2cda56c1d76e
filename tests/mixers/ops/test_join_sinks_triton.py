"""The kernels that join attention sinks against their reference in fp64: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixers import BackendError
from mixers.ops import join_sinks, triton_support
from tests.helpers import assert_close

pytestmark = pytest.mark.skipif(
    triton_support.unavailable() is not None, reason="no Triton, or nowhere to run it"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = ("y", "dq", "dy", "dlse", "dk", "dv")


def inputs(
    batch: int, length: int, heads: int, groups: int, width: int, sinks: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Tensors of which q and y have other strides than their shape's, and which sinks are hidden."""
    torch.manual_seed(0)
    q, y = torch.randn(2, batch, heads, length, width, device=DEVICE).to(dtype).transpose(2, 3)
    lse = 2 * torch.randn(batch, length, heads, device=DEVICE)
    k, v = torch.randn(2, batch, 1, sinks, groups, width, device=DEVICE).to(dtype)
    hidden = torch.rand(batch, length, sinks, device=DEVICE) < 0.4
    nothing = torch.rand(batch, length, device=DEVICE) < 0.1
    hidden |= nothing[..., None]
    lse = lse.masked_fill(nothing[..., None], float("-inf"))
    return [q, y.masked_fill(nothing[..., None, None], 0), lse, k, v], hidden


def differentiated(backend: str, tensors: list[Tensor], hidden: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    made = join_sinks(*leaves, hidden, scale=0.3, backend=backend)
    weigh = torch.cos(torch.arange(made.numel(), device=DEVICE, dtype=torch.float64)).view(made.shape)
    return [made.detach(), *torch.autograd.grad(made, leaves, weigh.to(made))]


def check(
    batch: int,
    length: int,
    heads: int,
    groups: int,
    width: int,
    sinks: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    tensors, hidden = inputs(batch, length, heads, groups, width, sinks, dtype)
    found = differentiated("triton", tensors, hidden)
    expected = differentiated("reference", [t.double() for t in tensors], hidden)
    for name, a, b in zip(NAMES, expected, found):
        assert b.dtype == (torch.float32 if name == "dlse" else dtype)
        assert_close(name, a, b, tolerance)


@settings(max_examples=8)
@given(length=st.integers(1, 90), width=st.sampled_from([8, 24, 64]), sinks=st.sampled_from([1, 4, 16]))
def test_kernels_equal_the_reference(length: int, width: int, sinks: int) -> None:
    check(2, length, 6, 3, width, sinks, torch.float32, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype) -> None:
    rounded = dtype == torch.bfloat16 and triton_support.interpreting()
    check(1, 33, 4, 2, 32, 4, dtype, 2e-2 if rounded else TOLERANCE[dtype])


def test_kernels_leave_the_rest_to_the_reference() -> None:
    tensors, hidden = inputs(1, 3, 2, 1, 8, 2, torch.float32)
    with pytest.raises(BackendError, match="soft-cap"):
        join_sinks(*tensors, hidden, scale=1.0, softcap=3.0, backend="triton")
    each = [t.expand(-1, 3, -1, -1, -1) for t in tensors[3:]]
    with pytest.raises(BackendError, match="each has its own"):
        join_sinks(*tensors[:3], *each, hidden, scale=1.0, backend="triton")


def test_compiles_without_a_break() -> None:
    tensors, hidden = inputs(1, 7, 2, 1, 8, 2, torch.float32)
    leaves = [t.detach().requires_grad_() for t in tensors]

    def run(*leaves: Tensor) -> Tensor:
        return join_sinks(leaves[0] * 2, *leaves[1:], hidden, scale=0.3, backend="triton").sin()

    expected = torch.autograd.grad(run(*leaves).sum(), leaves)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    for a, b in zip(expected, found):
        assert_close("gradient", a, b, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "groups", "width"), [(28, 4, 128), (9, 3, 64), (4, 4, 96)])
@pytest.mark.parametrize(("batch", "length"), [(2, 4_099), (34, 333)])
def test_at_size(dtype: torch.dtype, heads: int, groups: int, width: int, batch: int, length: int) -> None:
    check(batch, length, heads, groups, width, 4, dtype, TOLERANCE[dtype])
