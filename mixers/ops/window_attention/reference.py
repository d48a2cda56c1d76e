"""Attention over gather tables, on torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixers.layout import Blocks

BLOCK_TOKENS = 16384
"""Query slots that are gathered at a time, which bounds the scratch memory."""


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, scale: float, key_valid: Tensor | None = None
) -> Tensor:
    """Let each query of a block attend to the block's keys.

    Args:
        q: [B, N, H, P], rotated.
        k: [B, M, G, P], rotated; M = N plus the history the table was made for.
        v: [B, M, G, P].
        blocks: Who looks at whom.
        scale: Factor on query·key.
        key_valid: bool [B, M]; False keys are not looked at. None: all are valid.

    Returns:
        [B, N, H, P], zero at tokens that are no block's query.
    """
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))
    at_once = max(1, BLOCK_TOKENS // blocks.queries.shape[1])
    placed, outputs = [], []
    for start in range(0, len(blocks.queries), at_once):
        part = slice(start, start + at_once)
        queries, keys = blocks.queries[part], blocks.keys[part]
        seen = (keys >= 0)[:, None]
        if blocks.allowed is not None:
            seen = blocks.allowed[part]
        if key_valid is not None:
            seen = seen & key_valid.flatten()[keys.clamp_min(0)][:, None]
        # A slot without a query may look anywhere, so that no softmax is over nothing.
        seen = seen | (queries < 0)[..., None]
        y = F.scaled_dot_product_attention(
            flat_q[queries.clamp_min(0)].transpose(1, 2),
            flat_k[keys.clamp_min(0)].transpose(1, 2),
            flat_v[keys.clamp_min(0)].transpose(1, 2),
            attn_mask=seen[:, None],
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        ).transpose(1, 2)
        used = queries >= 0
        placed.append(queries[used])
        outputs.append(y[used])
    result = torch.zeros_like(flat_q)
    if placed:
        result = result.index_copy(0, torch.cat(placed), torch.cat(outputs).to(result.dtype))
    return result.view_as(q)
