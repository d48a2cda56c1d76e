"""The short convolution's kernels against its reference in fp64: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixers import ROTARY_MAJOR_SCAN, TokenLayout
from mixers.ops import short_conv, triton_support
from tests.helpers import assert_close
from tests.mixers.strategies import Rows, rows

pytestmark = pytest.mark.skipif(
    triton_support.unavailable() is not None, reason="no Triton, or nowhere to run it"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
INTERPRETED_BF16 = 2e-2  # stores are cut off there instead of rounded


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def differentiated(backend: str, layout: TokenLayout, axes: str, inputs: list[Tensor | None]) -> list[Tensor]:
    """y, and the gradients of x, weight and history; y at padding is left out."""
    x, weight, history = (None if t is None else t.detach().requires_grad_() for t in inputs)
    y = short_conv(x, weight, scan=layout.scan(axes), history=history, backend=backend)
    weigh = torch.cos(torch.arange(y.numel(), device=DEVICE, dtype=torch.float64)).view(y.shape)
    leaves = [t for t in (x, weight, history) if t is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, weigh.to(y))]


def check(layout: TokenLayout, axes: str, inputs: list[Tensor | None], tolerance: float) -> None:
    exact = [None if t is None else t.double() for t in inputs]
    expected = differentiated("reference", layout, axes, exact)
    found = differentiated("triton", layout, axes, inputs)
    for name, a, b in zip(("y", "dx", "dweight", "dhistory"), expected, found):
        assert b.dtype == inputs[0].dtype
        assert_close(name, a, b, tolerance)


@settings(max_examples=8)
@given(
    rows=rows(holes=True),
    axes=st.sampled_from(ROTARY_MAJOR_SCAN),
    taps=st.integers(2, 5),
    width=st.sampled_from([3, 20]),
    history=st.booleans(),
)
def test_equals_the_reference(rows: Rows, axes: str, taps: int, width: int, history: bool) -> None:
    torch.manual_seed(0)
    layout = rows.layout.to(DEVICE)
    before = random(rows.shape[0], taps - 1, width) if history else None
    check(layout, axes, [random(*rows.shape, width), random(width, taps), before], 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_longer_than_a_program_takes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layout = TokenLayout.from_grids(300, [[(7, (3, 9, 8))], [(40, (5, 5, 10))]], device=DEVICE)
    inputs = [random(2, 300, 24, dtype=dtype), random(24, 4, dtype=dtype), random(2, 3, 24, dtype=dtype)]
    rounded = dtype == torch.bfloat16 and triton_support.interpreting()
    check(layout, "wht", inputs, INTERPRETED_BF16 if rounded else TOLERANCE[dtype])


@pytest.mark.parametrize("taps", [1, 2, 8])
def test_a_view_of_a_joint_projection(taps: int) -> None:
    torch.manual_seed(0)
    joint = random(2, 40, 64)
    check(TokenLayout.text(2, 40, device=DEVICE), "thw", [joint[..., 16:36], random(20, taps), None], 1e-5)


def test_gradients_of_transposed_and_expanded_outputs() -> None:
    x, weight = random(1, 5, 8).requires_grad_(), random(8, 3)
    (found,) = torch.autograd.grad(short_conv(x, weight, backend="triton").sum(), x)
    (expected,) = torch.autograd.grad(short_conv(x, weight, backend="reference").sum(), x)
    assert_close("dx", expected, found, 1e-6)


def test_no_tokens() -> None:
    x, weight = random(2, 0, 8).requires_grad_(), random(8, 3).requires_grad_()
    y = short_conv(x, weight, backend="triton")
    assert y.shape == x.shape
    _, dweight = torch.autograd.grad(y.sum(), [x, weight])
    assert not dweight.any()


def test_compiles_without_a_break() -> None:
    layout = TokenLayout.from_grids(20, [[(3, (2, 2, 3))]], device=DEVICE)
    x, weight, scan = random(1, 20, 8).requires_grad_(), random(8, 4).requires_grad_(), layout.scan("hwt")

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return short_conv(x * 2, weight, scan=scan, backend="triton").sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(x, weight).sum(), [x, weight])
    found = torch.autograd.grad(compiled(x, weight).sum(), [x, weight])
    for a, b in zip(expected, found):
        assert_close("gradient", a, b, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("length", "width"), [(4_099, 4608), (131_072, 512), (1_000_003, 128)])
def test_at_size(dtype: torch.dtype, length: int, width: int) -> None:
    torch.manual_seed(0)
    clips = [(start, (4, 16, 16)) for start in range(50, length - 1100, 1100)]
    layout = TokenLayout.from_grids(length, [clips]).to(DEVICE)
    inputs = [random(1, length, width, dtype=dtype), random(width, 4, dtype=dtype), None]
    check(layout, "wht", inputs, TOLERANCE[dtype])


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """The last rows of a tensor of more than 2^31 elements are read and written where they stand."""
    x = torch.zeros(1, 1_000_000, 2304, dtype=torch.bfloat16, device=DEVICE)
    x[:, -5:] = random(1, 5, 2304, dtype=torch.bfloat16)
    weight = random(2304, 4, dtype=torch.bfloat16)
    y = short_conv(x, weight, backend="triton")
    assert_close("tail", short_conv(x[:, -8:].double(), weight.double())[:, -5:], y[:, -5:], 1e-2)
    assert not y[:, :-5].any()
