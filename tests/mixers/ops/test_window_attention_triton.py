"""The Triton kernels of attention over gather tables against the reference in fp64: values and every gradient."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixers import TokenLayout
from mixers.blocks import Blocks
from mixers.ops import block_attention, triton_support
from tests.helpers import assert_close
from tests.mixers.strategies import Rows, rows
from tests.mixers.zoo import random_rotary

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if not (triton_support.interpreting() or torch.cuda.is_available()):
    pytest.skip("kernels neither run nor are interpreted here", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {FP32: 1e-5, BF16: 1e-2, FP16: 2e-3}
INTERPRETED_TOLERANCE = 2e-2
WIDTHS = [32, 64, 96, 256]
few = settings(max_examples=25 if DEVICE == "cuda" else 3)


def run(
    backend: str,
    tensors: Sequence[Tensor],
    dy: Tensor,
    tables: Sequence[Blocks],
    rotary: tuple[Tensor, Tensor] | None,
    key_valid: Tensor | None = None,
    softcap: float | None = None,
    with_lse: bool = False,
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    options = {"key_valid": key_valid, "rotary": rotary, "softcap": softcap, "with_lse": with_lse}
    y = block_attention(*leaves, tables, scale=0.3, **options, backend=backend)
    if not with_lse:
        return [y, *torch.autograd.grad(y, leaves, dy.to(y))]
    y, lse = y
    share = lse.sigmoid()  # both results are used, as where they are joined with other keys
    return [y, share, *torch.autograd.grad(y * share[..., None].to(y), leaves, dy.to(y))]


def check(
    layout: TokenLayout,
    tables: Sequence[Blocks | None],
    *,
    heads: tuple[int, int] = (4, 2),
    width: int = 8,
    turned: int | None = None,
    history: int = 0,
    dtype: torch.dtype = torch.float32,
    key_valid: Tensor | None = None,
    softcap: float | None = None,
    with_lse: bool = False,
) -> None:
    """Compare the backends on the same rounded inputs, which are views into one projection."""
    present = [t for t in tables if t is not None]
    torch.manual_seed(0)
    turned = width if turned is None else turned
    (h, g), batch, length = heads, layout.batch_size, layout.length
    joint = torch.randn(batch, history + length, h + 2 * g, width, device=DEVICE).to(dtype)
    q, k, v = joint.split([h, g, g], dim=2)
    q = q[:, history:]
    dy = torch.randn(batch, length, h, width, device=DEVICE).to(dtype)
    rotary = None
    if turned:
        cos, sin = random_rotary(batch, length, torch.float64, turned)
        rotary = cos.to(DEVICE, dtype), sin.to(DEVICE, dtype)
    found = run("triton", (q, k, v), dy, present, rotary, key_valid, softcap, with_lse)
    exact = None if rotary is None else (rotary[0].double(), rotary[1].double())
    want = run(
        "reference", (q.double(), k.double(), v.double()), dy, present, exact, key_valid, softcap, with_lse
    )
    tolerance = INTERPRETED_TOLERANCE if DEVICE == "cpu" and dtype != torch.float32 else TOLERANCE[dtype]
    names = ("y", *(["share"] if with_lse else []), "dq", "dk", "dv")
    for name, a, b in zip(names, want, found, strict=True):
        assert b.dtype == (torch.float32 if name == "share" else dtype)
        assert_close(name, a, b, tolerance)


@few
@given(rows=rows(max_batch=1, holes=True), window=st.integers(1, 9), shifted=st.booleans())
def test_both_windows_in_one_call(rows: Rows, window: int, shifted: bool) -> None:
    layout = rows.layout.to(DEVICE)
    check(layout, [layout.windows((2, 2, 3), shifted), layout.recent(window, text_only=True)])


@few
@given(rows=rows(max_batch=2, holes=True), window=st.integers(1, 9))
def test_last_tokens(rows: Rows, window: int) -> None:
    layout = rows.layout.to(DEVICE)
    check(layout, [layout.recent(window, text_only=False)], heads=(2, 1))


@few
@given(rows=rows(max_batch=2, holes=True), window=st.integers(2, 9), data=st.data())
def test_history(rows: Rows, window: int, data: st.DataObject) -> None:
    layout, history = rows.layout.to(DEVICE), window - 1
    earlier = torch.arange(history) >= data.draw(st.integers(0, history))
    key_valid = torch.cat([earlier.expand(rows.shape[0], -1), rows.valid], dim=1).to(DEVICE)
    tables = [
        layout.windows((2, 2, 3), history=history),
        layout.recent(window, text_only=True, history=history),
    ]
    check(layout, tables, heads=(2, 2), history=history, key_valid=key_valid)


@pytest.mark.parametrize(("width", "turned"), [(1, 0), (5, 0), (20, 20), (16, 4), (24, 0), (160, 160)])
def test_widths(width: int, turned: int) -> None:
    layout = TokenLayout.from_grids(14, [[(2, (2, 2, 2))]], device=DEVICE)
    check(layout, [layout.windows((2, 2, 2)), layout.recent(4, text_only=True)], width=width, turned=turned)


@pytest.mark.parametrize("softcap", [0.4, 50.0])
@pytest.mark.parametrize("size", [(2, 2, 2), (4, 4, 5)])
def test_a_soft_cap(softcap: float, size: tuple[int, int, int]) -> None:
    """In windows of one tile, whose backward is one kernel, and of several; beside text and padding."""
    valid = torch.ones(1, 90, dtype=torch.bool, device=DEVICE)
    valid[:, :2] = False
    layout = TokenLayout.from_grids(90, [[(3, (4, 4, 5))]], valid=valid)
    tables = [layout.windows(size), layout.recent(4, text_only=True)]
    check(layout, tables, heads=(2, 1), softcap=softcap, key_valid=valid)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_log_of_the_sum_of_exponents(softcap: float | None, dtype: torch.dtype) -> None:
    """Of windows too, which then go through the kernels of tiles; -inf at padding and where nobody looks."""
    valid = torch.ones(1, 60, dtype=torch.bool, device=DEVICE)
    valid[:, :3] = False
    layout = TokenLayout.from_grids(60, [[(9, (2, 3, 4))]], valid=valid)
    windows = layout.windows((2, 2, 3))
    both = [windows, layout.recent(5, text_only=True)]
    check(layout, both, width=16, softcap=softcap, dtype=dtype, with_lse=True)
    q = torch.randn(1, 60, 2, 8, device=DEVICE)
    for backend in ("triton", "reference"):
        _, lse = block_attention(q, q, q, windows, scale=1.0, with_lse=True, backend=backend)
        assert (lse.isfinite().all(2) == layout.vision).all()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_narrow_types(dtype: torch.dtype) -> None:
    layout = TokenLayout.from_grids(30, [[(3, (2, 3, 4))]], device=DEVICE)
    check(layout, [layout.windows((2, 2, 3)), layout.recent(5, text_only=True)], width=32, dtype=dtype)


@pytest.mark.parametrize("size", [(4, 4, 4), (4, 4, 5), (9, 9, 9)])
def test_windows_of_several_tiles(size: tuple[int, int, int]) -> None:
    layout = TokenLayout.from_grids(180, [[(0, (4, 5, 9))]], device=DEVICE)
    check(layout, [layout.windows(size, True)], heads=(2, 1))


def test_a_long_text_window() -> None:
    layout = TokenLayout.packed([0, 70, 75, 190]).to(DEVICE)
    check(layout, [layout.recent(80, text_only=False)], heads=(2, 1))


def test_no_table_and_no_token() -> None:
    q = torch.randn(1, 3, 2, 4, device=DEVICE)
    assert not block_attention(q, q, q, [], scale=1.0, backend="triton").any()
    layout = TokenLayout.text(0, 3, device=DEVICE)
    assert layout.recent(2, text_only=False) is None


def test_tables_without_a_transpose_are_refused_for_gradients() -> None:
    layout = TokenLayout.text(1, 5, device=DEVICE)
    with torch.no_grad():
        blocks = layout.recent(2, text_only=False)
    assert layout.recent(2, text_only=False) is not blocks
    q = torch.randn(1, 5, 2, 4, device=DEVICE, requires_grad=True)
    found = block_attention(q.detach(), q.detach(), q.detach(), blocks, scale=1.0, backend="triton")
    want = block_attention(q, q, q, blocks, scale=1.0, backend="reference")
    assert_close("y", want, found, 1e-5)
    with pytest.raises(RuntimeError, match="transpose"):
        block_attention(q, q, q, blocks, scale=1.0, backend="triton")


def test_is_a_custom_op_that_compiles_and_recomputes() -> None:
    layout = TokenLayout.from_grids(14, [[(2, (2, 2, 2))]], device=DEVICE)
    tables = [layout.windows((2, 2, 2)), layout.recent(4, text_only=True)]
    cos, sin = (t.to(DEVICE) for t in random_rotary(1, 14))
    q = torch.randn(1, 14, 2, 8, device=DEVICE, requires_grad=True)

    def attend(q: Tensor) -> Tensor:
        return block_attention(q, q, q, tables, scale=0.3, rotary=(cos, sin), backend="triton")

    def step(q: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(attend, q, use_reentrant=False).square()

    (want,) = torch.autograd.grad(attend(q).square().sum(), q)
    (recomputed,) = torch.autograd.grad(step(q).sum(), q)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(q).square().sum(), q)
    assert torch.equal(want, recomputed)
    assert_close("gradient", want, found, 1e-6)


def test_autocast() -> None:
    """Norms leave q and k in fp32 there while v is narrow; the op runs in the narrow type and returns q's."""
    layout = TokenLayout.from_grids(14, [[(2, (2, 2, 2))]], device=DEVICE)
    blocks = layout.windows((2, 2, 2))
    q = torch.randn(1, 14, 2, 16, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, dtype=BF16):
        y = block_attention(q, q, q.to(BF16), blocks, scale=0.3, backend="triton")
    assert y.dtype == FP32
    assert_close(
        "y", block_attention(q, q, q, blocks, scale=0.3, backend="reference"), y, INTERPRETED_TOLERANCE
    )
    (gradient,) = torch.autograd.grad(y.sum(), q)
    assert gradient.isfinite().all()


def test_equal_runs_give_equal_bits() -> None:
    layout = TokenLayout.from_grids(40, [[(2, (3, 3, 3))]], device=DEVICE)
    tables = [layout.windows((2, 2, 2), True), layout.recent(6, text_only=True)]
    q, dy = torch.randn(1, 40, 2, 8, device=DEVICE), torch.randn(1, 40, 2, 8, device=DEVICE)
    first, second = (run("triton", (q, q, q), dy, tables, None) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "width", "size", "shifted"),
    [
        *((BF16, 128, size, True) for size in [(2, 2, 2), (4, 4, 4), (4, 4, 8), (3, 5, 7), (8, 8, 8)]),
        *((BF16, width, (4, 4, 4), False) for width in WIDTHS),
        (FP16, 128, (4, 4, 4), False),
        (FP32, 128, (4, 4, 4), True),
        (FP32, 64, (2, 4, 4), True),
        (FP32, 256, (8, 8, 8), False),
    ],
)
def test_on_the_chip_windows(
    dtype: torch.dtype, width: int, size: tuple[int, int, int], shifted: bool
) -> None:
    layout = TokenLayout.from_grids(
        2000, [[(9, (5, 13, 21)), (1500, (4, 8, 8))], [(100, (12, 12, 12))]], device="cuda"
    )
    check(layout, [layout.windows(size, shifted)], heads=(14, 2), width=width, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "width", "window"),
    [
        *((BF16, 128, window) for window in [1, 17, 128, 700]),
        *((BF16, width, 128) for width in WIDTHS),
        (FP16, 128, 128),
        (FP32, 128, 128),
    ],
)
def test_on_the_chip_last_tokens(dtype: torch.dtype, width: int, window: int) -> None:
    sequence = (torch.arange(2000, device="cuda") // 600).expand(2, -1)
    valid = torch.rand(2, 2000, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) > 0.1
    layout = TokenLayout(2, 2000, valid=valid, sequence=sequence)
    check(layout, [layout.recent(window, text_only=False)], heads=(14, 2), width=width, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_on_the_chip_video_with_text_and_history(dtype: torch.dtype) -> None:
    layout = TokenLayout.from_grids(9000, [[(300, (8, 32, 32))]], device="cuda")
    tables = [
        layout.windows((4, 4, 4), True, history=127),
        layout.recent(128, text_only=True, history=127),
    ]
    key_valid = torch.ones(1, 9127, dtype=torch.bool, device="cuda")
    key_valid[:, :40] = False
    check(layout, tables, heads=(28, 4), width=128, history=127, dtype=dtype, key_valid=key_valid)


@pytest.mark.gpu
@pytest.mark.parametrize("frames", [128, 1024])
def test_on_the_chip_a_million_tokens(frames: int) -> None:
    """Beyond 2³¹ elements: windows far from the start equal those of a short clip of the same tokens."""
    length, heads = frames * 1024, 28
    layout = TokenLayout.from_grids(length, [[(0, (frames, 32, 32))]], device="cuda")
    q = torch.randn(1, length, heads, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, length, 4, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y = block_attention(q, k, v, layout.windows((4, 4, 4)), scale=0.1, backend="triton")
    part = slice(length - 4096, None)
    short = TokenLayout.from_grids(4096, [[(0, (4, 32, 32))]], device="cuda")
    want = block_attention(
        *(t[:, part].double() for t in (q, k, v)), short.windows((4, 4, 4)), scale=0.1, backend="reference"
    )
    assert_close("y", want, y[:, part], TOLERANCE[BF16])
