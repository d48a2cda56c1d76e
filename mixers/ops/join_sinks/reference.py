"""Attention sinks, joined with what queries have averaged already, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.errors import ShapeError
from mixers.precision import without_autocast
from mixers.softmax import capped


def join_sinks(
    q: Tensor,
    y: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Let queries that have averaged some values look at sinks too, as if in one softmax.

    Args:
        q: [B, N, H, P].
        y: [B, N, H, P], the averages.
        lse: [B, N, H], log Σ exp of their scores; -inf where nothing was averaged.
        k: Keys of the sinks [B, N or 1, S, G, P]; 1 where all tokens of a row have the same.
        v: Values, likewise.
        hidden: bool [B, N, S], the sinks that a token does not look at.
        scale: Factor on query·key.
        softcap: Bound of the scores. None: unbounded.

    Returns:
        [B, N, H, P] in ``y``'s dtype; zero where there is nothing to look at.

    Raises:
        ShapeError: The shapes do not fit each other.
    """
    check(q, y, lse, k, v, hidden)
    groups = k.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)  # scores are large, and bf16 knows 256 of each size

    def by_group(t: Tensor) -> Tensor:
        return t.unflatten(2, (groups, -1)).transpose(1, 2)

    # In the order in which einsum reads them, so that it need not copy them.
    queries = by_group(q).to(wide, memory_format=torch.contiguous_format)
    keys = k.permute(0, 3, 1, 2, 4).to(wide, memory_format=torch.contiguous_format)
    with without_autocast(q.device):
        scores = torch.einsum("bgnrp,bgnsp->bgnrs", queries, keys)
    scores = capped(scores * scale, softcap).masked_fill(hidden[:, None, :, None], float("-inf"))
    own = by_group(lse)[..., None]
    nothing = (own == float("-inf")) & hidden.all(-1)[:, None, :, None, None]
    weights = torch.cat([own.masked_fill(nothing, 0.0), scores], dim=-1).softmax(-1).to(y.dtype)
    rest, others = weights.split([1, scores.shape[-1]], dim=-1)
    added = torch.einsum("bgnrs,bnsgp->bgnrp", others, v.to(y.dtype))
    return (by_group(y).masked_fill(nothing, 0) * rest + added).transpose(1, 2).flatten(2, 3)


def check(q: Tensor, y: Tensor, lse: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> None:
    """Raise ShapeError unless the tensors of :func:`join_sinks` fit each other."""
    batch, length, heads, width = q.shape if q.ndim == 4 else (0, 0, 0, 0)
    tokens, sinks, groups = k.shape[1:4] if k.ndim == 5 else (0, 0, 0)
    fits = (
        groups > 0
        and heads % groups == 0
        and tokens in (1, length)
        and k.shape == v.shape == (batch, tokens, sinks, groups, width)
        and y.shape == q.shape
        and lse.shape == q.shape[:3]
        and hidden.shape == (batch, length, sinks)
    )
    if not fits:
        raise ShapeError(
            "q and y must be [B, N, H, P], lse [B, N, H], k and v [B, N or 1, S, G, P] with H a multiple of G, and "
            f"hidden [B, N, S]; found {[list(t.shape) for t in (q, y, lse, k, v, hidden)]}."
        )
