"""Which sinks a token looks at: worked out once, and kept by the layout that all layers share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixers import TokenLayout, TokenMixer
from mixers.ops import join_sinks
from mixers.sinks import hidden_sinks
from tests.helpers import assert_close
from tests.mixers.oracles import first_tokens, last_tokens
from tests.mixers.strategies import Rows, rows
from tests.mixers.zoo import random_rotary, tiny


def layers() -> list[TokenMixer]:
    """Mixers of which some agree in the count of sinks, some in the window, no two in all."""
    return [
        tiny("swin3d-sinks"),
        tiny("sliding_window-sinks"),
        tiny("swin3d-sinks", text_window=5, layer_idx=1),
        tiny("sliding_window-sinks", sinks=1),
        tiny("swin3d-sinks", sinks=1),
    ]


@given(rows=rows(holes=True), window=st.integers(1, 6), count=st.integers(1, 4), within=st.booleans())
def test_a_token_looks_at_the_sinks_that_its_window_leaves_out(
    rows: Rows, window: int, count: int, within: bool
) -> None:
    looks, vision = first_tokens(rows, count) & ~last_tokens(rows, window), rows.clip >= 0
    if within:
        looks = torch.where(vision[..., None], first_tokens(rows, count) & ~vision[:, None], looks)
    want = torch.zeros(*rows.shape, count, dtype=torch.bool)
    for row, tokens in rows.tokens_of_sequences():
        for sink, place in enumerate(tokens[:count]):
            want[row, tokens, sink] = looks[row, tokens, place]
    hidden = hidden_sinks(rows.layout, count=count, window=window, within_windows=within)
    assert torch.equal(want, ~hidden)


@given(rows=rows(holes=True))
def test_layers_that_share_a_layout_do_as_each_with_its_own(rows: Rows) -> None:
    layout, rotary = rows.layout, random_rotary(*rows.shape)
    x = torch.randn(*rows.shape, 24, requires_grad=True)
    for mixer in layers() * 2:
        shared, own = mixer(x, layout, rotary), mixer(x, rows.layout, rotary)
        assert torch.equal(shared, own)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (shared, own)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("vision", [False, True])
def test_after_prepare_none_is_left_to_work_out(vision: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[0, 17:] = False
    clips = [[(3, (2, 2, 3))], [(5, (1, 3, 4))]] if vision else [[], []]
    layout = TokenLayout.from_grids(20, clips, valid=valid)
    mixers = layers()
    for mixer in mixers:
        mixer.prepare(layout)
    kept = TokenLayout.kept

    def kept_already(layout: TokenLayout, key: Any, compute: Any) -> Any:
        def worked_out() -> None:
            raise AssertionError(f"{key} was worked out in forward")

        return kept(layout, key, worked_out)

    monkeypatch.setattr(TokenLayout, "kept", kept_already)
    for mixer in mixers:
        mixer(torch.randn(2, 20, 24), layout)


def test_large_scores_are_exact_under_autocast() -> None:
    """A score of 100.3 is 100.5 in bf16: weights of 0.55 and 0.45 where both should be a half."""
    torch.manual_seed(0)
    q, v, y = (torch.randn(1, 1, 2, 16).bfloat16() for _ in range(3))
    score = torch.full((1, 1, 2), 100.3)
    keys = (q.double() * score[..., None] / q.double().square().sum(-1, keepdim=True)).bfloat16()
    scale = 100.3 / (q.double() * keys.double()).sum(-1).mean()
    scores = (q.double() * keys.double()).sum(-1) * scale
    hidden = torch.zeros(1, 1, 1, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        found = join_sinks(q, y, scores.float(), keys[:, :, None], v[:, :, None], hidden, scale=float(scale))
    assert_close("y", (y.double() + v.double()) / 2, found, 5e-3)
