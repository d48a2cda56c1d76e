"""``swin3d``: attention inside windows of a clip, shifted on odd layers; the text window beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixers import ConfigError, TokenLayout
from mixers.rotary import apply_rotary
from tests.helpers import assert_close
from tests.mixers.oracles import dense_attention, first_tokens, last_tokens, same_window
from tests.mixers.strategies import Rows, rows
from tests.mixers.zoo import random_rotary, tiny


def pairs(layout: TokenLayout, size: tuple[int, int, int], shifted: bool) -> Tensor:
    """Bool [B·N, B·N]: do the tables put two tokens into one window?"""
    total = layout.batch_size * layout.length
    found = torch.zeros(total, total, dtype=torch.bool)
    blocks = layout.windows(size, shifted)
    for group in [] if blocks is None else blocks.queries:
        members = group[group >= 0]
        assert len(members) == len(members.unique()) <= size[0] * size[1] * size[2]
        found[members[:, None], members] = True
    return found


@given(rows=rows(), size=st.tuples(*[st.integers(1, 4)] * 3), shifted=st.booleans())
def test_windows_equal_their_definition(rows: Rows, size: tuple[int, int, int], shifted: bool) -> None:
    want = torch.block_diag(*same_window(rows, size, shifted).float()).bool()
    assert torch.equal(pairs(rows.layout, size, shifted), want)


def test_shifted_windows_do_not_wrap() -> None:
    """On a row of 8 cut by 4, the shifted windows are 2 + 4 + 2: the two ends stay apart."""
    layout = TokenLayout.from_grids(8, [[(0, (1, 1, 8))]])
    plain, shifted = (
        [t[t >= 0].tolist() for t in layout.windows((4, 4, 4), s).queries] for s in (False, True)
    )
    assert plain == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert shifted == [[0, 1], [2, 3, 4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("layer", "shift", "moved"), [(0, True, False), (1, True, True), (2, True, False), (1, False, False)]
)
def test_odd_layers_are_shifted(layer: int, shift: bool, moved: bool) -> None:
    mixer = tiny("swin3d-paper", window=(1, 1, 4), shift=shift, layer_idx=layer)
    layout = TokenLayout.from_grids(8, [[(0, (1, 1, 8))]])
    x = torch.randn(1, 8, 24, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x, layout)[0, 1].sum(), x)
    assert gradient[0].abs().sum(-1).nonzero().flatten().tolist() == ([0, 1] if moved else [0, 1, 2, 3])


@given(
    rows=rows(),
    layer=st.integers(0, 1),
    looks=st.sampled_from([(0, 0), (1, 0), (3, 0), (50, 0), (1, 1), (3, 3), (50, 2)]),
)
def test_is_dense_attention_over_windows(rows: Rows, layer: int, looks: tuple[int, int]) -> None:
    text_window, sinks = looks
    mixer = tiny("swin3d", dtype=torch.float64, layer_idx=layer, text_window=text_window, sinks=sinks)
    x = torch.randn(*rows.shape, 24, dtype=torch.float64)
    rotary = random_rotary(*rows.shape, torch.float64)
    q, k, v = mixer.project(x)
    q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
    seen = same_window(rows, (2, 2, 3), shifted=layer == 1)
    if text_window:
        seen |= last_tokens(rows, text_window) & (rows.clip < 0)[..., None]
        text = rows.clip < 0
        seen |= first_tokens(rows, sinks) & (text[..., None] | text[:, None])
    y = dense_attention(q, k, v, seen, mixer.scale, mixer.config.softcap).masked_fill(
        ~seen.any(-1)[..., None, None], 0
    )
    found = mixer(x, rows.layout, rotary)
    assert_close("y", mixer.o_proj(y.flatten(2))[rows.valid], found[rows.valid], 1e-12)


@given(rows=rows())
def test_says_what_it_covers(rows: Rows) -> None:
    x = torch.randn(*rows.shape, 24)
    for variant, expected in (("swin3d", None), ("swin3d-paper", rows.clip >= 0)):
        mixer = tiny(variant)
        _, covered = mixer.mix_heads(x, *mixer.project(x), rows.layout, None, None)
        assert (covered is None) == (expected is None)
        assert covered is None or torch.equal(covered, expected)


def test_the_paper_keeps_no_state() -> None:
    assert tiny("swin3d-paper").init_state(2) == {}


def test_sinks_need_a_text_window() -> None:
    with pytest.raises(ConfigError, match="text_window"):
        tiny("swin3d", text_window=0, sinks=1)
