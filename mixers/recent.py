"""Causal attention to the last W tokens, and the constant-size state that it keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixers.blocks import Blocks
from mixers.interface import MixerState, Rotary
from mixers.layout import Grid, TokenLayout
from mixers.ops import block_attention, join_sinks
from mixers.rotary import apply_rotary
from mixers.sinks import Sinks, find_sinks, init_sinks, prepare_sinks
from mixers.softmax import softmax_attention


def recent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    state: MixerState | None,
    *,
    window: int,
    scale: float,
    rotary: Rotary | None = None,
    grid_windows: tuple[Grid, bool] | None = None,
    softcap: float | None = None,
    sinks: int = 0,
) -> Tensor:
    """Let tokens attend to the last ``window`` valid tokens of their sequence, themselves included.

    Args:
        q: [B, N, H, P].
        k: [B, N, G, P].
        v: [B, N, G, P].
        layout: Where the tokens stand.
        state: From :func:`init_recent`; holds the window - 1 tokens before these. Updated in place.
        window: Tokens looked at, at least 1.
        scale: Factor on query·key.
        rotary: What q and k are rotated by first; None: not at all.
        grid_windows: (size, shifted) of the 3-D windows inside which vision tokens look instead.
            None: they look back as text does.
        softcap: Bound of the scores. None: unbounded.
        sinks: First valid tokens of a sequence that tokens beyond the window look at too.

    Returns:
        [B, N, H, P], zero at padding.
    """
    one = q.shape[1] == 1 and layout.clip is None and state is not None
    if rotary is not None and (sinks or one):
        q, k = apply_rotary(torch.cat([q, k], dim=2), *rotary).split([q.shape[2], k.shape[2]], dim=2)
        rotary = None
    own = None
    if sinks and q.shape[1]:
        own = find_sinks(
            k, v, layout, state, count=sinks, window=window, within_windows=grid_windows is not None
        )
    if state is None:
        return _attend(q, k, v, layout, 0, None, window, rotary, grid_windows, scale, softcap, own)
    all_k, all_v, key_valid = _with_history(state, k, v, layout.valid)
    if one:
        y = _attend_from_one(q, all_k, all_v, key_valid, scale, softcap, own)
    else:
        y = _attend(
            q, all_k, all_v, layout, window - 1, key_valid, window, rotary, grid_windows, scale, softcap, own
        )
    _remember(state, k, v, layout.valid, rotary)
    return y


def prepare_recent(
    layout: TokenLayout,
    *,
    window: int,
    cached: bool,
    grid_windows: tuple[Grid, bool] | None = None,
    sinks: int = 0,
) -> None:
    """Make the tables that :func:`recent_attention` asks of a layout, with a state or without one."""
    if sinks:
        within_windows = grid_windows is not None
        prepare_sinks(layout, count=sinks, window=window, within_windows=within_windows, cached=cached)
    if cached and layout.length == 1 and layout.clip is None:
        return
    _tables(layout, window - 1 if cached else 0, window, grid_windows)


def _tables(
    layout: TokenLayout, history: int, window: int, grid_windows: tuple[Grid, bool] | None
) -> list[Blocks]:
    windows = None if grid_windows is None else layout.windows(*grid_windows, history=history)
    recent = layout.recent(window, text_only=grid_windows is not None, history=history)
    return [table for table in (windows, recent) if table is not None]


def init_recent(
    batch_size: int,
    window: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    sinks: int = 0,
) -> MixerState:
    """Return the state of :func:`recent_attention` before the first token.

    Returns:
        Keys and values ``k``, ``v`` [B, window - 1, G, P], most recent last, ``seen`` [B], how
        many valid tokens were read, and with ``sinks`` what :func:`~mixers.sinks.init_sinks` says.
    """
    held = init_sinks(batch_size, sinks, num_kv_heads, head_dim, dtype, device) if sinks else {}
    shape = (batch_size, window - 1, num_kv_heads, head_dim)
    return {
        "k": torch.zeros(shape, dtype=dtype, device=device),
        "v": torch.zeros(shape, dtype=dtype, device=device),
        "seen": torch.zeros(batch_size, dtype=torch.long, device=device),
        **held,
    }


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    history: int,
    key_valid: Tensor | None,
    window: int,
    rotary: Rotary | None,
    grid_windows: tuple[Grid, bool] | None,
    scale: float,
    softcap: float | None,
    sinks: Sinks | None,
) -> Tensor:
    blocks = _tables(layout, history, window, grid_windows)
    options: dict[str, Any] = {"key_valid": key_valid, "rotary": rotary, "softcap": softcap}
    if sinks is None:
        return block_attention(q, k, v, blocks, scale=scale, **options)
    y, lse = block_attention(q, k, v, blocks, scale=scale, **options, with_lse=True)
    return join_sinks(q, y, lse, sinks.k, sinks.v, sinks.hidden, scale=scale, softcap=softcap)


def _attend_from_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_valid: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Sinks | None,
) -> Tensor:
    seen = key_valid.clone()
    seen[:, -1] = True
    if sinks is not None:
        seen = torch.cat([~sinks.hidden[:, 0], seen], dim=1)
        k, v = torch.cat([sinks.k[:, 0], k], dim=1), torch.cat([sinks.v[:, 0], v], dim=1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return softmax_attention(q, k, v, seen[:, None, None], scale=scale, softcap=softcap).transpose(1, 2)


def _with_history(
    state: MixerState, k: Tensor, v: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    history = state["k"].shape[1]
    earlier = torch.arange(history, device=k.device) >= history - state["seen"][:, None]
    current = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if valid is None else valid
    all_k, all_v = (torch.cat([state[name].to(new.dtype), new], dim=1) for name, new in (("k", k), ("v", v)))
    return all_k, all_v, torch.cat([earlier, current], dim=1)


@torch.no_grad()
def _remember(state: MixerState, k: Tensor, v: Tensor, valid: Tensor | None, rotary: Rotary | None) -> None:
    """Keep the newest valid tokens, their keys rotated."""
    slots, length = state["k"].shape[1], k.shape[1]
    state["seen"] += length if valid is None else valid.sum(1)
    if not slots or not length:
        return
    if valid is None:
        newest = torch.arange(length, length + slots, device=k.device).expand(k.shape[0], -1)
    else:
        kept = torch.ones(valid.shape[0], slots, dtype=torch.bool, device=valid.device)
        newest = torch.cat([kept, valid], dim=1).long().argsort(dim=1, stable=True)[:, -slots:]
    own = (newest - slots).clamp_min(0)

    def taken(table: Tensor, at: Tensor) -> Tensor:
        index = at[(..., *[None] * (table.ndim - 2))].expand(-1, -1, *table.shape[2:])
        return table.expand(len(at), *table.shape[1:]).gather(1, index)

    for name, table in (("k", k), ("v", v)):
        new = taken(table, own)
        if name == "k" and rotary is not None:
            new = apply_rotary(new, *(taken(t, own) for t in rotary))
        old = taken(state[name], newest.clamp_max(slots - 1))
        state[name].copy_(torch.where((newest >= slots)[..., None, None], new.to(old.dtype), old))
