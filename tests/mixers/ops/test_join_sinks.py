"""Joining attention sinks, in plain torch: one softmax over what was averaged and the sinks."""

from __future__ import annotations

import pytest
import torch

from mixers import ShapeError
from mixers.ops import join_sinks
from tests.helpers import assert_close


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_is_one_softmax_over_both(each: bool, softcap: float | None) -> None:
    torch.manual_seed(0)
    batch, length, heads, groups, width, sinks, keys = 2, 5, 6, 3, 8, 3, 4
    q = torch.randn(batch, length, heads, width, dtype=torch.float64)
    own_k, own_v = torch.randn(2, batch, keys, heads, width, dtype=torch.float64)
    tokens = length if each else 1
    k, v = torch.randn(2, batch, tokens, sinks, groups, width, dtype=torch.float64)
    hidden = torch.rand(batch, length, sinks) < 0.5
    own = torch.einsum("bnhp,bmhp->bnhm", q, own_k) * 0.3
    wide_k, wide_v = (t.expand(-1, length, -1, -1, -1).repeat_interleave(2, 3) for t in (k, v))
    others = torch.einsum("bnhp,bnshp->bnhs", q, wide_k) * 0.3
    if softcap is not None:
        others = softcap * torch.tanh(others / softcap)
    scores = torch.cat([own, others.masked_fill(hidden[:, :, None], float("-inf"))], dim=-1)
    weights = scores.softmax(-1).split([keys, sinks], -1)
    want = torch.einsum("bnhm,bmhp->bnhp", weights[0], own_v)
    want = want + torch.einsum("bnhs,bnshp->bnhp", weights[1], wide_v)
    y = torch.einsum("bnhm,bmhp->bnhp", own.softmax(-1), own_v)
    found = join_sinks(q, y, own.logsumexp(-1), k, v, hidden, scale=0.3, softcap=softcap)
    assert_close("y", want, found, 1e-12)


def test_where_there_is_nothing_to_look_at_it_is_zero_and_gives_no_gradient() -> None:
    torch.manual_seed(0)
    q, y = (torch.randn(1, 3, 2, 4, requires_grad=True) for _ in range(2))
    k, v = (torch.randn(1, 1, 2, 1, 4, requires_grad=True) for _ in range(2))
    lse = torch.tensor([0.5, float("-inf"), float("-inf")])[None, :, None].repeat(1, 1, 2).requires_grad_()
    hidden = torch.tensor([[[True, True], [True, True], [False, True]]])
    made = join_sinks(q, y, lse, k, v, hidden, scale=1.0)
    assert_close("own", y[:, 0], made[:, 0], 1e-6)
    assert_close("sink", v[0, 0, 0].expand(1, 2, 4), made[:, 2], 1e-6)
    assert not made[:, 1].any()
    for gradient in torch.autograd.grad(made.sum(), (q, y, lse, k, v)):
        assert gradient.isfinite().all()
        if gradient.shape[:2] == (1, 3):
            assert not gradient[:, 1].any()


def test_wrong_shapes() -> None:
    q, k, hidden = torch.zeros(1, 3, 2, 4), torch.zeros(1, 1, 2, 1, 4), torch.zeros(1, 3, 2, dtype=torch.bool)
    join_sinks(q, q, q[..., 0], k, k, hidden, scale=1.0)
    for wrong in ((q, q, q[..., 0], k[:, 0], k[:, 0], hidden), (q, q, q[..., 0], k, k, hidden[..., :1])):
        with pytest.raises(ShapeError, match="must be"):
            join_sinks(*wrong, scale=1.0)
