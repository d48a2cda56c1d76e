"""Attention over gather tables, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mixers.blocks import Blocks
from mixers.rotary import apply_rotary
from mixers.softmax import softmax_attention, softmax_attention_and_lse

BLOCK_TOKENS = 16384
"""Query slots that are gathered at a time, which bounds the scratch memory."""


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks | Sequence[Blocks],
    *,
    scale: float,
    key_valid: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    with_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Let each query of a block attend to the block's keys.

    Args:
        q: [B, N, H, P].
        k: [B, M, G, P]; M = N plus the history the tables were made for. Query head h reads KV head
            h // (H/G).
        v: [B, M, G, P].
        blocks: Who looks at whom. Several tables share no query.
        scale: Factor on query·key.
        key_valid: bool [B, M]; False keys are not looked at. None: all are valid.
        rotary: (cos, sin), each [B or 1, N, R], of which the two halves along R are alike: what the
            queries and the last N keys are rotated by first (rotate-half convention, the first R of P
            channels). Earlier keys are rotated already. None: all are.
        softcap: Bound c of the scores: s → c·tanh(s / c). None: unbounded.
        with_lse: Whether to tell log Σ exp of the scores too.

    Returns:
        [B, N, H, P], zero at tokens that are no block's query. ``with_lse``: also log Σ exp, fp32 or wider
        [B, N, H], -inf at these.
    """
    q, k = rotated(q, k, rotary)
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))
    placed, outputs, logs = [], [], []
    for part in _parts([blocks] if isinstance(blocks, Blocks) else blocks):
        seen = part.allowed
        if seen is None:
            seen = (part.keys >= 0)[:, None]
        if key_valid is not None:
            seen = seen & key_valid.flatten()[part.keys.clamp_min(0)][:, None]
        # A slot without a query may look anywhere, so that no softmax is over nothing.
        seen = seen | (part.queries < 0)[..., None]
        own = flat_q[part.queries.clamp_min(0)], *(t[part.keys.clamp_min(0)] for t in (flat_k, flat_v))
        queries, keys, values = (t.transpose(1, 2) for t in own)
        used = part.queries >= 0
        if with_lse:
            y, lse = softmax_attention_and_lse(
                queries, keys, values, seen[:, None], scale=scale, softcap=softcap
            )
            logs.append(lse.transpose(1, 2)[used])
        else:
            y = softmax_attention(queries, keys, values, seen[:, None], scale=scale, softcap=softcap)
        placed.append(part.queries[used].long())
        outputs.append(y.transpose(1, 2)[used])
    y = torch.zeros_like(flat_q)
    if placed:
        y = y.index_copy(0, torch.cat(placed), torch.cat(outputs).to(y.dtype))
    if not with_lse:
        return y.view_as(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(flat_q.shape[:2], float("-inf"), dtype=wide, device=q.device)
    if placed:
        lse = lse.index_copy(0, torch.cat(placed), torch.cat(logs))
    return y.view_as(q), lse.view(q.shape[:3])


def rotated(q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Rotate the queries and as many of the last keys."""
    if rotary is None:
        return q, k
    earlier, own = k.split([k.shape[1] - q.shape[1], q.shape[1]], dim=1)
    return apply_rotary(q, *rotary), torch.cat([earlier, apply_rotary(own, *rotary)], dim=1)


def _parts(tables: Sequence[Blocks]) -> Iterator[Blocks]:
    for blocks in tables:
        at_once = max(1, BLOCK_TOKENS // blocks.queries.shape[1])
        for start in range(0, len(blocks.queries), at_once):
            yield blocks[start : start + at_once]
