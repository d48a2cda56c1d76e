"""The SSD reference against the dense sums, and the one-token step against the scan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixers import ROTARY_MAJOR_SCAN, ShapeError, TokenLayout
from mixers.ops import feature_map, ssd, ssd_step
from mixers.ops.ssd import reference
from tests.helpers import assert_close
from tests.mixers.oracles import dense_ssd
from tests.mixers.strategies import Rows, rows

K, P = 3, 2
HEADS = [(4, 2), (28, 4), (16, 2), (9, 3), (3, 3)]


def draw_inputs(
    rows: Rows, heads: tuple[int, int], per_head: bool, *, positive: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*rows.shape, *shape, generator=generator, dtype=torch.float64)

    h, g = heads
    e = h if per_head else g
    c, b, x = normal(h, K), normal(g, K), normal(g, P)
    if positive:
        c, b = c.exp(), b.exp()
    decays = [(-normal(e).exp(), normal(e).exp()) for _ in range(2)]
    return c, b, x, decays[0], decays[1]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNKS_PER_BLOCK", 2)


@pytest.mark.parametrize("per_head", [False, True], ids=["kv_head", "head"])
@pytest.mark.parametrize("denominator", [False, True], ids=["sum", "mean"])
@given(
    rows=rows(holes=True),
    heads=st.sampled_from(HEADS),
    axes=st.sampled_from(ROTARY_MAJOR_SCAN),
    both=st.booleans(),
    chunk_size=st.sampled_from([1, 2, 3, 5, 8, 64]),
    blocks=st.sampled_from([1, 2, 32]),
    start=st.booleans(),
)
def test_forward_equals_the_dense_sums(
    per_head: bool,
    denominator: bool,
    rows: Rows,
    heads: tuple[int, int],
    axes: str,
    both: bool,
    chunk_size: int,
    blocks: int,
    start: bool,
) -> None:
    c, b, x, forward, backward = draw_inputs(rows, heads, per_head, positive=denominator, seed=0)
    states = (rows.shape[0], forward[0].shape[-1], K, P + denominator)
    initial = torch.rand(states, dtype=torch.float64) if start else None
    options = {"denominator": denominator, "initial_state": initial}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNKS_PER_BLOCK", blocks)
        y, state = ssd(
            c,
            b,
            x,
            forward,
            backward if both else None,
            scan=rows.layout.scan(axes),
            chunk_size=chunk_size,
            **options,
        )
    want, want_state = dense_ssd(c, b, x, forward, backward if both else None, rows, axes, **options)
    assert_close("y", want[rows.valid], y[rows.valid], 1e-10)
    assert_close("state", want_state, state, 1e-10)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("per_head", [False, True], ids=["kv_head", "head"])
@given(
    rows=rows(max_batch=2, holes=True),
    axes=st.sampled_from(ROTARY_MAJOR_SCAN),
    chunk_size=st.sampled_from([1, 3, 8, 64]),
    blocks=st.sampled_from([1, 32]),
    denominator=st.booleans(),
)
def test_gradients_equal_those_of_the_dense_sums(
    per_head: bool, rows: Rows, axes: str, chunk_size: int, blocks: int, denominator: bool
) -> None:
    c, b, x, forward, backward = draw_inputs(rows, (4, 2), per_head, positive=denominator, seed=1)
    initial = torch.rand(rows.shape[0], forward[0].shape[-1], K, P + denominator, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (c, b, x, *forward, *backward, initial)]
    weigh = torch.randn_like(c[..., :P]) * rows.valid[..., None, None]
    weigh_state = torch.randn_like(initial)
    options = {"denominator": denominator, "initial_state": initial}

    def gradients(y: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        loss = (y * weigh).sum() + (state * weigh_state).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNKS_PER_BLOCK", blocks)
        found = gradients(
            *ssd(c, b, x, forward, backward, scan=rows.layout.scan(axes), chunk_size=chunk_size, **options)
        )
    expected = gradients(*dense_ssd(c, b, x, forward, backward, rows, axes, **options))
    for name, want, grad in zip(("c", "b", "x", "log_a", "dt", "log_a'", "dt'", "state"), expected, found):
        assert_close(f"gradient of {name}", want, grad, 1e-9)


@pytest.mark.parametrize("per_head", [False, True], ids=["kv_head", "head"])
@pytest.mark.parametrize("denominator", [False, True], ids=["sum", "mean"])
def test_gradcheck(per_head: bool, denominator: bool, small_blocks: None) -> None:
    clip = torch.tensor([[-1, -1, 0, 0, -1, 0, 0, 1, -1]])
    coords = torch.zeros(1, 9, 3, dtype=torch.long)
    coords[0, [2, 3, 5, 6]] = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]])
    valid = torch.ones(1, 9, dtype=torch.bool)
    valid[0, 0] = False
    tables = Rows(valid, torch.zeros_like(clip), clip, coords)
    c, b, x, forward, backward = draw_inputs(tables, (2, 1), per_head, positive=denominator, seed=2)
    initial = torch.rand(1, 2 if per_head else 1, K, P + denominator, dtype=torch.float64)

    def run(*t: Tensor) -> tuple[Tensor, Tensor]:
        y, state = ssd(
            t[0],
            t[1],
            t[2],
            (t[3], t[4]),
            (t[5], t[6]),
            scan=tables.layout.scan("hwt"),
            denominator=denominator,
            initial_state=t[7],
            chunk_size=2,
        )
        return y[tables.valid], state

    leaves = [t.requires_grad_() for t in (c, b, x, *forward, *backward, initial)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("denominator", [False, True], ids=["sum", "mean"])
def test_step_equals_scan(heads: tuple[int, int], denominator: bool) -> None:
    length = 11
    text = Rows(*(f((2, length)) for f in (torch.ones, torch.zeros, torch.ones, torch.zeros)))
    for per_head in (False, True):
        c, b, x, decay, _ = draw_inputs(text, heads, per_head, positive=denominator, seed=3)
        initial = torch.rand(2, decay[0].shape[-1], K, P + denominator, dtype=torch.float64)
        y, last = ssd(c, b, x, decay, denominator=denominator, initial_state=initial, chunk_size=4)
        state = initial.clone()
        for t in range(length):
            now = ssd_step(
                c[:, t], b[:, t], x[:, t], (decay[0][:, t], decay[1][:, t]), state, denominator=denominator
            )
            assert_close(f"step {t}", y[:, t], now, 1e-12)
        assert_close("state", last, state, 1e-12)


@pytest.mark.parametrize("chunk_size", [4, 64])
def test_strides_do_not_matter(chunk_size: int, small_blocks: None) -> None:
    """Transposed and expanded inputs, values and gradients."""
    layout = TokenLayout.from_grids(20, [[(3, (2, 2, 3))], [(0, (3, 3, 2))]])
    torch.manual_seed(0)
    c, b, x = (torch.randn(2, h, 20, 4, dtype=torch.float64).transpose(1, 2) for h in (4, 2, 2))
    log_a = torch.full((1, 1, 2), -0.3, dtype=torch.float64).expand(2, 20, 2)
    weigh = torch.randn(2, 4, 20, 4, dtype=torch.float64).transpose(1, 2)

    def run(*inputs: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        c, b, x, log_a, dt = leaves
        y, _ = ssd(c, b, x, (log_a, dt), (log_a, dt), scan=layout.scan("wht"), chunk_size=chunk_size)
        return [y, *torch.autograd.grad((y * weigh).sum(), leaves)]

    strided = (c, b, x, log_a, -log_a)
    for found, want in zip(run(*strided), run(*(t.contiguous() for t in strided))):
        assert torch.equal(found, want)


@given(rows=rows(max_batch=2, holes=True), heads=st.sampled_from(HEADS), start=st.booleans())
def test_maps_make_features_first(rows: Rows, heads: tuple[int, int], start: bool) -> None:
    c, b, x, forward, backward = draw_inputs(rows, heads, False, positive=False, seed=6)
    maps = tuple(torch.randn(count, K, 5, dtype=torch.float64) for count in heads)
    initial = torch.rand(rows.shape[0], heads[1], 10, P + 1, dtype=torch.float64) if start else None
    options = {"scan": rows.layout.scan("wht"), "denominator": True, "initial_state": initial}
    found = ssd(c, b, x, forward, backward, maps=maps, **options)
    want = ssd(feature_map(c, maps[0]), feature_map(b, maps[1]), x, forward, backward, **options)
    assert all(map(torch.equal, found, want))


def test_initial_state_is_left_alone() -> None:
    text = Rows(*(f((1, 5)) for f in (torch.ones, torch.zeros, torch.ones, torch.zeros)))
    c, b, x, decay, _ = draw_inputs(text, (2, 1), False, positive=False, seed=4)
    initial = torch.rand(1, 1, K, P, dtype=torch.float64)
    before = initial.clone()
    ssd(c, b, x, decay, initial_state=initial)
    assert torch.equal(initial, before)


def test_no_tokens_return_the_state() -> None:
    empty = Rows(*(f((2, 0)) for f in (torch.ones, torch.zeros, torch.ones, torch.zeros)))
    c, b, x, forward, backward = draw_inputs(empty, (2, 1), False, positive=False, seed=5)
    initial = torch.rand(2, 1, K, P, dtype=torch.float64)
    y, state = ssd(c, b, x, forward, backward, initial_state=initial)
    assert y.shape == (2, 0, 2, P)
    assert torch.equal(state, initial)


def test_strong_decay_neither_overflows_nor_poisons_gradients() -> None:
    tables = TokenLayout.from_grids(40, [[(3, (2, 4, 4))]])
    c, b, x = (torch.randn(1, 40, 2, 4, requires_grad=True) for _ in range(3))
    log_a = torch.full((1, 40, 2), -80.0, requires_grad=True)
    dt = torch.full((1, 40, 2), 3.0, requires_grad=True)
    y, _ = ssd(c, b, x, (log_a, dt), (log_a, dt), scan=tables.scan(), chunk_size=16)
    grads = torch.autograd.grad(y.square().sum(), (c, b, x, log_a, dt))
    assert all(torch.isfinite(t).all() for t in (y, *grads))
    own = 3.0 * torch.einsum("bnhk,bnhk->bnh", c, b)[..., None] * x
    assert_close("only the token itself is left", own, y, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_summed_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    c, b, x = (torch.rand(1, 3000, 2, 4).to(dtype) for _ in range(3))
    log_a, dt = torch.full((1, 3000, 2), -1e-3), torch.full((1, 3000, 2), 0.1)
    y, state = ssd(c, b, x, (log_a, dt))
    want, want_state = ssd(c.double(), b.double(), x.double(), (log_a.double(), dt.double()))
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert_close("y", want, y, 4e-3)
    assert_close("state", want_state, state, 1e-5)


def test_sums_stay_in_fp32_under_autocast(small_blocks: None) -> None:
    torch.manual_seed(0)
    layout = TokenLayout.from_grids(300, [[(20, (4, 8, 8))]])
    c, b, x = (torch.randn(1, 300, 2, 8) for _ in range(3))
    decays = [(torch.full((1, 300, 2), -1e-2), torch.full((1, 300, 2), 0.1)) for _ in range(2)]

    def run(autocast: bool) -> tuple[Tensor, ...]:
        leaf = c.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y, state = ssd(leaf, b, x, *decays, scan=layout.scan("hwt"))
            now = (c[:, 0], b[:, 0], x[:, 0], (decays[0][0][:, 0], decays[0][1][:, 0]))
            step = ssd_step(*now, state.detach().clone())
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
        return y, state, step, gradient

    for name, want, found in zip(("y", "state", "step", "gradient"), run(False), run(True)):
        assert_close(name, want, found, 1e-6)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("heads do not divide", {"c": (1, 5, 3, 4)}),
        ("keys of another width", {"b": (1, 5, 2, 3)}),
        ("values of other heads", {"x": (1, 5, 4, 4)}),
        ("values of another length", {"x": (1, 6, 2, 4)}),
        ("decay per something else", {"decay": (1, 5, 3)}),
        ("decay of another length", {"decay": (1, 4, 2)}),
        ("backward decay unlike forward", {"backward": (1, 5, 4)}),
        ("state of another width", {"state": (1, 2, 4, 5)}),
        ("state of another batch", {"state": (2, 2, 4, 4)}),
        ("state of other heads", {"state": (1, 4, 4, 4)}),
    ],
)
def test_wrong_shapes(name: str, change: dict[str, tuple[int, ...]]) -> None:
    shapes = {
        "c": (1, 5, 4, 4),
        "b": (1, 5, 2, 4),
        "x": (1, 5, 2, 4),
        "decay": (1, 5, 2),
        "backward": (1, 5, 2),
        "state": (1, 2, 4, 4),
    }
    t = {key: torch.zeros(shape) for key, shape in {**shapes, **change}.items()}
    with pytest.raises(ShapeError):
        ssd(
            t["c"],
            t["b"],
            t["x"],
            (t["decay"], t["decay"]),
            (t["backward"], t["backward"]),
            initial_state=t["state"],
        )
