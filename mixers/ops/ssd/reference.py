"""The SSD scan in plain torch: chunked, linear in time and memory, any device, any float type.

Mamba2's state space duality (arXiv 2405.21060), with C, B, X named as queries, keys and values of
the attention that they come from, extended by LinMU's second direction (arXiv 2601.01322).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mixers.errors import ShapeError
from mixers.layout import Scan

CHUNKS_PER_BLOCK = 32
DENOMINATOR_FLOOR = 1e-6

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
        chunk_size: Tokens that are mixed by one matrix product.

    Returns:
        y [B, N, H, P] in token order and in x's dtype, and the forward state after the row's last
        token [B, E, K, P (+1)] in the accumulation dtype.

    Raises:
        ShapeError: The shapes do not fit each other.
    """
    batch, length, heads, width = c.shape
    shape = (batch, decay[0].shape[-1], width, x.shape[-1] + denominator)
    _check(c, b, x, decay, backward_decay, initial_state, shape)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    state = torch.zeros(shape, device=c.device) if initial_state is None else initial_state
    state = state.to(accumulate)
    if not length:
        return x.new_zeros(batch, 0, heads, x.shape[-1]), state
    scan = scan or Scan(None, None, None, None, None, None, None)
    both = backward_decay is not None and scan.vision is not None
    inputs = (c, b, x, *decay, *(backward_decay if both and backward_decay is not None else ()))
    tables = [
        _table(t, batch, length, c.device, fill)
        for t, fill in zip((scan.valid, scan.sequence, scan.vision, scan.extent), (True, 0, False, -1))
    ]
    chunk_size = _ceil_div(length, _ceil_div(length, chunk_size))  # even chunks need the least padding
    step = chunk_size * CHUNKS_PER_BLOCK
    order, learning = scan.order, torch.is_grad_enabled()
    if order is not None and learning:  # at once: taken by blocks, every block's gradient would be N long
        inputs, order = tuple(_take(t, order) for t in inputs), None
    orders = None if order is None else order.split(step, dim=1)
    slices, masks = (list(zip(*(t.split(step, dim=1) for t in ts))) for ts in (inputs, tables))

    def block(i: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return slices[i] if orders is None else tuple(_take(t, orders[i]) for t in inputs), masks[i]

    parts, y = [], x.new_empty(0 if learning else batch, length, heads, x.shape[-1])
    after: list[tuple[Tensor, Tensor] | None] = [None] * len(masks)
    entering = tables[1][:, 0]
    with _without_autocast(c.device):
        if both:
            after = _backward_states(block, len(masks), chunk_size, denominator, accumulate, shape)
        for i, later in enumerate(after):
            arguments = (*block(i), state, entering, later, chunk_size, denominator, accumulate)
            if learning and len(masks) > 1:
                part, state = checkpoint(_block, *arguments, use_reentrant=False)
            else:
                part, state = _block(*arguments)
            entering = masks[i][1][:, -1]
            if learning:
                parts.append(part)
            elif orders is None:
                y[:, i * step : (i + 1) * step] = part
            else:
                y.flatten(0, 1).index_copy_(0, _flat(orders[i], length), part.flatten(0, 1))
    if learning:
        y = torch.cat(parts, dim=1)
        y = y if scan.inverse is None else _take(y, scan.inverse)
    return y, state


def ssd_step(
    c: Tensor, b: Tensor, x: Tensor, decay: Decay, state: Tensor, *, denominator: bool = False
) -> Tensor:
    """Advance the forward scan by one text token, updating ``state`` in place.

    Args:
        c: [B, H, K].
        b: [B, G, K].
        x: [B, G, P].
        decay: (log_a, dt), each [B, E].
        state: [B, E, K, P (+1)], as :func:`ssd` returns it.
        denominator: As for :func:`ssd`.

    Returns:
        y [B, H, P] in x's dtype.
    """
    dtype = x.dtype
    log_a, dt = (t.to(state.dtype) for t in decay)
    heads = state.shape[1]
    b, x = (
        t.to(state.dtype).repeat_interleave(heads // t.shape[1], dim=1)
        for t in (b, _with_ones(x, denominator))
    )
    state.mul_(log_a.exp()[..., None, None]).add_((dt[..., None] * b)[..., None] * x[:, :, None])
    grouped = rearrange(c.to(state.dtype), "b (e r) k -> b e r k", e=heads)
    with _without_autocast(c.device):
        y = rearrange(grouped @ state, "b e r p -> b (e r) p")
    return _divided(y, denominator).to(dtype)


def _block(
    inputs: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    state: Tensor,
    entering: Tensor,
    later: tuple[Tensor, Tensor] | None,
    chunk: int,
    denominator: bool,
    accumulate: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Scan a block of chunks.

    Args:
        inputs: c, b, x, log_a, dt (and the backward log_a, dt) of the block.
        tables: valid, sequence, vision, extent of the block.
        state: Forward state before the block.
        entering: [B] the sequence that the state is of.
        later: Backward state after the block and the extent [B] that it is of.
        chunk: Chunk size.
        denominator: As for :func:`ssd`.
        accumulate: Type to sum in.

    Returns:
        y of the block and the forward state after it.
    """
    length, dtype = inputs[0].shape[1], inputs[2].dtype
    c, b, x, _valid, sequence, vision, extent, *decays = _chunked(
        inputs, tables, chunk, denominator, accumulate
    )
    log_a, dt = decays[:2]
    groups = b.shape[3]
    c = rearrange(c, "b n q (g r) k -> b n g r q k", g=groups)
    scores = c @ rearrange(b, "b n q g k -> b n g 1 k q")

    total, pairs = _totals(log_a, sequence)
    weight = _weights(total, total, dt, pairs)
    if later is not None:
        back_dt = decays[3]
        back_total, pairs = _totals(decays[2], extent)
        back_before = back_total - decays[2]
        later_pairs = pairs.mT & ~pairs & vision[:, :, :, None]
        weight = weight + _weights(-back_before, -back_before, back_dt, later_pairs)
    y = (scores * weight) @ rearrange(x, "b n q g p -> b n g 1 q p")

    last = sequence[:, :, -1]
    before = torch.cat([entering[:, None], last[:, :-1]], dim=1)
    to_end = _exp_where(sequence == last[:, :, None], total[:, :, -1:] - total) * dt
    sums = torch.einsum("bnqg,bnqgk,bnqgp->bngkp", to_end, b, x)
    keep = _exp_where(last == before, total[:, :, -1])
    states, state = _carry(state, keep, sums)
    reach = _exp_where(sequence == before[:, :, None], total)
    y = y + rearrange(reach, "b n q g -> b n g 1 q 1") * (c @ states[:, :, :, None])

    if later is not None:
        g_state, g_extent = later
        sums, keep = _backward_sums(b, x, back_before, back_total, back_dt, extent, g_extent)
        states, _ = _carry(g_state, keep.flip(1), sums.flip(1))
        following = torch.cat([extent[:, 1:, 0], g_extent[:, None]], dim=1)
        reach = _exp_where((extent == following[:, :, None]) & vision, back_total[:, :, -1:] - back_before)
        y = y + rearrange(reach, "b n q g -> b n g 1 q 1") * (c @ states.flip(1)[:, :, :, None])

    y = _divided(rearrange(y, "b n g r q p -> b (n q) (g r) p"), denominator)
    return y[:, :length].to(dtype), state


def _backward_states(
    block: Callable[[int], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]],
    blocks: int,
    chunk: int,
    denominator: bool,
    accumulate: torch.dtype,
    shape: tuple[int, ...],
) -> list[tuple[Tensor, Tensor] | None]:
    """For each block, the backward state of all that comes after it and the extent it is of."""
    given, masks = block(blocks - 1)
    state = torch.zeros(shape, dtype=accumulate, device=given[0].device)
    extent = torch.full_like(masks[3][:, 0], -1)
    after: list[tuple[Tensor, Tensor] | None] = [(state, extent)]
    for i in range(blocks - 1, 0, -1):
        given, masks = block(i)

        def sweep(
            state: Tensor,
            extent: Tensor,
            given: tuple[Tensor, ...] = given,
            masks: tuple[Tensor, ...] = masks,
        ) -> Tensor:
            _, b, x, _, _, _, extents, *decays = _chunked(given, masks, chunk, denominator, accumulate)
            total, _ = _totals(decays[2], extents)
            sums, keep = _backward_sums(b, x, total - decays[2], total, decays[3], extents, extent)
            return _carry(state, keep.flip(1), sums.flip(1))[1]

        if torch.is_grad_enabled():
            state = checkpoint(sweep, state, extent, use_reentrant=False)
        else:
            state = sweep(state, extent)
        extent = masks[3][:, 0]
        after.append((state, extent))
    return after[::-1]


def _backward_sums(
    b: Tensor, x: Tensor, before: Tensor, total: Tensor, dt: Tensor, extent: Tensor, later: Tensor
) -> tuple[Tensor, Tensor]:
    """Each chunk's own backward state at its start, and how much of the later state gets there."""
    first = extent[:, :, 0]
    weight = _exp_where(extent == first[:, :, None], before) * dt
    sums = torch.einsum("bnqg,bnqgk,bnqgp->bngkp", weight, b, x)
    following = torch.cat([first[:, 1:], later[:, None]], dim=1)
    return sums, _exp_where(first == following, total[:, :, -1])


def _carry(state: Tensor, keep: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Run s ← keep_n s + sums_n over chunks; return the state entering each chunk, and the last."""
    states = []
    for kept, added in zip(keep.unbind(1), sums.unbind(1)):
        states.append(state)
        state = kept[..., None, None] * state + added
    return torch.stack(states, dim=1), state


def _totals(log_a: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of log_a over a chunk, begun anew at each segment, and the pairs j ≤ i of one segment.

    Masked products rather than a cumsum, whose rounding would let one packed sequence reach another.
    """
    size = segment.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segment.device).tril()
    pairs = causal & (segment[:, :, :, None] == segment[:, :, None])
    return pairs.to(log_a.dtype) @ log_a, pairs


def _exp_where(mask: Tensor, log: Tensor) -> Tensor:
    """exp(log) where mask, else 0, whatever stands there; mask [...], log [..., E]."""
    return log.masked_fill(~mask[..., None], float("-inf")).exp()


def _weights(at: Tensor, start: Tensor, dt: Tensor, mask: Tensor) -> Tensor:
    """exp(at_i - start_j)·dt_j where mask, else 0; [B, n, Q, E] twice → [B, n, E, 1, Q, Q]."""
    difference = rearrange(at, "b n i g -> b n g i 1") - rearrange(start, "b n j g -> b n g 1 j")
    weight = difference.masked_fill_(~mask[:, :, None], float("-inf")).exp()
    return (weight * rearrange(dt, "b n j g -> b n g 1 j"))[:, :, :, None]


def _chunked(
    inputs: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    chunk: int,
    denominator: bool,
    accumulate: torch.dtype,
) -> list[Tensor]:
    """Cut a block into chunks [B, n, Q, …], in the accumulation dtype, with identity steps made so."""
    c, b, x, *decays = (t.to(accumulate) for t in inputs)
    valid, sequence, vision, extent = tables
    x = _with_ones(x, denominator)
    if (group := decays[0].shape[2] // b.shape[2]) > 1:
        b, x = (t.repeat_interleave(group, dim=2) for t in (b, x))
    active = [valid, valid, vision, vision]
    decays = [d * m[..., None] for d, m in zip(decays, active)]
    short = -c.shape[1] % chunk
    if short:
        c, b, x = (F.pad(t, (0, 0, 0, 0, 0, short)) for t in (c, b, x))
        decays = [F.pad(t, (0, 0, 0, short)) for t in decays]
        # The steps added go on with the last sequence and extent, so that states pass through them.
        sequence, extent = (torch.cat([t, t[:, -1:].expand(-1, short)], 1) for t in (sequence, extent))
        valid, vision = (F.pad(t, (0, short)) for t in (valid, vision))
    return [t.unflatten(1, (-1, chunk)) for t in (c, b, x, valid, sequence, vision, extent, *decays)]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _with_ones(x: Tensor, denominator: bool) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if denominator else x


def _divided(y: Tensor, denominator: bool) -> Tensor:
    return y[..., :-1] / y[..., -1:].clamp_min(DENOMINATOR_FLOOR) if denominator else y


def _take(t: Tensor, order: Tensor) -> Tensor:
    """Take tokens of t [B, N, …] as order [B, S] says."""
    return t.flatten(0, 1).index_select(0, _flat(order, t.shape[1])).unflatten(0, order.shape)


def _flat(order: Tensor, length: int) -> Tensor:
    """Indices [B, S] into rows as indices [B·S] into all tokens."""
    rows = torch.arange(len(order), device=order.device)[:, None] * length
    return (rows + order).flatten()


def _table(t: Tensor | None, batch: int, length: int, device: torch.device, fill: bool | int) -> Tensor:
    return torch.full((batch, length), fill, device=device) if t is None else t


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Keep a region of lower precision around the op from narrowing its sums."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _check(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    decay: Decay,
    backward_decay: Decay | None,
    initial_state: Tensor | None,
    state_shape: tuple[int, ...],
) -> None:
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
