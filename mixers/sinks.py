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


@dataclass(frozen=True)
class Sinks:
    """Keys and values of the sinks of each token, and which of them it does not look at.

    Attributes:
        k: [B, N or 1, S, G, P], rotated; 1 where all tokens of a row have the same.
        v: Likewise.
        hidden: bool [B, N, S]; a token looks at the others beside its window.
    """

    k: Tensor
    v: Tensor
    hidden: Tensor


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
    found = {"k": _leading(k, layout, count), "v": _leading(v, layout, count)}
    if state is None:
        hidden = hidden_sinks(layout, count=count, window=window, within_windows=within_windows)
    else:
        found |= _standing(layout, count)
        rank = layout.rank + torch.where(layout.number == 0, state["seen"][:, None], 0)
        _continue(found, state)
        hidden = _hidden(layout, rank, found["text"], found["missing"], window, within_windows)
    return Sinks(_by_token(found["k"], layout), _by_token(found["v"], layout), hidden)


def hidden_sinks(layout: TokenLayout, *, count: int, window: int, within_windows: bool) -> Tensor:
    """Tell which sinks tokens do not look at where no state came before; the layout keeps it.

    Args:
        layout: Where the tokens stand.
        count: As for :func:`find_sinks`.
        window: Likewise.
        within_windows: Likewise.

    Returns:
        bool [B, N, S].
    """
    return layout.kept(
        ("hidden sinks", count, window, within_windows),
        lambda: _hidden(
            layout, layout.rank, **_standing(layout, count), window=window, within_windows=within_windows
        ),
    )


def prepare_sinks(
    layout: TokenLayout, *, count: int, window: int, within_windows: bool, cached: bool
) -> None:
    """Make the tables that :func:`find_sinks` asks of a layout, with a state or without one."""
    _rows(layout, count)
    if not cached:
        hidden_sinks(layout, count=count, window=window, within_windows=within_windows)


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


def _leading(table: Tensor, layout: TokenLayout, count: int) -> Tensor:
    """Rows of ``table`` [B, N, …] that are sinks, by sequence [B, sequences, S, …]; any where there are fewer."""
    shape = (*layout.leading(count).shape, *table.shape[2:])
    return table.flatten(0, 1).index_select(0, _rows(layout, count)).view(shape)


def _rows(layout: TokenLayout, count: int) -> Tensor:
    """Flat indices b·N + i of the sinks, by sequence; the layout keeps them."""

    def compute() -> Tensor:
        row = torch.arange(layout.batch_size, device=layout.device)[:, None, None]
        return (row * layout.length + layout.leading(count).clamp_min(0)).flatten()

    return layout.kept(("rows of sinks", count), compute)


def _by_token(table: Tensor, layout: TokenLayout) -> Tensor:
    """What the sequence of each token has of ``table`` [B, sequences, S, …]: [B, N, S, …], or [B, 1, S, …]."""
    if table.shape[1] == 1:
        return table
    return table[torch.arange(len(table), device=table.device)[:, None], layout.number]


def _standing(layout: TokenLayout, count: int) -> dict[str, Tensor]:
    """Whether sinks are text, and whether they are missing: bool [B, sequences, S] each."""
    missing = layout.leading(count) < 0
    vision = layout.vision
    text = torch.ones_like(missing) if vision is None else _leading(~vision, layout, count)
    return {"text": text, "missing": missing}


def _hidden(
    layout: TokenLayout, rank: Tensor, text: Tensor, missing: Tensor, window: int, within_windows: bool
) -> Tensor:
    """Which sinks, of those that :func:`_standing` tells of, tokens of a rank do not look at; bool [B, N, S]."""
    number, rank = torch.arange(missing.shape[2], device=missing.device), rank[..., None]
    text, missing = _by_token(text, layout), _by_token(missing, layout)
    hidden = missing | (rank - number < window)
    if within_windows and layout.vision is not None:
        hidden = torch.where(layout.vision[..., None], missing | ~text | (number >= rank), hidden)
    return hidden if layout.padding is None else hidden | layout.padding[..., None]


def _continue(found: dict[str, Tensor], state: MixerState) -> None:
    """Let the first sequence of each row begin with the sinks of a state, and keep what it has then."""
    missing = found["missing"][:, 0]
    slot = torch.arange(missing.shape[1], device=missing.device).expand(len(missing), -1)
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
    first("missing", torch.zeros_like(missing))
