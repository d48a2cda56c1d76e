"""The SSD sums of one block of tokens, chunk by chunk: matrix products inside a chunk, states between."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

DENOMINATOR_FLOOR = 1e-6


class Tables(NamedTuple):
    """What the steps of a block are, each [B, N] in reading order; see :class:`~mixers.layout.Scan`."""

    valid: Tensor
    sequence: Tensor
    vision: Tensor
    extent: Tensor


class Cut(NamedTuple):
    """How a block is cut and summed: the chunk size, whether to divide, and the type to sum in."""

    chunk: int
    denominator: bool
    accumulate: torch.dtype


class Edge(NamedTuple):
    """A state [B, E, K, P (+1)] at the edge of a block, and the segment [B] that it is of."""

    state: Tensor
    segment: Tensor


def mix_block(
    inputs: tuple[Tensor, ...], tables: Tables, cut: Cut, before: Edge, after: Edge | None
) -> tuple[Tensor, Tensor]:
    """Mix the tokens of a block.

    Args:
        inputs: c, b, x, log_a, dt (and the backward log_a, dt) of the block.
        tables: What its steps are.
        cut: How it is cut.
        before: Forward state before the block, and the sequence that it is of.
        after: Backward state after the block, and the clip extent that it is of. None: one direction.

    Returns:
        y of the block and the forward state after it.
    """
    length, dtype = inputs[0].shape[1], inputs[2].dtype
    c, b, x, sequence, vision, extent, *decays = _chunked(inputs, tables, cut)
    log_a, dt = decays[:2]
    c = rearrange(c, "b n q (g r) k -> b n g r q k", g=b.shape[3])
    scores = c @ rearrange(b, "b n q g k -> b n g 1 k q")

    total, pairs = _totals(log_a, sequence)
    weight = _weights(total, dt, pairs)
    if after is not None:
        back_log_a, back_dt = decays[2:]
        back_total, pairs = _totals(back_log_a, extent)
        back_before = back_total - back_log_a
        weight = weight + _weights(-back_before, back_dt, pairs.mT & ~pairs & vision[:, :, :, None])
    y = (scores * weight) @ rearrange(x, "b n q g p -> b n g 1 q p")

    last = sequence[:, :, -1]
    entering = torch.cat([before.segment[:, None], last[:, :-1]], dim=1)
    to_end = _exp_where(sequence == last[:, :, None], total[:, :, -1:] - total) * dt
    keep = _exp_where(last == entering, total[:, :, -1])
    states, state = _carry(before.state, keep, _outer(to_end, b, x))
    reach = _exp_where(sequence == entering[:, :, None], total)
    y = y + rearrange(reach, "b n q g -> b n g 1 q 1") * (c @ states[:, :, :, None])

    if after is not None:
        states, _ = _sweep(b, x, back_total, back_before, back_dt, extent, after)
        following = torch.cat([extent[:, 1:, 0], after.segment[:, None]], dim=1)
        reach = _exp_where((extent == following[:, :, None]) & vision, back_total[:, :, -1:] - back_before)
        y = y + rearrange(reach, "b n q g -> b n g 1 q 1") * (c @ states[:, :, :, None])

    y = divided(rearrange(y, "b n g r q p -> b (n q) (g r) p"), cut.denominator)
    return y[:, :length].to(dtype), state


def sweep_block(inputs: tuple[Tensor, ...], tables: Tables, cut: Cut, after: Edge) -> Tensor:
    """Return the backward state before a block from that after it; arguments as for :func:`mix_block`."""
    _, b, x, _, _, extent, _, _, log_a, dt = _chunked(inputs, tables, cut)
    total, _ = _totals(log_a, extent)
    return _sweep(b, x, total, total - log_a, dt, extent, after)[1]


def with_ones(x: Tensor, denominator: bool) -> Tensor:
    """Append the column of ones whose sums are the denominator."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if denominator else x


def divided(y: Tensor, denominator: bool) -> Tensor:
    """Divide by the last column; the inverse of :func:`with_ones`."""
    return y[..., :-1] / y[..., -1:].clamp_min(DENOMINATOR_FLOOR) if denominator else y


def _chunked(inputs: tuple[Tensor, ...], tables: Tables, cut: Cut) -> list[Tensor]:
    """Cut c, b, x, sequence, vision, extent, decays into [B, n, Q, …]; make identity steps so."""
    c, b, x, *decays = (t.to(cut.accumulate) for t in inputs)
    valid, sequence, vision, extent = tables
    x = with_ones(x, cut.denominator)
    if (group := decays[0].shape[2] // b.shape[2]) > 1:
        b, x = (t.repeat_interleave(group, dim=2) for t in (b, x))
    decays = [d * active[..., None] for d, active in zip(decays, (valid, valid, vision, vision))]
    if short := -c.shape[1] % cut.chunk:
        c, b, x = (F.pad(t, (0, 0, 0, 0, 0, short)) for t in (c, b, x))
        decays = [F.pad(t, (0, 0, 0, short)) for t in decays]
        # The steps added go on with the last sequence and extent, so that states pass through them.
        sequence, extent = (torch.cat([t, t[:, -1:].expand(-1, short)], 1) for t in (sequence, extent))
        vision = F.pad(vision, (0, short))
    return [t.unflatten(1, (-1, cut.chunk)) for t in (c, b, x, sequence, vision, extent, *decays)]


def _totals(log_a: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of log_a over a chunk, begun anew at each segment, and the pairs j ≤ i of one segment.

    Masked products rather than a cumsum, whose rounding would let one packed sequence reach another.
    """
    size = segment.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segment.device).tril()
    pairs = causal & (segment[:, :, :, None] == segment[:, :, None])
    return pairs.to(log_a.dtype) @ log_a, pairs


def _weights(total: Tensor, dt: Tensor, mask: Tensor) -> Tensor:
    """exp(total_i - total_j)·dt_j where mask, else 0; [B, n, Q, E] → [B, n, E, 1, Q, Q]."""
    difference = rearrange(total, "b n i g -> b n g i 1") - rearrange(total, "b n j g -> b n g 1 j")
    weight = difference.masked_fill_(~mask[:, :, None], float("-inf")).exp()
    return (weight * rearrange(dt, "b n j g -> b n g 1 j"))[:, :, :, None]


def _exp_where(mask: Tensor, log: Tensor) -> Tensor:
    """exp(log) where mask, else 0, whatever stands there; mask […], log […, E]."""
    return log.masked_fill(~mask[..., None], float("-inf")).exp()


def _outer(weight: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Σ_q weight_q b_q x_qᵀ of each chunk, [B, n, E, K, P]."""
    return torch.einsum("bnqg,bnqgk,bnqgp->bngkp", weight, b, x)


def _sweep(
    b: Tensor, x: Tensor, total: Tensor, before: Tensor, dt: Tensor, extent: Tensor, after: Edge
) -> tuple[Tensor, Tensor]:
    """Backward states that enter each chunk from the right, and the one that leaves the block on the left."""
    first = extent[:, :, 0]
    weight = _exp_where(extent == first[:, :, None], before) * dt
    following = torch.cat([first[:, 1:], after.segment[:, None]], dim=1)
    keep = _exp_where(first == following, total[:, :, -1])
    states, state = _carry(after.state, keep.flip(1), _outer(weight, b, x).flip(1))
    return states.flip(1), state


def _carry(state: Tensor, keep: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Run s ← keep_n s + sums_n over chunks; return the state entering each chunk, and the last."""
    states = []
    for kept, added in zip(keep.unbind(1), sums.unbind(1)):
        states.append(state)
        state = kept[..., None, None] * state + added
    return torch.stack(states, dim=1), state
