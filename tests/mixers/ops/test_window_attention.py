"""Attention over gather tables against a dense masked softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixers.blocks import Blocks
from mixers.ops import block_attention
from tests.helpers import assert_close
from tests.mixers.oracles import dense_attention, last_tokens, same_window
from tests.mixers.strategies import Rows, rows

HEADS = [(4, 2), (28, 4), (9, 3), (3, 3)]
EXTENTS = st.tuples(*[st.integers(1, 3)] * 3)

pytestmark = pytest.mark.usefixtures("small_blocks")


def draw_qkv(rows: Rows, heads: tuple[int, int]) -> list[Tensor]:
    torch.manual_seed(0)
    h, g = heads
    return [torch.randn(*rows.shape, n, 4, dtype=torch.float64, requires_grad=True) for n in (h, g, g)]


def check(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None, seen: Tensor, softcap: float | None = None
) -> None:
    if blocks is None:
        assert not seen.any()
        return
    found = block_attention(q, k, v, blocks, scale=0.5, softcap=softcap)
    want = dense_attention(q, k, v, seen, 0.5, softcap)
    assert_close("y", want, found, 1e-12)
    again, lse = block_attention(q, k, v, blocks, scale=0.5, softcap=softcap, with_lse=True)
    assert_close("y with its log-sum-exp", want, again, 1e-12)
    one = torch.ones_like(v)  # the average of what is one everywhere, so that the sum itself is left
    total = dense_attention(q, k, one, seen, 0.5, softcap)[..., 0] * lse.exp()
    scores = torch.einsum("bngrp,bmgp->bngrm", q.unflatten(2, (k.shape[2], -1)), k).flatten(2, 3) * 0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    assert_close("sum", scores.exp().mul(seen[:, :, None]).sum(-1), total, 1e-12)
    weigh = torch.randn_like(q)
    for name, a, b in zip(
        "qkv",
        torch.autograd.grad((want * weigh).sum(), (q, k, v)),
        torch.autograd.grad((found * weigh).sum(), (q, k, v)),
    ):
        assert_close(f"gradient of {name}", a, b, 1e-11)


@given(
    rows=rows(),
    size=EXTENTS,
    shifted=st.booleans(),
    heads=st.sampled_from(HEADS),
    softcap=st.sampled_from([None, 0.8]),
)
def test_windows(
    rows: Rows, size: tuple[int, int, int], shifted: bool, heads: tuple[int, int], softcap: float | None
) -> None:
    blocks, seen = rows.layout.windows(size, shifted), same_window(rows, size, shifted)
    check(*draw_qkv(rows, heads), blocks, seen, softcap)


@given(rows=rows(holes=True), window=st.integers(1, 9), text_only=st.booleans(), heads=st.sampled_from(HEADS))
def test_last_tokens(rows: Rows, window: int, text_only: bool, heads: tuple[int, int]) -> None:
    seen = last_tokens(rows, window)
    if text_only:
        seen &= (rows.clip < 0)[..., None]
    check(*draw_qkv(rows, heads), rows.layout.recent(window, text_only=text_only), seen)


def test_keys_marked_invalid_are_not_looked_at() -> None:
    q, k, v = (torch.randn(1, 4, 2, 4) for _ in range(3))
    blocks = Blocks(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 1, 2, 3]]))
    key_valid = torch.tensor([[True, False, True, True]])
    y = block_attention(q, k, v, blocks, scale=0.5, key_valid=key_valid)
    want = dense_attention(q, k, v, key_valid[:, None].expand(1, 4, 4), 0.5)
    assert_close("y", want, y, 1e-6)
