"""Attention inside whole windows on xformers' memory_efficient_attention, over copies in window order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixers.blocks import Blocks
from mixers.errors import BackendError
from mixers.ops.window_attention.reference import rotated


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
) -> Tensor:
    """Let each query of a block attend to the block's keys; see the reference."""
    from xformers.ops import memory_efficient_attention

    assert key_valid is None
    assert softcap is None
    q, k = rotated(q, k, rotary)
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))
    group = q.shape[2] // k.shape[2]
    result = torch.zeros_like(flat_q)
    for table in [blocks] if isinstance(blocks, Blocks) else blocks:
        queries, keys, mask = _ragged(table)
        try:
            y = memory_efficient_attention(
                flat_q[queries][None].unflatten(2, (-1, group)),
                *(t[keys][None, :, :, None].expand(-1, -1, -1, group, -1) for t in (flat_k, flat_v)),
                attn_bias=mask,
                scale=scale,
            )
        except NotImplementedError as error:
            reason = str(error).partition("\n")[0]
            raise BackendError(
                f"xformers, as installed here, cannot attend in these windows: {reason}"
            ) from error
        result = result.index_copy(0, queries, y[0].flatten(1, 2))
    return result.view_as(q)


@functools.lru_cache(maxsize=8)
def _ragged(table: Blocks) -> tuple[Tensor, Tensor, Any]:
    """Return the filled slots of queries and of keys in order, and the mask of their groups."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    queries, keys = table.queries >= 0, table.keys >= 0
    mask = BlockDiagonalMask.from_seqlens(queries.sum(1).tolist(), keys.sum(1).tolist())
    return table.queries[queries].long(), table.keys[keys].long(), mask
