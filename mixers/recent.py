"""Causal attention to the last W tokens, and the constant-size state that it keeps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixers.interface import MixerState
from mixers.layout import TokenLayout
from mixers.ops import block_attention


def recent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    state: MixerState | None,
    *,
    window: int,
    scale: float,
    text_only: bool,
) -> Tensor:
    """Let tokens attend to the last ``window`` valid tokens of their sequence, themselves included.

    Args:
        q: [B, N, H, P], rotated.
        k: [B, N, G, P], rotated.
        v: [B, N, G, P].
        layout: Where the tokens stand.
        state: From :func:`init_recent`; holds the window - 1 tokens before these. Updated in place.
        window: Tokens looked at, at least 1.
        scale: Factor on query·key.
        text_only: Whether vision tokens are only looked at and do not look themselves.

    Returns:
        [B, N, H, P], zero where a token does not look.
    """
    key_valid, history = None, 0
    own_k, own_v = k, v
    if state is not None:
        history = window - 1
        k, v = torch.cat([state["k"].to(k.dtype), k], dim=1), torch.cat([state["v"].to(v.dtype), v], dim=1)
        slots = torch.arange(history, device=k.device)
        earlier = slots >= history - state["seen"][:, None]
        current = (
            torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
            if layout.valid is None
            else layout.valid
        )
        key_valid = torch.cat([earlier, current], dim=1)
    if state is not None and q.shape[1] == 1 and layout.clip is None:
        assert key_valid is not None
        seen = key_valid.clone()
        seen[:, -1] = True
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=seen[:, None, None],
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        ).transpose(1, 2)
    else:
        blocks = layout.recent(window, text_only=text_only, history=history)
        y = torch.zeros_like(q)
        if blocks is not None:
            y = block_attention(q, k, v, blocks, scale=scale, key_valid=key_valid)
    if state is not None:
        _remember(state, own_k, own_v, layout.valid)
    return y


def init_recent(
    batch_size: int,
    window: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> MixerState:
    """Return the state of :func:`recent_attention` before the first token.

    Returns:
        Keys and values ``k``, ``v`` [B, window - 1, G, P], most recent last, and ``seen`` [B], how
        many valid tokens were read.
    """
    shape = (batch_size, window - 1, num_kv_heads, head_dim)
    return {
        "k": torch.zeros(shape, dtype=dtype, device=device),
        "v": torch.zeros(shape, dtype=dtype, device=device),
        "seen": torch.zeros(batch_size, dtype=torch.long, device=device),
    }


@torch.no_grad()
def _remember(state: MixerState, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
    slots = state["k"].shape[1]
    newest = None
    if valid is not None:
        kept = torch.ones(valid.shape[0], slots, dtype=torch.bool, device=valid.device)
        newest = (
            torch.cat([kept, valid], dim=1).long().argsort(dim=1, stable=True)[:, -slots:] if slots else None
        )
    for name, new in (("k", k), ("v", v)):
        tokens = torch.cat([state[name], new.to(state[name].dtype)], dim=1)
        if newest is not None:
            tokens = tokens.gather(1, newest[..., None, None].expand(-1, -1, *tokens.shape[2:]))
        state[name].copy_(tokens[:, tokens.shape[1] - slots :])
    state["seen"] += k.shape[1] if valid is None else valid.sum(1)
