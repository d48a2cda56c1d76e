"""The SSD scan in Triton: one pass for both directions and all query heads of a group, forward and backward.

A chunk's C·Bᵀ is formed once and used by both directions; the query heads of a group share B, X, the decays
and the states; the scan order is an index at loads and stores. The states that enter the chunks are summed
by small passes before, and again in the backward, which keeps the inputs alone: where c and b are features, what
they are made of, for features are wide. Nothing is added atomically: the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixers.layout import Scan
from mixers.ops.eager import custom_op
from mixers.ops.feature_map import feature_map
from mixers.ops.feature_map.triton import features_of, gradients_of
from mixers.ops.finish import finish
from mixers.ops.ssd.reference import Decay, check, check_maps, finished
from mixers.ops.ssd.triton.backward import scan_backward
from mixers.ops.ssd.triton.forward import Finish, Inputs, Tables, scan_forward


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
    """Scan as :func:`mixers.ops.ssd.reference.ssd` does; the chunk is chosen by shape and chip instead.

    Where no gradient is needed, skip and norm are applied in the same pass.
    """
    if maps is not None and not _makes(c, b, maps):
        c, b, maps = feature_map(c, maps[0]), feature_map(b, maps[1]), None
    batch, length, heads, width = c.shape
    if maps is not None:
        width = check_maps(c, b, maps)
    shape = (batch, decay[0].shape[-1], width, x.shape[-1] + denominator)
    check(c, b, x, decay, backward_decay, initial_state, shape)
    if initial_state is not None:
        initial_state = initial_state.float()
    if not length or not batch:
        state = x.new_zeros(shape, dtype=torch.float32) if initial_state is None else initial_state
        return x.new_zeros(batch, length, heads, x.shape[-1]), state
    scan = scan or Scan(None, None, None, None, None, None, None)
    both = backward_decay is not None and scan.vision is not None
    decays = [*decay, *backward_decay] if both and backward_decay is not None else [*decay]
    dtype = torch.promote_types(torch.promote_types(c.dtype, b.dtype), x.dtype)
    by_step = (scan.order, scan.valid, scan.sequence, scan.vision, scan.extent)
    tables = [None if t is None else t.contiguous() for t in by_step]
    c, b, values = c.to(dtype), b.to(dtype), x.to(dtype)
    tensors = (c, b, x, *decays, *(maps or ()), initial_state, skip, norm_weight)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    given = (c, b, values, decays, [*(maps or ())], *tables, initial_state, denominator)
    if learns or gate is not None:
        y, state, _ = _ssd(*given, None, None, 0.0)
        return finished(finish, y.to(x.dtype), x, skip, norm_weight, norm_eps, gate), state
    y, state, _ = _ssd(*given, skip, norm_weight, norm_eps)
    return y.to(x.dtype), state


def _makes(c: Tensor, b: Tensor, maps: tuple[Tensor, Tensor]) -> bool:
    """Whether the feature map's kernels run on this chip."""
    unsupported = feature_map.backends["triton"].unsupported
    return unsupported(c, maps[0]) is None and unsupported(b, maps[1]) is None


def _inputs(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    decays: Sequence[Tensor],
    maps: Sequence[Tensor],
    tables: Tables,
    denominator: bool,
) -> Inputs:
    """What is scanned: features of c and b where there are maps."""
    if maps:
        c, b = features_of(c, maps[0]), features_of(b, maps[1])
    return Inputs(c, b, x, tuple(decays), tables, denominator)


@custom_op("linmu::ssd")
def _ssd(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    decays: Sequence[Tensor],
    maps: Sequence[Tensor],
    order: Tensor | None,
    valid: Tensor | None,
    sequence: Tensor | None,
    vision: Tensor | None,
    extent: Tensor | None,
    first: Tensor | None,
    denominator: bool,
    skip: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _inputs(c, b, x, decays, maps, Tables(order, valid, sequence, vision, extent), denominator)
    return scan_forward(inputs, first, Finish(skip, norm_weight, norm_eps))


@_ssd.register_fake
def _(
    c: Tensor, b: Tensor, x: Tensor, decays: Sequence[Tensor], maps: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, width = c.shape
    width = 2 * maps[0].shape[2] if maps else width
    denominator = rest[6]
    last = (batch, decays[0].shape[2], width, x.shape[3] + denominator)
    return (
        x.new_empty(batch, length, heads, x.shape[3]),
        x.new_empty(last, dtype=torch.float32),
        x.new_empty((batch, length, heads) if denominator else 0, dtype=torch.float32),
    )


@custom_op("linmu::ssd_backward")
def _ssd_backward(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    decays: Sequence[Tensor],
    maps: Sequence[Tensor],
    order: Tensor | None,
    valid: Tensor | None,
    sequence: Tensor | None,
    vision: Tensor | None,
    extent: Tensor | None,
    first: Tensor | None,
    denominator: bool,
    y: Tensor,
    denominators: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
) -> list[Tensor]:
    inputs = _inputs(c, b, x, decays, maps, Tables(order, valid, sequence, vision, extent), denominator)
    grads, grad_first = scan_backward(inputs, first, y, denominators, grad_y, grad_last)
    if not maps:
        return [*grads, grad_first]
    pairs = zip(grads, (c, b), maps)
    (grad_c, grad_c_map), (grad_b, grad_b_map) = (gradients_of(grad, t, weight) for grad, t, weight in pairs)
    return [grad_c, grad_b, *grads[2:], grad_c_map, grad_b_map, grad_first]


@_ssd_backward.register_fake
def _(
    c: Tensor, b: Tensor, x: Tensor, decays: Sequence[Tensor], maps: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (c, b, x, *decays, *maps, rest[-1])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    c, b, x, decays, maps, *tables, first, denominator = inputs[:-3]
    y, last, denominators = output
    ctx.denominator, ctx.counts, ctx.starts = denominator, (len(decays), len(maps)), first is not None
    ctx.last = last.shape
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(c, b, x, *decays, *maps, *tables, first, y, denominators)


def _backward(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    c, b, x, *rest = ctx.saved_tensors
    decays, maps, (*tables, first, y, denominators) = _cut(rest, ctx.counts)
    grad_y = torch.zeros_like(y) if grad_y is None else grad_y.contiguous()
    grad_last = x.new_zeros(ctx.last, dtype=torch.float32) if grad_last is None else grad_last.contiguous()
    grads = _ssd_backward(
        c, b, x, decays, maps, *tables, first, ctx.denominator, y, denominators, grad_y, grad_last
    )
    grad_decays, grad_maps, (grad_first,) = _cut(grads[3:], ctx.counts)
    return (*grads[:3], grad_decays, grad_maps, *[None] * 5, grad_first if ctx.starts else None, *[None] * 4)


def _cut(tensors: Sequence[Any], counts: tuple[int, int]) -> tuple[list[Any], list[Any], list[Any]]:
    """Decays, maps, and what follows."""
    decays, maps = counts
    return [*tensors[:decays]], [*tensors[decays : decays + maps]], [*tensors[decays + maps :]]


_ssd.register_autograd(_backward, setup_context=_save)
