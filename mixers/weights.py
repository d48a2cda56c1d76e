"""How much of each token's value is in some outputs: the weights of attention and of scans, written out.

Mixers never write them out, since N outputs of N tokens are N² numbers; of Q outputs they are Q·N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mixers.blocks import window_cells
from mixers.interface import Rotary, TokenMixer
from mixers.layout import Grid, Scan, TokenLayout
from mixers.ops.ssd.reference import Decay
from mixers.precision import without_autocast
from mixers.rotary import apply_rotary
from mixers.softmax import softmax_weights

T = TypeVar("T")


def at(table: Tensor, tokens: Tensor) -> Tensor:
    """Return rows ``tokens`` [B, Q] of a table [B or 1, N, …]: [B, Q, …]."""
    index = tokens[(..., *[None] * (table.ndim - 2))].expand(-1, -1, *table.shape[2:])
    return table.expand(len(tokens), *table.shape[1:]).gather(1, index)


def kept_for(layout: TokenLayout, queries: Tensor, name: Any, compute: Callable[[], T]) -> T:
    """Return what follows from a layout and some of its tokens: computed once for all layers, and kept until others
    are asked about.

    Args:
        layout: Where the tokens stand.
        queries: int [B, Q], told from others as an object.
        name: What is computed.
        compute: Computes it.
    """
    memo: dict[Any, Any] = layout.kept("of queries", dict)
    if memo.get("queries") is not queries:
        memo.clear()
        memo["queries"] = queries
    if name not in memo:
        memo[name] = compute()
    return memo[name]


class SoftmaxMixer(TokenMixer):
    """A mixer of softmax attention to what :meth:`seen` says."""

    uses_softcap = True

    @property
    def averages(self) -> bool:
        """True."""
        return True

    def seen(self, layout: TokenLayout, queries: Tensor) -> Tensor:
        """Tell what tokens look at.

        Args:
            layout: Where the tokens stand.
            queries: int [B, Q], those that look.

        Returns:
            bool [B, Q, N].
        """
        raise NotImplementedError

    def weigh_heads(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        queries: Tensor,
        layout: TokenLayout,
        rotary: Rotary | None,
    ) -> Tensor:
        """Weigh by the softmax of scores; see :meth:`TokenMixer.weigh_heads`."""
        q = at(q, queries)
        if rotary is not None:
            cos, sin = rotary
            q, k = apply_rotary(q, at(cos, queries), at(sin, queries)), apply_rotary(k, cos, sin)
        q, k, seen = q.transpose(1, 2), k.transpose(1, 2), self.seen(layout, queries)[:, None]
        return softmax_weights(q, k, seen, scale=self.scale, softcap=self.config.softcap)[0]


def scan_weights(
    c: Tensor,
    b: Tensor,
    decay: Decay,
    backward_decay: Callable[[], Decay | None],
    layout: TokenLayout,
    scan: Scan,
    queries: Tensor,
) -> Tensor:
    """Weights of :func:`mixers.ops.ssd` with a denominator.

    Args:
        c: [B, Q, H, K], of the queries alone.
        b: [B, N, G, K], in token order, as are the decays.
        decay: (log_a, dt), each [B, N, E].
        backward_decay: Gives the like of the backward scan, None for one direction only. Called if queries are vision.
        layout: Where the tokens stand.
        scan: One of its reading orders.
        queries: int [B, Q], the tokens whose outputs are asked about.

    Returns:
        fp32 or wider [B, H, Q, N].
    """
    groups = b.shape[2]
    wide = torch.promote_types(c.dtype, torch.float32)
    before, after = kept_for(layout, queries, ("scan", id(scan)), lambda: _reached(layout, scan, queries))
    sums, dt = _read(decay, scan, layout.padding)
    kept = _kept(sums, dt, queries, before, wide)
    backward = None if after is None else backward_decay()
    if after is not None and backward is not None and layout.vision is not None:
        sums, dt = _read(backward, scan, ~layout.vision)
        until = sums - backward[0].transpose(1, 2)  # what a query itself forgets is counted
        kept = kept + _kept(-until, dt, queries, after, wide)

    with without_autocast(c.device):
        c = c.to(wide).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        alike = c @ b.to(wide).permute(0, 2, 3, 1)
    weights = (alike.view(len(c), kept.shape[1], -1, *kept.shape[2:]) * kept[:, :, None]).flatten(1, 2)
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(wide).tiny)


def recent_seen(
    layout: TokenLayout, queries: Tensor, *, window: int, sinks: int, grid_windows: tuple[Grid, bool] | None
) -> Tensor:
    """Tell what some tokens look at in :func:`mixers.recent.recent_attention`, whose arguments these are.

    Args:
        layout: Where the tokens stand.
        queries: int [B, Q].
        window: Last tokens that a token looks at; 0: none.
        sinks: First tokens of a sequence that it looks at besides.
        grid_windows: (size, shifted) of the 3-D windows in which vision tokens look instead.

    Returns:
        bool [B, Q, N].
    """
    name = ("recent", window, sinks, grid_windows)
    return kept_for(layout, queries, name, lambda: _recent(layout, queries, window, sinks, grid_windows))


def _recent(
    layout: TokenLayout, queries: Tensor, window: int, sinks: int, grid_windows: tuple[Grid, bool] | None
) -> Tensor:
    back = at(layout.rank, queries)[..., None] - layout.rank[:, None]
    same = at(layout.number, queries)[..., None] == layout.number[:, None]
    if layout.valid is not None:
        same = same & layout.valid[:, None] & at(layout.valid, queries)[..., None]
    first = (layout.rank < sinks)[:, None]
    seen = (back >= 0) & ((back < window) | first)
    vision = layout.vision
    if grid_windows is not None and layout.clip is not None and vision is not None:
        inside = at(vision, queries)[..., None]
        seen = torch.where(inside, first & ~vision[:, None] & (back > 0), seen)
        seen = seen | (inside & _same_window(layout, queries, *grid_windows))
    return seen & same


def _same_window(layout: TokenLayout, queries: Tensor, size: Grid, shifted: bool) -> Tensor:
    assert layout.clip is not None
    assert layout.coords is not None
    cell = torch.cat([layout.clip[..., None], window_cells(layout.coords, size, shifted)], dim=-1)
    return (at(cell, queries)[:, :, None] == cell[:, None]).all(-1)


def _reached(layout: TokenLayout, scan: Scan, queries: Tensor) -> tuple[Tensor, Tensor | None]:
    """What queries read before and after them in reading order, bool [B, Q, N]; None: none of them reads backward."""
    step = scan.inverse
    if step is None:
        step = torch.arange(layout.length, device=queries.device).expand(layout.batch_size, -1)
    back = at(step, queries)[..., None] - step[:, None]
    before = back >= 0
    if layout.valid is not None:
        before = before & layout.valid[:, None]
    if layout.sequence is not None:
        before = before & (at(layout.sequence, queries)[..., None] == layout.sequence[:, None])
    if layout.vision is None or layout.extent is None:
        return before, None
    looks = at(layout.vision, queries)
    if not looks.any():
        return before, None
    same = at(layout.extent, queries)[..., None] == layout.extent[:, None]
    return before, same & (back < 0) & looks[..., None] & layout.vision[:, None]


def _read(decay: Decay, scan: Scan, skipped: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of log_a up to each token in reading order, fp64, and dt; [B, E, N], 0 added by what is skipped."""
    if skipped is not None:
        decay = decay[0].masked_fill(skipped[..., None], 0), decay[1].masked_fill(skipped[..., None], 0)
    log_a, dt = (t.transpose(1, 2) for t in decay)
    if scan.order is None or scan.inverse is None:
        return log_a.double().cumsum(-1), dt
    order, inverse = (t[:, None].expand_as(dt) for t in (scan.order, scan.inverse))
    return log_a.gather(2, order).double().cumsum(-1).gather(2, inverse), dt


def _kept(sums: Tensor, dt: Tensor, queries: Tensor, reached: Tensor, wide: torch.dtype) -> Tensor:
    """What queries have left of what they reach, bool [B, Q, N]: [B, E, Q, N]."""
    own = sums.gather(2, queries[:, None].expand(-1, sums.shape[1], -1))
    log = (own[..., None] - sums[:, :, None]).to(wide)
    return log.masked_fill(~reached[:, None], float("-inf")).exp() * dt.to(wide)[:, :, None]
