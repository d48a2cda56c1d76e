"""Attention sinks: the first tokens of a sequence, which a window that has left them behind looks at all the same.

Softmax attention leaves there what it has no use for elsewhere, and a window without them fails a model that was
trained with them in sight (StreamingLLM, arXiv 2309.17453).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixers.interface import MixerState
from mixers.layout import TokenLayout
from mixers.softmax import capped


@dataclass(frozen=True)
class Sinks:
    """Keys and values of the sinks of each token, and where it looks at them beside its window.

    Attributes:
        k: [B, N or 1, S, G, P], rotated; 1 where all tokens of a row have the same.
        v: Likewise.
        seen: bool [B, N, S].
    """

    k: Tensor
    v: Tensor
    seen: Tensor


def find_sinks(
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    state: MixerState | None,
    *,
    count: int,
    window: int,
    within_windows: bool,
) -> Sinks:
    """Find the sinks of tokens.

    Args:
        k: [B, N, G, P], rotated.
        v: [B, N, G, P].
        layout: Where the tokens stand.
        state: With the sinks of the tokens before these, from :func:`init_sinks`, and how many there were, ``seen``.
            Updated in place.
        count: Sinks S of a sequence.
        window: The last tokens that a token looks at anyway.
        within_windows: Whether vision tokens look into 3-D windows instead. They then look at the sinks that are text,
            as far as those stand before them.
    """
    places, rank = layout.leading(count), layout.rank
    text = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    if layout.vision is not None:
        text = ~layout.vision
    found = {
        "k": _taken(k, places),
        "v": _taken(v, places),
        "text": _taken(text, places),
        "there": places >= 0,
    }
    if state is not None:
        rank = rank + torch.where(layout.number == 0, state["seen"][:, None], 0)
        _continue(found, state)
    if places.shape[1] > 1:
        found = {name: _taken(table, layout.number[..., None])[:, :, 0] for name, table in found.items()}
    number = torch.arange(count, device=k.device)
    seen = found["there"] & (rank[..., None] - number >= window)
    if within_windows and layout.vision is not None:
        before = found["there"] & found["text"] & (number < rank[..., None])
        seen = torch.where(layout.vision[..., None], before, seen)
    if layout.valid is not None:
        seen = seen & layout.valid[..., None]
    return Sinks(found["k"], found["v"], seen)


def join_sinks(
    q: Tensor, y: Tensor, lse: Tensor, sinks: Sinks, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Let queries that have averaged some values look at their sinks too, as if in one softmax.

    Args:
        q: [B, N, H, P], rotated.
        y: [B, N, H, P], the averages.
        lse: [B, N, H], log Σ exp of their scores, -inf where there were none.
        sinks: Of each token.
        scale: Factor on query·key.
        softcap: Bound of the scores. None: unbounded.
    """
    groups = sinks.k.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)  # scores are large, and bf16 knows 256 of each size
    scores = torch.einsum("bngrp,bnsgp->bngrs", q.to(wide).unflatten(2, (groups, -1)), sinks.k.to(wide))
    scores = capped(scores * scale, softcap).masked_fill(~sinks.seen[:, :, None, None], float("-inf"))
    own = lse.unflatten(2, (groups, -1))[..., None]
    alone = ~sinks.seen.any(-1)[:, :, None, None, None] & (own == float("-inf"))
    weights = torch.cat([own.masked_fill(alone, 0.0), scores], dim=-1).softmax(-1)
    added = torch.einsum("bngrs,bnsgp->bngrp", weights[..., 1:].to(y.dtype), sinks.v.to(y.dtype))
    return weights[..., :1].to(y.dtype).flatten(2, 3) * y + added.flatten(2, 3)


def init_sinks(
    batch_size: int,
    count: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> MixerState:
    """Return the part of a state that holds sinks: ``sink_k``, ``sink_v`` [B, S, G, P], ``sink_text`` bool [B, S]."""
    shape = (batch_size, count, num_kv_heads, head_dim)
    return {
        "sink_k": torch.zeros(shape, dtype=dtype, device=device),
        "sink_v": torch.zeros(shape, dtype=dtype, device=device),
        "sink_text": torch.zeros(batch_size, count, dtype=torch.bool, device=device),
    }


def _taken(table: Tensor, places: Tensor) -> Tensor:
    """Rows of ``table`` [B, N, …] at ``places`` [B, M, S], as [B, M, S, …]."""
    rows = torch.arange(len(table), device=table.device)[:, None, None]
    return table[rows, places.clamp_min(0)]


def _continue(found: dict[str, Tensor], state: MixerState) -> None:
    """Let the first sequence of each row begin with the sinks of a state, and keep what it has then."""
    there = found["there"][:, 0]
    slot = torch.arange(there.shape[1], device=there.device).expand(len(there), -1)
    old, own = slot < state["seen"][:, None], (slot - state["seen"][:, None]).clamp_min(0)

    def first(name: str, kept: Tensor) -> Tensor:
        table = found[name][:, 0]
        shape = (..., *[None] * (table.ndim - 2))
        new = table.gather(1, own[shape].expand(-1, -1, *table.shape[2:]))
        both = torch.where(old[shape], kept.to(table.dtype), new)
        found[name] = torch.cat([both[:, None], found[name][:, 1:]], dim=1)
        return both.detach()

    for name in ("k", "v", "text"):
        state[f"sink_{name}"].copy_(first(name, state[f"sink_{name}"]))
    first("there", torch.ones_like(there))
