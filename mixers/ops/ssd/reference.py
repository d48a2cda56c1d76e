"""The SSD scan in plain torch: chunked, linear in time and memory, any device, any float type.

Mamba2's state space duality (arXiv 2405.21060), with C, B, X named as queries, keys and values of
the attention that they come from, extended by LinMU's second direction (arXiv 2601.01322).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixers.errors import ShapeError
from mixers.layout import Scan
from mixers.ops.feature_map.reference import check as check_map
from mixers.ops.feature_map.reference import feature_map
from mixers.ops.finish.reference import finish
from mixers.ops.ssd.blocks import Plan, scan_blocks
from mixers.ops.ssd.chunks import Cut, Tables

CHUNKS_PER_BLOCK = 32

Decay = tuple[Tensor, Tensor]
"""(log_a, dt), each [B, N, E] with E = G (decay per KV head) or H (per head); log_a ≤ 0 ≤ dt."""


def ssd(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    decay: Decay,
    backward_decay: Decay | None = None,
    *,
    scan: Scan | None = None,
    denominator: bool = False,
    initial_state: Tensor | None = None,
    skip: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: Tensor | None = None,
    maps: tuple[Tensor, Tensor] | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Scan tokens forward, and vision tokens backward within their clip.

    With a = exp(log_a), and "before" and "after" along the scan order::

        y_i = Σ_{j ≤ i} (Π_{k=j+1..i} a_k) dt_j (c_i·b_j) x_j
            + [i is vision] Σ_{j > i, same clip} (Π_{k=i..j-1} a'_k) dt'_j (c_i·b_j) x_j

    Padding, and text seen by the backward scan, is an identity step: no input, decay 1. Sums never
    cross from one packed sequence into another. Accumulates in fp32, or fp64 for fp64 inputs.

    Args:
        c: Queries [B, N, H, K], scaled, in token order (as are b, x and the decays).
        b: Keys [B, N, G, K], H a multiple of G; query head h reads KV head h // (H/G).
        x: Values [B, N, G, P].
        decay: (log_a, dt) of the forward scan.
        backward_decay: (log_a, dt) of the backward scan. None: one direction only.
        scan: Reading order and its tables. None: valid text in token order.
        denominator: Divide y by the same sums with x = 1, so that y is a weighted mean of values
            where c·b ≥ 0. The state then has one more column, the denominator's.
        initial_state: [B, E, K, P (+1)], the forward state before the row's first sequence.
        skip: [H], as for :func:`mixers.ops.finish`, which is applied to y where one of these is given.
        norm_weight: [H, P], likewise.
        norm_eps: Likewise.
        gate: [B, N, H, P], likewise.
        maps: Weights [H, P', R] and [G, P', R] for :func:`mixers.ops.feature_map`, which is applied to c and b
            [B, N, H or G, P'] first; K is 2·R then. A kernel makes features again for the gradient, and keeps none.
        chunk_size: Tokens that are mixed by one matrix product. A kernel chooses its own.

    Returns:
        y [B, N, H, P] in token order and in x's dtype, and the forward state after the row's last
        token [B, E, K, P (+1)] in the accumulation dtype.

    Raises:
        ShapeError: The shapes do not fit each other.
    """
    if maps is not None:
        check_maps(c, b, maps)
        c, b = feature_map(c, maps[0]), feature_map(b, maps[1])
    batch, length, heads, width = c.shape
    shape = (batch, decay[0].shape[-1], width, x.shape[-1] + denominator)
    check(c, b, x, decay, backward_decay, initial_state, shape)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    state = torch.zeros(shape, device=c.device) if initial_state is None else initial_state
    state = state.to(accumulate)
    if not length:
        return x.new_zeros(batch, 0, heads, x.shape[-1]), state
    scan = scan or Scan(None, None, None, None, None, None, None)
    both = backward_decay is not None and scan.vision is not None
    tables = Tables(
        _table(scan.valid, True, c),
        _table(scan.sequence, 0, c),
        _table(scan.vision, False, c),
        _table(scan.extent, -1, c),
    )
    chunk = _ceil_div(length, _ceil_div(length, chunk_size))  # even chunks need the least padding
    plan = Plan(scan.order, tables, chunk * CHUNKS_PER_BLOCK, Cut(chunk, denominator, accumulate), both)
    backward = backward_decay if both and backward_decay is not None else ()
    y, state = scan_blocks(plan, state, (c, b, x, *decay, *backward))
    return finished(finish, y, x, skip, norm_weight, norm_eps, gate), state


def finished(
    finish: Callable[..., Tensor],
    y: Tensor,
    x: Tensor,
    skip: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    gate: Tensor | None,
) -> Tensor:
    """Apply ``finish`` to y where there is something to finish."""
    if skip is None and norm_weight is None and gate is None:
        return y
    skip = y.new_zeros(y.shape[2]) if skip is None else skip
    return finish(y, x, skip, norm_weight=norm_weight, norm_eps=norm_eps, gate=gate)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _table(t: Tensor | None, fill: bool | int, like: Tensor) -> Tensor:
    return torch.full(like.shape[:2], fill, device=like.device) if t is None else t


def check(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    decay: Decay,
    backward_decay: Decay | None,
    initial_state: Tensor | None,
    state_shape: tuple[int, ...],
) -> None:
    """Raise ShapeError unless the arguments of :func:`ssd` fit each other."""
    batch, length, heads, _ = c.shape
    groups = b.shape[2]
    if heads % groups or b.shape != (batch, length, groups, c.shape[3]) or x.shape[:3] != b.shape[:3]:
        raise ShapeError(
            f"c [B, N, H, K], b [B, N, G, K] and x [B, N, G, P] do not fit: found {list(c.shape)}, "
            f"{list(b.shape)} and {list(x.shape)}."
        )
    for name, pair in (("decay", decay), ("backward_decay", backward_decay)):
        for t in pair or ():
            if (
                t.shape[:2] != (batch, length)
                or t.shape[2] not in (groups, heads)
                or t.shape != decay[0].shape
            ):
                raise ShapeError(
                    f"{name} must be two tensors [B, N, E] with E = {groups} or {heads}, found {list(t.shape)}."
                )
    if initial_state is not None and initial_state.shape != state_shape:
        raise ShapeError(
            f"initial_state must be [B, E, K, P (+1)] = {list(state_shape)}, found {list(initial_state.shape)}."
        )


def check_maps(c: Tensor, b: Tensor, maps: tuple[Tensor, Tensor]) -> int:
    """Return the width K of the features of c and b; raise ShapeError unless maps fit these and each other."""
    for t, weight in zip((c, b), maps):
        check_map(t, weight)
    if maps[0].shape[2] != maps[1].shape[2]:
        raise ShapeError(
            f"maps must give c and b as many features, found {maps[0].shape[2]} and {maps[1].shape[2]}."
        )
    return 2 * maps[0].shape[2]
