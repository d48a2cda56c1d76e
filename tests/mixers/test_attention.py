"""``attention`` is the teacher's softmax attention: torch's own, and a dense masked softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import mixers
from mixers import TokenLayout
from tests.helpers import assert_close
from tests.mixers.conftest import blocks_of
from tests.mixers.oracles import dense_attention
from tests.mixers.strategies import Rows, rows
from tests.mixers.zoo import random_rotary, tiny


@pytest.mark.parametrize("heads", [(28, 4), (16, 2), (9, 3), (4, 4)])
def test_is_torch_attention_to_the_bit(heads: tuple[int, int]) -> None:
    h, g = heads
    mixer = mixers.build("attention", dim=16, num_heads=h, num_kv_heads=g, head_dim=4, qkv_bias=True)
    x = torch.randn(2, 9, 16)
    q, k, v = (t.transpose(1, 2) for t in mixer.project(x))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=h != g)
    assert torch.equal(mixer(x), mixer.o_proj(y.transpose(1, 2).flatten(2)))


@given(
    rows=rows(holes=True),
    window=st.sampled_from([None, 1, 4, 30]),
    softcap=st.sampled_from([None, 0.5]),
    bidirectional=st.booleans(),
)
def test_is_dense_attention_over_the_sequence_so_far(
    rows: Rows, window: int | None, softcap: float | None, bidirectional: bool
) -> None:
    """Causal for vision too, unless asked otherwise; padded and packed rows as if alone."""
    fields = {"window": window, "softcap": softcap, "bidirectional": bidirectional}
    mixer = tiny("attention", dtype=torch.float64, scale=0.7, **fields)
    x = torch.randn(*rows.shape, 24, dtype=torch.float64)
    cos, sin = random_rotary(*rows.shape, torch.float64)
    steps = torch.arange(rows.shape[1])
    seen = rows.dependencies()
    if not bidirectional:
        seen &= steps <= steps[:, None]
    if window is not None:
        seen &= steps > steps[:, None] - window
    q, k, v = mixer.project(x)

    def rotated(t: torch.Tensor) -> torch.Tensor:
        low, high = t.chunk(2, dim=-1)
        return t * cos[:, :, None] + torch.cat([-high, low], dim=-1) * sin[:, :, None]

    want = mixer.o_proj(dense_attention(rotated(q), rotated(k), v, seen, 0.7, softcap).flatten(2))
    with blocks_of(chunks=2, block_tokens=16, queries=5):
        found = mixer(x, rows.layout, (cos, sin))
    assert_close("y", want[rows.valid], found[rows.valid], 1e-12)


def test_a_long_padded_row_sees_no_padding() -> None:
    """More padding than any kernel's block of keys."""
    mixer, x = tiny("attention"), torch.randn(2, 1300, 24)
    mask = torch.ones(2, 1300)
    mask[0, :1200] = 0
    y = mixer(x, TokenLayout.from_mask(mask))
    assert_close("tail", mixer(x[:1, 1200:]), y[:1, 1200:], 1e-5)
    assert_close("full row", mixer(x[1:]), y[1:], 1e-5)


def test_state_grows_by_what_is_read() -> None:
    mixer = tiny("attention")
    state = mixer.init_state(2)
    for read, total in ((3, 3), (1, 4), (2, 6)):
        mixer(torch.randn(2, read, 24), state=state)
        assert state["k"].shape == state["v"].shape == (2, total, 2, 8)
        assert state["valid"].shape == (2, total)


def test_with_a_window_the_state_grows_to_it() -> None:
    mixer, x = tiny("attention", window=5, softcap=1.5), torch.randn(2, 12, 24)
    state, parts = mixer.init_state(2), []
    for start, stop in ((0, 3), (3, 4), (4, 10), (10, 11), (11, 12)):
        parts.append(mixer(x[:, start:stop], state=state))
        assert state["k"].shape[1] == state["valid"].shape[1] == min(stop, 4)
    assert_close("y", mixer(x), torch.cat(parts, dim=1), 1e-5)


@pytest.mark.parametrize("field", ["window", "softcap"])
def test_bounds_must_be_positive(field: str) -> None:
    with pytest.raises(mixers.ConfigError, match=f"{field} must be"):
        tiny("attention", **{field: 0})


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("past", [0, 100])
def test_no_square_mask_is_built(past: int, softcap: float | None) -> None:
    """Padded, packed and cached rows alike."""
    mixer, length = mixers.build("attention", dim=4, num_heads=1, head_dim=4, softcap=softcap), 4096
    valid = torch.ones(1, length, dtype=torch.bool)
    valid[:, :7] = False
    layout = TokenLayout(1, length, valid=valid, sequence=(torch.arange(length) // 3000)[None])
    state = mixer.init_state(1)
    with torch.no_grad(), LargestTensor() as largest:
        if past:
            mixer(torch.randn(1, past, 4), state=state)
        mixer(torch.randn(1, length, 4), layout, state=state if past else None)
    # A square mask of bools takes N² bytes; the float scores of 512 queries at a time take half of that here.
    assert 0 < largest.size < 0.75 * length * length
