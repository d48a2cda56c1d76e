"""Softmax attention of plain torch: what it averages, and that scores keep their precision under autocast."""

from __future__ import annotations

import pytest
import torch

from mixers.softmax import softmax_attention, softmax_attention_and_lse
from tests.helpers import assert_close


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_with_log_sum_exp_as_without(softcap: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    seen = torch.rand(2, 1, 5, 7) < 0.7
    seen[..., 0] = True
    plain = softmax_attention(q, k, v, seen, scale=0.3, softcap=softcap)
    found, lse = softmax_attention_and_lse(q, k, v, seen, scale=0.3, softcap=softcap)
    assert_close("y", plain, found, 1e-6)
    assert lse.shape == (2, 4, 5)


def test_large_scores_are_exact_under_autocast() -> None:
    """Scores of 100.2 and 100.3 are 100 and 100.5 in bf16: weights of 0.38 and 0.62 where both are nearly a half."""
    q = torch.tensor([[[[1.0, 0.0]]]])
    k = torch.tensor([[[[100.2, 0.0], [100.3, 0.0]]]])
    v = torch.eye(2)[None, None]
    expected = torch.tensor([100.2, 100.3]).double().softmax(0)
    with torch.autocast("cpu", torch.bfloat16):
        y, lse = softmax_attention_and_lse(q, k, v, None, scale=1.0)
    assert_close("lse", torch.tensor([100.2, 100.3]).double().logsumexp(0), lse[0, 0, 0], 1e-6)
    assert_close("y", expected, y[0, 0, 0], 1e-2)
