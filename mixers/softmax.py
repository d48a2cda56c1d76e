"""Softmax attention of some queries to some keys, with or without a bound on the scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
    gqa = q.shape[1] != k.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=gqa)
    if gqa:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = torch.tanh(q @ k.transpose(2, 3) * scale / softcap) * softcap
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    wide = torch.promote_types(q.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(q.dtype) @ v
