"""The backward pass on the host: states again, their gradients carried back, then each chunk's."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.ops import triton_support
from mixers.ops.ssd.chunks import DENOMINATOR_FLOOR
from mixers.ops.ssd.triton.forward import Inputs, carry, entering_states, sum_all_decays
from mixers.ops.ssd.triton.gradients import (
    input_gradients,
    input_gradients_through_states,
    query_gradients,
    state_gradients,
)
from mixers.ops.ssd.triton.launch import BackwardCut, backward_cuts, dots, first_fitting


def scan_backward(
    inputs: Inputs, first: Tensor | None, y: Tensor, denominators: Tensor, grad_y: Tensor, grad_last: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the gradients of c, b, x and each decay, and that of the first state.

    Args:
        inputs: As for the forward.
        first: Likewise.
        y: [B, N, H, P], what the forward returned.
        denominators: Likewise.
        grad_y: [B, N, H, P].
        grad_last: [B, E, K, P (+1)] in fp32.
    """
    width, values, x = inputs.c.shape[-1], inputs.x.shape[-1], inputs.x
    grad_y = grad_y.contiguous()
    with triton_support.on_device(x):
        return first_fitting(
            backward_cuts(width, values, x.dtype, x.device),
            inputs.kind,
            lambda cut: _scan_backward(inputs, first, y, denominators, grad_y, grad_last, cut),
        )


def _scan_backward(
    inputs: Inputs,
    first: Tensor | None,
    y: Tensor,
    denominators: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
    cut: BackwardCut,
) -> tuple[tuple[Tensor, ...], Tensor]:
    c, b, x, tables = inputs.c, inputs.b, inputs.x, inputs.tables
    batch, length, heads, width = c.shape
    groups, values = x.shape[2:]
    e, d = inputs.heads, inputs.directions
    sums = sum_all_decays(inputs, cut.chunk)
    states = entering_states(inputs, sums, cut, first)
    programs = batch * sums.chunks * e
    shape = {
        "K": width,
        "P": values,
        "Q": cut.chunk,
        "BLOCK_P": cut.p,
        "BOTH": inputs.both,
        "DENOMINATOR": inputs.denominator,
        "TERMS": inputs.terms,
        **dots(x),
    }
    counts = (length, sums.chunks, batch)
    segments = (tables.sequence, tables.extent)
    grad_c = c.new_empty(c.shape)
    grad_ones = x.new_empty(denominators.shape, dtype=torch.float32)
    by_step = (d, batch, e, sums.chunks * cut.chunk)
    reached = x.new_empty(by_step, dtype=torch.float32)
    query_gradients[(programs,)](
        c,
        b,
        x,
        y,
        grad_y,
        denominators,
        grad_c,
        grad_ones,
        reached,
        states.values,
        states.ones,
        sums.values,
        sums.ends,
        tables.order,
        *segments,
        tables.vision,
        *counts,
        *c.stride()[:3],
        *b.stride()[:3],
        *x.stride()[:3],
        DENOMINATOR_FLOOR,
        H=heads,
        G=groups,
        E=e,
        BLOCK_K=cut.queries.block,
        TILES_K=cut.k // cut.queries.block,
        STAGES=cut.queries.stages,
        num_warps=cut.queries.warps,
        **shape,
    )
    added, added_ones = torch.empty_like(states.values), torch.empty_like(states.ones)
    state_gradients[(programs * (cut.k // cut.states.block),)](
        c,
        grad_y,
        denominators,
        grad_ones,
        added,
        added_ones,
        sums.values,
        sums.ends,
        tables.order,
        *segments,
        tables.vision,
        *counts,
        *c.stride()[:3],
        DENOMINATOR_FLOOR,
        H=heads,
        E=e,
        BLOCK_K=cut.states.block,
        TILES_K=cut.k // cut.states.block,
        STAGES=cut.states.stages,
        num_warps=cut.states.warps,
        **shape,
    )
    grad_states, grad_state_ones, grad_first = carry(
        added, added_ones, states.keeps, grad_last, width, values, inputs.denominator, flip=True
    )
    del added, added_ones
    grad_b = b.new_empty(batch, length, e, width)
    grad_x = x.new_empty(batch, length, e, values)
    grad_dt = reached.new_empty(by_step)
    held = reached.new_empty(d, batch, e, sums.chunks)
    input_gradients_through_states[(programs,)](
        b,
        x,
        grad_b,
        grad_x,
        grad_dt,
        held,
        states.values,
        states.ones,
        grad_states,
        grad_state_ones,
        states.keeps,
        sums.values,
        sums.ends,
        tables.order,
        *segments,
        *counts,
        *b.stride()[:3],
        *x.stride()[:3],
        G=groups,
        E=e,
        BLOCK_K=cut.through.block,
        TILES_K=cut.k // cut.through.block,
        num_warps=cut.through.warps,
        **shape,
    )
    decays = [reached.new_empty(batch, length, e) for _ in inputs.decays]
    input_gradients[(programs,)](
        c,
        b,
        x,
        grad_y,
        denominators,
        grad_ones,
        grad_b,
        grad_x,
        *(*decays, *decays)[:4],
        reached,
        grad_dt,
        held,
        sums.values,
        tables.order,
        tables.valid,
        *segments,
        tables.vision,
        *counts,
        *c.stride()[:3],
        *b.stride()[:3],
        *x.stride()[:3],
        DENOMINATOR_FLOOR,
        H=heads,
        G=groups,
        E=e,
        BLOCK_K=cut.inputs.block,
        TILES_K=cut.k // cut.inputs.block,
        STAGES=cut.inputs.stages,
        num_warps=cut.inputs.warps,
        **shape,
    )
    if e != groups:
        grad_b, grad_x = (t.unflatten(2, (groups, -1)).sum(3) for t in (grad_b, grad_x))
    found = [t.to(given.dtype) for t, given in zip(decays, inputs.decays)]
    return (grad_c, grad_b, grad_x, *found), grad_first
