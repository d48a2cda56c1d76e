"""The Triton backend of the SSD scan gives what the reference gives in fp64: values, states, every gradient.

Interpreted on small inputs where there is no GPU; on a GPU the same at sizes and in types that matter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixers import ShapeError, TokenLayout
from mixers.layout import Scan
from mixers.ops import ssd, triton_support
from mixers.scan import ROTARY_MAJOR_SCAN
from tests.helpers import assert_close
from tests.mixers.strategies import Rows, rows

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CANCELLING = 3
"""Gradients through a denominator are differences of sums, of which 16 bits keep less."""
few = settings(max_examples=2, phases=[Phase.explicit, Phase.generate])  # shrinking would take minutes

pytestmark = pytest.mark.skipif(
    triton_support.unavailable() is not None, reason="kernels run on a GPU or interpreted"
)


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def small_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut so finely that a few dozen tokens span chunks, segments and tiles."""
    from mixers.ops.ssd.triton import backward, forward
    from mixers.ops.ssd.triton.launch import BackwardCut, ForwardCut, Run, padded

    run = Run(32, 4, 1)

    def forward_cuts(width: int, values: int, *_: object) -> list[ForwardCut]:
        return [ForwardCut(32, padded(width), padded(values), run, rows=16)]

    def backward_cuts(width: int, values: int, *_: object) -> list[BackwardCut]:
        k = padded(width)
        return [BackwardCut(16, k, padded(values), run, run, run, run)]

    monkeypatch.setattr(forward, "forward_cuts", forward_cuts)
    monkeypatch.setattr(backward, "backward_cuts", backward_cuts)
    monkeypatch.setattr(forward, "chunks_of_segment", lambda lines, chunks: 2)


def test_a_cut_that_does_not_fit_is_tried_once() -> None:
    """The next one runs in its place; one that never fits says so."""
    from triton.runtime.errors import OutOfResources

    from mixers.ops.ssd.triton.launch import Cut, first_fitting

    large, small = Cut(128, 64, 64), Cut(32, 64, 64)
    tried = []

    def run(cut: Cut) -> int:
        tried.append(cut)
        if cut == large:
            raise OutOfResources(2, 1, "shared memory")
        return cut.chunk

    for what in ("one kind", "one kind", "another kind"):
        assert first_fitting([large, small], what, run) == 32
    assert tried == [large, small, small, large, small]
    with pytest.raises(OutOfResources):
        first_fitting([large], "one kind", run)


def draw(
    shape: tuple[int, int], heads: tuple[int, int], width: int, values: int, per_head: bool, positive: bool
) -> list[Tensor]:
    """c, b, x, and (log_a, dt) of both directions, fp64; decays from near 0 to near 1."""
    generator = torch.Generator().manual_seed(sum(shape) + width)

    def normal(*tail: int) -> Tensor:
        return torch.randn(*shape, *tail, generator=generator, dtype=torch.float64)

    h, g = heads
    c, b, x = normal(h, width) * width**-0.5, normal(g, width), normal(g, values)
    if positive:
        c, b = c.softmax(-1), b.softmax(-1)
    decays = []
    for _ in range(2):
        log_a, dt = normal(h if per_head else g), normal(h if per_head else g)
        decays += [-(2 * log_a).exp(), dt.exp()]
    return [c, b, x, *decays]


NAMES = ["c", "b", "x", "log_a", "dt", "log_a'", "dt'"]


def compare(
    inputs: list[Tensor],
    scan: Scan,
    valid: Tensor | None,
    *,
    dtype: torch.dtype = torch.float32,
    both: bool = True,
    denominator: bool = False,
    start: bool = False,
    features: int | None = None,
    gradients: bool = True,
) -> None:
    """Run both backends, the reference in fp64 on what the kernel is given, and compare all they return.

    With ``features`` c and b are mapped to as many on the way.
    """
    given_ = {name: t.to(dtype) if name in "cbx" else t.float() for name, t in zip(NAMES, inputs)}
    batch, width, values, states = len(inputs[0]), inputs[1].shape[3], inputs[2].shape[3], inputs[3].shape[2]
    if not both:
        del given_["log_a'"], given_["dt'"]
    if features:
        for name in "cb":
            map_ = torch.randn(
                given_[name].shape[2], width, features, generator=torch.Generator().manual_seed(features)
            )
            given_[f"map of {name}"] = map_.to(dtype)
        width = 2 * features
    if start:
        given_["first state"] = torch.rand(batch, states, width, values + denominator)

    def run(tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        leaves = {name: t.to(DEVICE).requires_grad_(gradients) for name, t in tensors.items()}
        y, last = ssd(
            *(leaves[name] for name in "cbx"),
            (leaves["log_a"], leaves["dt"]),
            (leaves["log_a'"], leaves["dt'"]) if both else None,
            scan=scan,
            denominator=denominator,
            initial_state=leaves.get("first state"),
            maps=(leaves["map of c"], leaves["map of b"]) if features else None,
            backend=backend,
        )
        if valid is not None:
            y = y * valid.to(DEVICE)[..., None, None]
        if not gradients:
            return {"y": y, "state": last}
        weigh = [torch.cos(torch.arange(t.numel(), device=DEVICE)).view(t.shape).to(t) for t in (y, last)]
        loss = (y * weigh[0]).sum() + (last * weigh[1]).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        grads = {n: torch.zeros_like(t) if g is None else g for g, (n, t) in zip(found, leaves.items())}
        return {"y": y, "state": last, **grads}

    expected = run({name: t.double() for name, t in given_.items()}, "reference")
    found = run(given_, "triton")
    half = dtype != torch.float32
    for name, want in expected.items():
        got = found[name]
        cancels = half and denominator and name not in ("y", "state")
        ratio = TOLERANCE[dtype] * (CANCELLING if cancels else 1)
        # Gradients through a mean of a few values are differences of numbers near 1, down to rounding for one.
        if want.double().square().mean().sqrt() < (0.1 if denominator and inputs[0].shape[1] < 64 else 1e-4):
            want, got = want + 1, got + 1
        assert_close(name, want, got, ratio)


@pytest.mark.parametrize("per_head", [False, True], ids=["kv_head", "head"])
@pytest.mark.parametrize("denominator", [False, True], ids=["sum", "mean"])
@few
@given(
    rows=rows(max_batch=2, holes=True),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    axes=st.sampled_from(ROTARY_MAJOR_SCAN),
    both=st.booleans(),
    start=st.booleans(),
)
def test_values_and_gradients(
    per_head: bool, denominator: bool, rows: Rows, heads: tuple[int, int], axes: str, both: bool, start: bool
) -> None:
    inputs = draw(rows.shape, heads, 40, 10, per_head, positive=denominator)
    scan = rows.layout.to(DEVICE).scan(axes)
    compare(inputs, scan, rows.valid, both=both, denominator=denominator, start=start)


LAYOUTS: dict[str, Callable[[int], TokenLayout]] = {
    "text": lambda n: TokenLayout.text(1, n),
    "one clip": lambda n: TokenLayout.from_grids(n, [[(0, (n // 6, 2, 3))]]),
    "tiny clips": lambda n: TokenLayout.from_grids(n, [[(4 * i, (1, 1, 3)) for i in range(n // 4)]]),
    "padded": lambda n: TokenLayout.from_grids(
        n, [[(n // 2, (2, 2, n // 16))]], valid=(torch.arange(n) >= n // 3)[None]
    ),
    "packed": lambda n: TokenLayout.from_grids(
        n, [[(n // 2, (2, 2, n // 16))]], sequence=((torch.arange(n) * 5) // (2 * n))[None]
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_several_chunks_and_segments(kind: str, small_cuts: None) -> None:
    n = 96
    layout = LAYOUTS[kind](n).to(DEVICE)
    inputs = draw((1, n), (2, 1), 20, 17, False, positive=True)
    compare(inputs, layout.scan("wht"), layout.valid, denominator=True, start=True)


@pytest.mark.parametrize("denominator", [False, True], ids=["sum", "mean"])
def test_states_wider_than_a_program_holds(denominator: bool) -> None:
    layout = TokenLayout.from_grids(40, [[(5, (2, 3, 5))]]).to(DEVICE)
    inputs = draw((1, 40), (2, 1), 300, 17, False, positive=denominator)
    compare(inputs, layout.scan("hwt"), None, denominator=denominator, start=True)


@pytest.mark.parametrize("kind", ["one clip", "padded"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("denominator", [False, True], ids=["sum", "mean"])
def test_features_made_on_the_way(
    kind: str, heads: tuple[int, int], denominator: bool, small_cuts: None
) -> None:
    n = 48
    layout = LAYOUTS[kind](n).to(DEVICE)
    inputs = draw((1, n), heads, 8, 17, False, positive=False)
    scan = layout.scan("wht")
    compare(inputs, scan, layout.valid, denominator=denominator, start=True, features=20)


def test_features_that_a_chip_has_no_room_to_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "shared_memory", lambda device: 1024)
    inputs = draw((1, 24), (2, 1), 8, 16, False, positive=False)
    compare(inputs, TokenLayout.text(1, 24, device=DEVICE).scan(), None, both=False, features=16)


def test_features_are_not_kept_for_the_gradient() -> None:
    """All that is kept is as wide as a head, far less than features are."""
    inputs = [t.float().to(DEVICE) for t in draw((1, 40), (4, 2), 8, 8, False, positive=False)]
    maps = [torch.randn(heads, 8, 100, device=DEVICE) for heads in (4, 2)]
    c, b, x, *decay = (t.requires_grad_() for t in inputs)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ssd(c, b, x, tuple(decay[:2]), denominator=True, maps=tuple(maps), backend="triton")
    assert any(t.shape == maps[0].shape for t in kept)
    assert max(t.numel() for t in kept if t.shape[:2] == (1, 40)) == c.numel()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_maps_that_do_not_fit_are_refused(backend: str) -> None:
    inputs = [t.float().to(DEVICE) for t in draw((1, 8), (4, 2), 8, 16, False, positive=False)]
    of_c, of_b, more = (torch.zeros(heads, 8, r, device=DEVICE) for heads, r in ((4, 16), (2, 16), (2, 17)))
    for maps, found in (((of_c, of_c), r"\[2, 8\]"), ((of_c, more), "16 and 17")):
        with pytest.raises(ShapeError, match=found):
            ssd(*inputs[:3], tuple(inputs[3:5]), maps=maps, backend=backend)
    ssd(*inputs[:3], tuple(inputs[3:5]), maps=(of_c, of_b), backend=backend)


@pytest.mark.parametrize("what", ["skip", "norm_weight", "gate", "all"])
@pytest.mark.parametrize("learns", [False, True], ids=["at inference", "in training"])
def test_finishing_in_the_same_pass(what: str, learns: bool) -> None:
    layout = TokenLayout.from_grids(40, [[(3, (2, 3, 4))]]).to(DEVICE)
    inputs = [t.to(DEVICE) for t in draw((1, 40), (4, 2), 16, 24, False, positive=True)]
    finish = {"skip": (4,), "norm_weight": (4, 24), "gate": (1, 40, 4, 24)}
    last = {
        name: torch.rand(shape, device=DEVICE, dtype=torch.float64)
        for name, shape in finish.items()
        if what in (name, "all")
    }

    def run(dtype: torch.dtype, backend: str) -> Tensor:
        c, b, x, *decays = (t.to(dtype).requires_grad_(learns) for t in inputs)
        options = {"scan": layout.scan("wht"), "denominator": True, "norm_eps": 1e-3, "backend": backend}
        more = {name: t.to(dtype) for name, t in last.items()}
        return ssd(c, b, x, tuple(decays[:2]), tuple(decays[2:]), **options, **more)[0]

    assert_close(what, run(torch.float64, "reference"), run(torch.float32, "triton"), 1e-5)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17])
def test_short_rows(length: int, small_cuts: None) -> None:
    inputs = draw((2, length), (2, 1), 8, 16, True, positive=False)
    compare(inputs, TokenLayout.text(2, length, device=DEVICE).scan(), None, both=False, start=True)


def test_empty_row() -> None:
    inputs = [t.float().to(DEVICE) for t in draw((1, 0), (2, 1), 8, 16, False, positive=False)]
    y, state = ssd(*inputs[:3], tuple(inputs[3:5]), backend="triton")
    assert y.shape == (1, 0, 2, 16)
    assert not state.any()


def test_views_are_read_as_they_stand() -> None:
    """Inputs are often split from one projection: strided, and here transposed too."""
    joint = torch.randn(1, 24, 4, 16, device=DEVICE)
    c, b, x = joint.split([2, 1, 1], dim=2)
    decay = (-torch.rand(1, 1, 24, device=DEVICE).mT, torch.rand(1, 1, 24, device=DEVICE).mT)
    whole = [t.contiguous() for t in (c, b, x)]
    for views in ((c, b, x), [t.mT.contiguous().mT for t in (c, b, x)]):
        found = ssd(*views, decay, backend="triton")[0]
        assert torch.equal(found, ssd(*whole, decay, backend="triton")[0])


def test_tables_of_a_part_of_a_row() -> None:
    """The layout of a span of tokens has views of the whole row's tables."""
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, :9] = False
    layout = TokenLayout.from_grids(40, [[(3, (2, 3, 4))], [(12, (2, 2, 5))]], valid=valid)
    part = layout.select(tokens=slice(0, 35)).to(DEVICE)
    inputs = draw((2, 35), (2, 1), 16, 16, True, positive=False)
    compare(inputs, part.scan("thw"), part.valid, start=True)


def test_lower_precision_is_refused_nowhere_and_fp64_everywhere() -> None:
    from mixers import BackendError

    inputs = draw((1, 8), (2, 1), 8, 16, False, positive=False)
    with pytest.raises(BackendError, match="float64"):
        ssd(*(t.to(DEVICE) for t in inputs[:3]), tuple(t.to(DEVICE) for t in inputs[3:5]), backend="triton")
    wide = torch.zeros(1, 8, 2, 1024, device=DEVICE)
    with pytest.raises(BackendError, match="at most 512 by 128"):
        ssd(wide, wide, wide, (wide[..., 0], wide[..., 0]), backend="triton")


@pytest.fixture
def scanned() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A function of c through the op, and c."""
    layout = TokenLayout.from_grids(24, [[(3, (2, 2, 3))]]).to(DEVICE)
    scan = layout.scan("wht")
    c, b, x, *decays = (t.float().to(DEVICE) for t in draw((1, 24), (2, 1), 16, 16, False, positive=False))

    def run(c: Tensor) -> Tensor:
        return ssd(c, b, x, tuple(decays[:2]), tuple(decays[2:]), scan=scan, backend="triton")[0]

    return run, c


def test_compiles_without_a_break(scanned: tuple[Callable[[Tensor], Tensor], Tensor]) -> None:
    run, c = scanned
    plain, traced = c.clone().requires_grad_(), c.clone().requires_grad_()
    run(plain).sin().sum().backward()
    torch.compile(lambda t: run(t).sin().sum(), fullgraph=True, backend="aot_eager")(traced).backward()
    assert_close("gradient", plain.grad, traced.grad, 1e-6)


def test_checkpointing_gives_the_same_bits(scanned: tuple[Callable[[Tensor], Tensor], Tensor]) -> None:
    run, c = scanned
    plain, again = c.clone().requires_grad_(), c.clone().requires_grad_()
    run(plain).sin().sum().backward()
    torch.utils.checkpoint.checkpoint(run, again, use_reentrant=False).sin().sum().backward()
    assert torch.equal(plain.grad, again.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("per_head", [False, True], ids=["kv_head", "head"])
@pytest.mark.parametrize("denominator", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("length", [1000, 4099])
def test_on_the_chip(kind: str, dtype: torch.dtype, per_head: bool, denominator: bool, length: int) -> None:
    n = length // 12 * 12
    layout = LAYOUTS[kind](n).to(DEVICE)
    inputs = draw((1, n), (8, 2), 64, 64, per_head, positive=denominator)
    compare(inputs, layout.scan("hwt"), layout.valid, dtype=dtype, denominator=denominator, start=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("width", "values", "denominator", "per_head"),
    [
        (16, 32, False, False),
        (32, 64, True, False),
        (64, 96, False, True),
        (128, 128, False, False),
        (128, 128, False, True),
        (256, 128, True, False),
        (200, 40, True, True),
        (512, 64, True, False),
        (512, 128, True, True),
        (300, 96, False, False),
    ],
)
def test_widths_on_the_chip(
    dtype: torch.dtype, width: int, values: int, denominator: bool, per_head: bool
) -> None:
    n = 1344
    layout = TokenLayout.from_grids(n, [[(7, (5, 16, 16))]]).to(DEVICE)
    inputs = draw((1, n), (28, 4), width, values, per_head, positive=denominator)
    compare(inputs, layout.scan("wht"), None, dtype=dtype, denominator=denominator)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("width", "features"), [(64, 64), (64, 256), (128, 128), (96, 40)])
def test_features_made_on_the_chip(dtype: torch.dtype, width: int, features: int) -> None:
    n = 1344
    layout = TokenLayout.from_grids(n, [[(7, (5, 16, 16))]]).to(DEVICE)
    inputs = draw((1, n), (9, 3), width, 64, False, positive=False)
    compare(inputs, layout.scan("wht"), None, dtype=dtype, denominator=True, features=features)


@pytest.mark.gpu
def test_the_same_bits_twice() -> None:
    n = 20_000
    layout = TokenLayout.from_grids(n, [[(7, (70, 16, 16))]]).to(DEVICE)
    inputs = [t.to(DEVICE, torch.bfloat16) for t in draw((1, n), (28, 4), 128, 128, False, positive=False)]

    def gradients() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        y, _ = ssd(
            *leaves[:3], tuple(leaves[3:5]), tuple(leaves[5:]), scan=layout.scan("wht"), backend="triton"
        )
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    for one, two in zip(gradients(), gradients()):
        assert torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_million_tokens() -> None:
    """Offsets beyond 2³¹: the last packed sequence of a row of 2²⁰ tokens is as it is alone."""
    n, tail = 2**20, 3000
    sequence = (torch.arange(n, device=DEVICE) >= n - tail).long()[None]
    layout = TokenLayout.from_grids(
        n, [[(5, (1000, 32, 32)), (n - tail + 9, (10, 16, 16))]], sequence=sequence.cpu()
    )
    alone = TokenLayout.from_grids(tail, [[(9, (10, 16, 16))]]).to(DEVICE)
    layout = layout.to(DEVICE)
    h, g, p = 28, 4, 128

    def normal(*tail_shape: int) -> Tensor:
        return torch.randn(1, n, *tail_shape, device=DEVICE, dtype=torch.bfloat16)

    c, b, x = normal(h, p) * p**-0.5, normal(g, p), normal(g, p)
    decays = [t for _ in range(2) for t in (-normal(g).float().exp(), normal(g).float().exp())]
    leaves = [t.requires_grad_() for t in (c, b, x, *decays)]
    y, _ = ssd(*leaves[:3], tuple(leaves[3:5]), tuple(leaves[5:]), scan=layout.scan("wht"), backend="triton")
    y[:, -tail:].float().square().sum().backward()
    exact = [t.detach()[:, -tail:].double().requires_grad_() for t in leaves]
    want, _ = ssd(
        *exact[:3], tuple(exact[3:5]), tuple(exact[5:]), scan=alone.scan("wht"), backend="reference"
    )
    grads = torch.autograd.grad(want, exact, 2 * y.detach()[:, -tail:].double())
    assert_close("y", want, y[:, -tail:], 1e-2)
    for want, leaf in zip(grads, leaves):
        assert not leaf.grad[:, :-tail].any()
        assert_close("gradient", want, leaf.grad[:, -tail:], 1e-2)
