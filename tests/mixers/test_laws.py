"""The laws that every mixer obeys, over random layouts: causality, caching, packing, padding, chunks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mixers
from mixers import Rotary, TokenLayout, TokenMixer
from tests.helpers import assert_close
from tests.mixers.conftest import blocks_of
from tests.mixers.strategies import Rows, rows
from tests.mixers.zoo import TINY, VARIANTS, random_rotary, take_rotary, tiny

every_variant = pytest.mark.parametrize("variant", VARIANTS)
BIDIRECTIONAL = [
    "attention-bidirectional",
    "bimamba2",
    "bimamba2-l2",
    "flex_ma",
    "flex_ma-features",
    "swin3d",
    "swin3d-sinks",
    "swin3d-paper",
    "gated",
    "mmate",
    "mmate-sinks",
    "mmate-paper",
]
LAYERS = st.integers(0, 5)

pytestmark = pytest.mark.usefixtures("_small_blocks")


@pytest.fixture(scope="module", autouse=True)
def _small_blocks(small_blocks: None) -> None:
    pass


def test_every_registered_mixer_is_under_the_laws() -> None:
    assert {name for name, _ in VARIANTS.values()} == set(mixers.available())


def run_stack(layers: list[TokenMixer], x: Tensor, layout: TokenLayout, rotary: Rotary) -> Tensor:
    for layer in layers:
        x = x + layer(x, layout, rotary)
    return x


def random_tokens(rows: Rows, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(rows.shape[1])
    return torch.randn(*rows.shape, TINY["dim"], dtype=dtype)


def disturb(data: st.DataObject, rows: Rows, x: Tensor) -> tuple[Tensor, Tensor]:
    """Change some tokens, and all padding; return the new x and where the law forbids any effect."""
    batch, length = rows.shape
    changed = torch.zeros(batch, length, dtype=torch.bool)
    row, place = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, length - 1))
    kind = data.draw(st.sampled_from(["token", "suffix", "prefix", "outside"]))
    if kind == "token":
        changed[row, place] = True
    elif kind == "suffix":
        changed[row, place:] = True
    elif kind == "prefix":
        changed[row, :place] = True
    else:  # all that output (row, place) may not depend on
        changed[:] = True
        changed[row] = ~rows.dependencies()[row, place]
    other = torch.where(changed[..., None], 3 * torch.randn_like(x), x)
    other[~rows.valid] = data.draw(st.sampled_from([float("nan"), float("inf"), 1e4]))
    reached = (rows.dependencies() & changed[:, None]).any(-1)
    return other, rows.valid & ~reached


@every_variant
@given(rows=rows(holes=True), layer=LAYERS, data=st.data())
def test_causality(variant: str, rows: Rows, layer: int, data: st.DataObject) -> None:
    """What the law forbids has no effect, by a single bit; NaN in padding included."""
    mixer, layout = tiny(variant, layer_idx=layer), rows.layout
    x, rotary = random_tokens(rows), random_rotary(*rows.shape)
    other, untouched = disturb(data, rows, x)
    with torch.no_grad():
        y, z = mixer(x, layout, rotary), mixer(other, layout, rotary)
    assert torch.isfinite(y).all()
    assert torch.isfinite(z).all()
    assert torch.equal(y[untouched], z[untouched])


@given(
    rows=rows(max_batch=2, holes=True),
    stack=st.lists(st.sampled_from(list(VARIANTS)), min_size=2, max_size=4),
    data=st.data(),
)
def test_causality_of_a_stack(rows: Rows, stack: list[str], data: st.DataObject) -> None:
    layers = [tiny(variant, layer_idx=i) for i, variant in enumerate(stack)]
    x, rotary = random_tokens(rows), random_rotary(*rows.shape)
    other, untouched = disturb(data, rows, x)
    other[~rows.valid] = 7.0  # the residual stream carries it along; the layers must not
    with torch.no_grad():
        y, z = (run_stack(layers, t, rows.layout, rotary) for t in (x, other))
    assert torch.equal(y[untouched], z[untouched])


@every_variant
def test_what_the_law_allows_does_reach(variant: str) -> None:
    """Text sees earlier text and vision, vision sees its clip; else causality would hold for nothing."""
    layout = TokenLayout.from_grids(14, [[(4, (2, 2, 2))]])
    mixer = tiny(variant, dtype=torch.float64)
    x = torch.randn(1, 14, TINY["dim"], dtype=torch.float64, requires_grad=True)
    y = mixer(x, layout, random_rotary(1, 14, torch.float64))

    def reaches(j: int, i: int) -> bool:
        (gradient,) = torch.autograd.grad(y[0, i].square().sum(), x, retain_graph=True, allow_unused=True)
        return bool(gradient[0, j].abs().max() > 1e-9)

    assert reaches(5, 6)
    assert reaches(6, 5) == (variant in BIDIRECTIONAL)
    if variant not in ("swin3d-paper",):
        assert reaches(2, 3)
        assert reaches(11, 12)
    assert not reaches(4, 3)
    assert not reaches(12, 11)


@every_variant
@given(rows=rows(max_sequences=1, holes=True), layer=LAYERS, data=st.data())
def test_cached_equals_uncached(variant: str, rows: Rows, layer: int, data: st.DataObject) -> None:
    """Prefill in chunks cut anywhere outside clips, then single tokens, gives what one pass gives."""
    mixer, layout = tiny(variant, dtype=torch.float64, layer_idx=layer), rows.layout
    x, rotary = random_tokens(rows, torch.float64), random_rotary(*rows.shape, torch.float64)
    cuts = rows.cuts()
    chosen = {c for c in cuts if data.draw(st.booleans())}
    if data.draw(st.booleans()):  # token by token from somewhere on, as far as clips allow
        start = data.draw(st.integers(1, rows.shape[1]))
        chosen |= {c for c in cuts if c >= start}
    bounds = [0, *sorted(chosen), rows.shape[1]]

    state = mixer.init_state(rows.shape[0], dtype=torch.float64)
    size = {name: t.shape for name, t in state.items()}
    parts = []
    with torch.no_grad():
        for start, stop in itertools.pairwise(bounds):
            span = slice(start, stop)
            part = layout.select(tokens=span)
            parts.append(mixer(x[:, span], part, tuple(t[:, span] for t in rotary), state))
        whole = mixer(x, layout, rotary)
    cached = torch.cat(parts, dim=1)
    assert_close("output", whole[rows.valid], cached[rows.valid], 1e-11)
    if not variant.startswith("attention"):
        assert {name: t.shape for name, t in state.items()} == size


@every_variant
@given(rows=rows(), layer=LAYERS)
def test_each_sequence_alone_equals_its_place_in_the_batch(variant: str, rows: Rows, layer: int) -> None:
    """Packed, left-padded, right-padded and batched rows give what each sequence gives by itself."""
    mixer = tiny(variant, dtype=torch.float64, layer_idx=layer)
    x, rotary = random_tokens(rows, torch.float64), random_rotary(*rows.shape, torch.float64)
    with torch.no_grad():
        together = mixer(x, rows.layout, rotary)
        for row, tokens in rows.tokens_of_sequences():
            alone = mixer(
                x[row, tokens][None], rows.take(row, tokens).layout, take_rotary(rotary, row, tokens)
            )
            assert_close(f"row {row}", alone[0], together[row, tokens], 1e-11)


@every_variant
@given(rows=rows(max_batch=2, holes=True), layer=LAYERS, data=st.data())
def test_block_sizes_do_not_matter(variant: str, rows: Rows, layer: int, data: st.DataObject) -> None:
    """Chunk size and block size change neither values nor gradients."""
    x, rotary = random_tokens(rows, torch.float64), random_rotary(*rows.shape, torch.float64)
    chunked = "chunk_size" in repr(VARIANTS[variant][1])
    sizes = [data.draw(st.integers(1, 9)), 64] if chunked else [None, None]

    def run(chunk: int | None) -> list[Tensor]:
        mixer = tiny(variant, dtype=torch.float64, layer_idx=layer, **with_chunk(variant, chunk))
        leaf = x.clone().requires_grad_()
        y = mixer(leaf, rows.layout, rotary)
        weigh = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y) * rows.valid[..., None]
        parameters = dict(mixer.named_parameters())
        grads = torch.autograd.grad((y * weigh).sum(), [leaf, *parameters.values()], allow_unused=True)
        return [y[rows.valid], *(torch.zeros(1) if g is None else g for g in grads)]

    small = run(sizes[0])
    with blocks_of(chunks=32, block_tokens=16384, queries=512):
        large = run(sizes[1])
    for i, (a, b) in enumerate(zip(small, large)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, i=i: f"{i}: {m}")


def with_chunk(variant: str, chunk: int | None) -> dict[str, Any]:
    if chunk is None:
        return {}
    branches = VARIANTS[variant][1].get("branches")
    if branches is None:
        return {"chunk_size": chunk}
    return {
        "branches": {n: {**f, "chunk_size": chunk} if "chunk_size" in f else f for n, f in branches.items()}
    }
