"""Attention over gather tables on torch's flex_attention: tokens are copied into the order of the tables first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mixers.blocks import Blocks
from mixers.ops.window_attention.reference import rotated

TILE = 128
"""Slots of a tile of flex_attention's sparse mask."""


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
    q, k = rotated(q, k, rotary)
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))
    result = torch.zeros_like(flat_q)
    for table in [blocks] if isinstance(blocks, Blocks) else blocks:
        queries, keys = in_order(table.queries), in_order(table.keys)
        seen = keys >= 0
        if key_valid is not None:
            seen = seen & key_valid.flatten()[keys.clamp_min(0)]
        y = _attention()(
            *(
                t[at.clamp_min(0)].transpose(0, 1)[None]
                for t, at in ((flat_q, queries), (flat_k, keys), (flat_v, keys))
            ),
            score_mod=None if softcap is None else _bounded(softcap),
            block_mask=block_mask(table, seen),
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )[0].transpose(0, 1)
        used = queries >= 0
        result = result.index_copy(0, queries[used].long(), y[used])
    return result.view_as(q)


def in_order(table: Tensor) -> Tensor:
    """Return the slots of a table one after the other, filled up with empty ones to whole tiles."""
    flat = table.flatten()
    return F.pad(flat, (0, -len(flat) % TILE), value=-1)


def block_mask(table: Blocks, seen: Tensor) -> Any:
    """Build the sparse mask in which a query's slot sees its own group's keys, within its bounds.

    Args:
        table: Who looks at whom.
        seen: bool, by key slot in order: whether it may be looked at.
    """
    from torch.nn.attention.flex_attention import BlockMask

    (groups, queries), keys = table.queries.shape, table.keys.shape[1]
    length = groups * queries + -(groups * queries) % TILE
    tile = torch.arange(length // TILE, device=seen.device)
    low = (tile * TILE // queries).clamp_max(groups - 1) * keys // TILE
    last = (((tile + 1) * TILE - 1) // queries).clamp_max(groups - 1)
    count = ((last + 1) * keys - 1) // TILE - low + 1
    tiles = len(seen) // TILE
    index = (low[:, None] + torch.arange(tiles, device=seen.device)) % tiles
    first, stop = (
        None if t is None else F.pad(t.flatten(), (0, length - t.numel())) for t in (table.first, table.stop)
    )

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found = (i // queries == j // keys) & seen[j]
        if first is not None and stop is not None:
            found = found & (j % keys >= first[i]) & (j % keys < stop[i])
        return found

    return BlockMask.from_kv_blocks(
        count[None, None].int(),
        index[None, None].int(),
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(length, len(seen)),
    )


@functools.cache
def _bounded(softcap: float) -> Callable[..., Tensor]:
    """Return the score modification that bounds scores."""

    def bounded(score: Tensor, *place: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return bounded


@functools.cache
def _attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
