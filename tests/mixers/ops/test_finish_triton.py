"""The kernels that finish a scan against their reference in fp64: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixers.ops import finish, triton_support
from tests.helpers import assert_close

pytestmark = pytest.mark.skipif(
    triton_support.unavailable() is not None, reason="no Triton, or nowhere to run it"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = ("out", "dy", "dv", "dskip", "dnorm_weight", "dgate")


def draw(
    batch: int, length: int, heads: tuple[int, int], width: int, norm: bool, gated: bool, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """Arguments: y is transposed, v and the gate are slices of wider tensors."""
    h, g = heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(dtype)

    return {
        "y": normal(batch, h, length, width).transpose(1, 2),
        "v": normal(batch, length, g, width + 8)[..., 8:],
        "skip": normal(h),
        "norm_weight": normal(h, width) if norm else None,
        "gate": normal(batch, length, h, width + 8)[..., :width] * 2 if gated else None,
    }


def differentiated(backend: str, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in given.items()}
    out = finish(
        leaves["y"], leaves["v"], leaves["skip"], norm_weight=leaves["norm_weight"], gate=leaves["gate"],
        backend=backend,
    )  # fmt: skip
    weigh = torch.cos(torch.arange(out.numel(), device=DEVICE, dtype=torch.float64)).view(out.shape)
    wanted = {k: t for k, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(out, list(wanted.values()), weigh.to(out))
    return {"out": out.detach(), **{f"d{k}": g for k, g in zip(wanted, grads)}}


def check(given: dict[str, Tensor | None], tolerance: float) -> None:
    found = differentiated("triton", given)
    expected = differentiated("reference", {k: None if t is None else t.double() for k, t in given.items()})
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert found[name].dtype == given["y"].dtype
        assert_close(name, want, found[name], tolerance)


@settings(max_examples=10)
@given(
    length=st.integers(1, 70),
    heads=st.sampled_from([(4, 2), (3, 3), (7, 1)]),
    width=st.sampled_from([24, 64]),
    norm=st.booleans(),
    gated=st.booleans(),
)
def test_equals_the_reference(
    length: int, heads: tuple[int, int], width: int, norm: bool, gated: bool
) -> None:
    torch.manual_seed(0)
    check(draw(2, length, heads, width, norm, gated, torch.float32), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rounded = dtype == torch.bfloat16 and triton_support.interpreting()
    check(draw(1, 33, (4, 2), 32, True, True, dtype), 2e-2 if rounded else TOLERANCE[dtype])


def test_gates_far_from_zero() -> None:
    given = draw(1, 4, (2, 1), 8, True, True, torch.float32)
    given["gate"] = torch.linspace(-300, 300, 64, device=DEVICE).view(1, 4, 2, 8)
    check(given, 1e-5)


def test_compiles_without_a_break() -> None:
    given = draw(1, 9, (4, 2), 8, True, True, torch.float32)
    leaf = given["y"].detach().requires_grad_()

    def run(y: Tensor) -> Tensor:
        out = finish(
            y * 2, given["v"], given["skip"], norm_weight=given["norm_weight"], gate=given["gate"],
            backend="triton",
        )  # fmt: skip
        return out.sin()

    (expected,) = torch.autograd.grad(run(leaf).sum(), leaf)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(leaf).sum(), leaf)
    assert_close("dy", expected, found, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("length", "width"), [(4_099, 128), (4_099, 96), (30_000, 64)])
@pytest.mark.parametrize("norm", [False, True])
def test_at_size(dtype: torch.dtype, length: int, width: int, norm: bool) -> None:
    torch.manual_seed(0)
    check(draw(2, length, (28, 4), width, norm, norm, dtype), TOLERANCE[dtype])


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    y = torch.zeros(1, 700_000, 28, 128, dtype=torch.bfloat16, device=DEVICE)
    y[:, -5:] = torch.randn(1, 5, 28, 128, device=DEVICE).bfloat16()
    v, skip = (
        torch.zeros(1, 700_000, 4, 128, dtype=torch.bfloat16, device=DEVICE),
        torch.ones(28, device=DEVICE),
    )
    weight = torch.ones(28, 128, device=DEVICE)
    out = finish(y, v, skip, norm_weight=weight, backend="triton")
    want = finish(y[:, -5:].double(), v[:, -5:].double(), skip.double(), norm_weight=weight.double())
    assert_close("tail", want, out[:, -5:], 1e-2)
    assert not out[:, :-5].any()
