"""The kernels of the softmax feature map against its reference in fp64: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixers.ops import feature_map, triton_support
from tests.helpers import assert_close

pytestmark = pytest.mark.skipif(
    triton_support.unavailable() is not None, reason="no Triton, or nowhere to run it"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def differentiated(backend: str, x: Tensor, weight: Tensor) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = feature_map(x, weight, backend=backend)
    weigh = torch.cos(torch.arange(y.numel(), device=DEVICE, dtype=torch.float64)).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [x, weight], weigh.to(y))]


def draw(
    batch: int, length: int, heads: int, width: int, dtype: torch.dtype, features: int | None = None
) -> tuple[Tensor, Tensor]:
    """A slice of a wider tensor, and maps not far from the identity; to as many features as the head is wide."""
    torch.manual_seed(0)
    x = torch.randn(batch, length, heads, width + 8, device=DEVICE).to(dtype)[..., 8:]
    noise = torch.randn(heads, width, features or width, device=DEVICE) / width**0.5
    return x, (torch.eye(width, features or width, device=DEVICE) + noise).to(dtype)


def check(x: Tensor, weight: Tensor, tolerance: float) -> None:
    expected = differentiated("reference", x.double(), weight.double())
    found = differentiated("triton", x, weight)
    for name, a, b in zip(("y", "dx", "dweight"), expected, found):
        assert b.dtype == x.dtype
        assert_close(name, a, b, tolerance)


@settings(max_examples=5)
@given(length=st.integers(1, 90), width=st.sampled_from([8, 24]), features=st.sampled_from([6, 24, 40]))
def test_equals_the_reference(length: int, width: int, features: int) -> None:
    check(*draw(2, length, 3, width, torch.float32, features), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype) -> None:
    rounded = dtype == torch.bfloat16 and triton_support.interpreting()
    check(*draw(1, 70, 2, 32, dtype), 2e-2 if rounded else TOLERANCE[dtype])


def test_more_features_than_half_a_state() -> None:
    check(*draw(1, 40, 2, 16, torch.float32, 200), 1e-5)


def test_maps_too_large_for_a_chip_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "shared_memory", lambda device: 99 * 1024)
    unsupported = feature_map.backends["triton"].unsupported
    assert unsupported(*draw(1, 4, 1, 64, torch.float32, 256)) is None
    reason = unsupported(*draw(1, 4, 1, 128, torch.float32, 256))
    assert reason is not None
    assert "from 128 to 256 features" in reason
    assert "101,376" in reason


def test_far_from_zero() -> None:
    x, weight = draw(1, 20, 2, 16, torch.float32)
    check(x * 100, weight, 1e-5)


def test_no_tokens() -> None:
    x, weight = draw(2, 0, 2, 16, torch.float32)
    y, _, dweight = differentiated("triton", x, weight)
    assert y.shape == (2, 0, 2, 32)
    assert not dweight.any()


def test_compiles_without_a_break() -> None:
    x, weight = draw(1, 20, 2, 16, torch.float32)
    leaf = x.detach().requires_grad_()

    def run(x: Tensor) -> Tensor:
        return feature_map(x * 2, weight, backend="triton").sin()

    (expected,) = torch.autograd.grad(run(leaf).sum(), leaf)
    (found,) = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(leaf).sum(), leaf)
    assert_close("dx", expected, found, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [128, 96, 64, 32, 24])
@pytest.mark.parametrize("heads", [4, 28])
def test_at_size(dtype: torch.dtype, width: int, heads: int) -> None:
    check(*draw(2, 5_003, heads, width, dtype), TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("width", "features"), [(64, 128), (128, 64), (32, 128), (24, 40), (64, 256), (128, 200)]
)
def test_features_at_size(dtype: torch.dtype, width: int, features: int) -> None:
    check(*draw(2, 5_003, 9, width, dtype, features), TOLERANCE[dtype])


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """The last rows of an output of more than 2^31 elements are written where they stand."""
    x, weight = draw(1, 350_000, 28, 128, torch.bfloat16)
    y = feature_map(x, weight, backend="triton")
    assert_close("tail", feature_map(x[:, -9:].double(), weight.double()), y[:, -9:], 1e-2)
