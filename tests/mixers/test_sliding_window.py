"""``sliding_window`` against a dense mask of the last tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mixers import TokenLayout
from mixers.recent import recent_attention
from mixers.rotary import apply_rotary
from tests.helpers import assert_close
from tests.mixers.oracles import dense_attention, first_tokens, last_tokens
from tests.mixers.strategies import Rows, rows
from tests.mixers.zoo import random_rotary, tiny


@given(
    rows=rows(holes=True),
    window=st.integers(1, 12),
    sinks=st.integers(0, 3),
    softcap=st.sampled_from([None, 0.5]),
)
def test_is_dense_attention_to_the_last_tokens_and_the_sinks(
    rows: Rows, window: int, sinks: int, softcap: float | None
) -> None:
    mixer = tiny("sliding_window", dtype=torch.float64, window=window, sinks=sinks, softcap=softcap)
    x = torch.randn(*rows.shape, 24, dtype=torch.float64)
    rotary = random_rotary(*rows.shape, torch.float64)
    q, k, v = mixer.project(x)
    q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
    seen = last_tokens(rows, window) | first_tokens(rows, sinks)
    want = mixer.o_proj(dense_attention(q, k, v, seen, mixer.scale, softcap).flatten(2))
    found = mixer(x, rows.layout, rotary)
    assert_close("y", want[rows.valid], found[rows.valid], 1e-12)


def test_a_window_longer_than_the_row_is_full_attention() -> None:
    x, full, window = (
        torch.randn(1, 7, 24),
        tiny("attention", qk_norm="none"),
        tiny("sliding_window", qk_norm="none", window=100),
    )
    window.load_state_dict(full.state_dict())
    assert_close("y", full(x), window(x), 1e-5)


def test_a_long_window_costs_a_short_row_little() -> None:
    blocks = TokenLayout.text(1, 10).recent(4096, text_only=False, history=4095)
    assert blocks.queries.shape == (1, 10)
    assert blocks.keys.shape[1] <= 4096 + 10


def test_state_is_the_window() -> None:
    mixer = tiny("sliding_window", window=5)
    state = mixer.init_state(2)
    assert state["k"].shape == (2, 4, 2, 8)
    x, mask = torch.randn(2, 3, 24), torch.tensor([[1, 1, 1], [0, 1, 0]])
    mixer(x, TokenLayout.from_mask(mask), state=state)
    assert state["seen"].tolist() == [3, 1]


def test_state_holds_the_sinks_of_a_row() -> None:
    """Also of one that begins with padding, or whose first tokens come one at a time."""
    mixer = tiny("sliding_window", window=2, sinks=2)
    x, mask = torch.randn(2, 4, 24), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    state = mixer.init_state(2)
    for step in range(4):
        mixer(x[:, step : step + 1], TokenLayout.from_mask(mask[:, step : step + 1]), state=state)
    _, k, v = mixer.project(x)
    first = torch.tensor([[0, 1], [2, 3]])
    assert_close("k", torch.stack([k[row, at] for row, at in enumerate(first)]), state["sink_k"], 1e-6)
    assert_close("v", torch.stack([v[row, at] for row, at in enumerate(first)]), state["sink_v"], 1e-6)


def test_large_scores_of_sinks_are_exact_in_bf16() -> None:
    """Where a sink's is rounded to bf16 and the window's are not, equal scores of 100 have unequal weights."""
    torch.manual_seed(0)
    row = torch.randn(16).bfloat16()
    q, v = row.expand(1, 64, 2, 16), torch.randn(1, 64, 2, 16).bfloat16()
    layout, scale = TokenLayout.text(1, 64), 100.3 / float(row.double().square().sum())
    found = recent_attention(q, q, v, layout, None, window=8, scale=scale, sinks=1)
    want = torch.stack([v[:, 0:1, :].double(), *(v[:, at : at + 1].double() for at in range(56, 64))]).mean(0)
    assert_close("last", want, found[:, -1:], 5e-3)
