"""Softmax attention of some queries to some keys, with or without a bound on the scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixers.precision import without_autocast


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Average values by the softmax of scores.

    Args:
        q: [B, H, N, P].
        k: [B, G, M, P]; query head h reads KV head h // (H/G).
        v: [B, G, M, P].
        seen: bool, broadcastable to [B, H, N, M]; True where a query looks at a key, somewhere for
            each. None: everywhere.
        scale: Factor on query·key.
        softcap: Bound c of the scores: s → c·tanh(s / c). None: unbounded.

    Returns:
        [B, H, N, P].
    """
    if softcap is None:
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=gqa)
    scores = _scores(q, k, seen, scale, softcap)
    return scores.softmax(-1).to(q.dtype) @ _of_each_head(v, q)


def softmax_attention_and_lse(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Do as :func:`softmax_attention`, and tell log Σ exp of the scores, fp32 or wider [B, H, N].

    With it averages over two sets of keys can be joined. Where a query looks at no key it is -inf, the average zero.
    """
    weights, lse = softmax_weights(q, k, seen, scale=scale, softcap=softcap)
    return weights.to(q.dtype) @ _of_each_head(v, q), lse


def softmax_weights(
    q: Tensor, k: Tensor, seen: Tensor | None, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the softmax of scores, fp32 or wider [B, H, N, M], and log Σ exp of them [B, H, N].

    Arguments are as for :func:`softmax_attention`. Where a query looks at no key they are zero and -inf.
    """
    scores = _scores(q, k, seen, scale, softcap)
    lse = scores.logsumexp(-1)
    return (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp(), lse


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Bound scores s to c·tanh(s / c); not at all for None."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _scores(q: Tensor, k: Tensor, seen: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Scores, fp32 or wider [B, H, N, M], -inf where not seen."""
    k = _of_each_head(k, q)
    wide = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q.device):
        scores = capped(q.to(wide) @ k.to(wide).transpose(2, 3) * scale, softcap)
    return scores if seen is None else scores.masked_fill(~seen, float("-inf"))


def _of_each_head(t: Tensor, q: Tensor) -> Tensor:
    """Keys or values [B, G, M, P] of each query head [B, H, M, P]."""
    return t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], dim=1)
