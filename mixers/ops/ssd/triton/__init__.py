"""The SSD scan in Triton: one pass for both directions and all query heads of a group, forward and backward.

A chunk's C·Bᵀ is formed once and used by both directions; the query heads of a group share B, X, the decays
and the states; the scan order is an index at loads and stores. The states that enter the chunks are summed
by small passes before, and again in the backward, which keeps the inputs alone. Nothing is added atomically:
the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixers.layout import Scan
from mixers.ops.eager import custom_op
from mixers.ops.finish import finish
from mixers.ops.ssd.reference import Decay, check, finished
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
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Scan as :func:`mixers.ops.ssd.reference.ssd` does; the chunk is chosen by shape and chip instead.

    Where no gradient is needed, skip and norm are applied in the same pass.
    """
    batch, length, heads, width = c.shape
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
    tensors = (c, b, x, *decays, initial_state, skip, norm_weight)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if learns or gate is not None:
        y, state, _ = _ssd(c, b, values, decays, *tables, initial_state, denominator, None, None, 0.0)
        return finished(finish, y.to(x.dtype), x, skip, norm_weight, norm_eps, gate), state
    last = (skip, norm_weight, norm_eps)
    y, state, _ = _ssd(c, b, values, decays, *tables, initial_state, denominator, *last)
    return y.to(x.dtype), state


@custom_op("linmu::ssd")
def _ssd(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    decays: Sequence[Tensor],
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
    inputs = Inputs(c, b, x, tuple(decays), Tables(order, valid, sequence, vision, extent), denominator)
    return scan_forward(inputs, first, Finish(skip, norm_weight, norm_eps))


@_ssd.register_fake
def _(c: Tensor, b: Tensor, x: Tensor, decays: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, width = c.shape
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
    inputs = Inputs(c, b, x, tuple(decays), Tables(order, valid, sequence, vision, extent), denominator)
    grads, grad_first = scan_backward(inputs, first, y, denominators, grad_y, grad_last)
    return [*grads, grad_first]


@_ssd_backward.register_fake
def _(c: Tensor, b: Tensor, x: Tensor, decays: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    grad_last = rest[-1]
    return [*(t.new_empty(t.shape) for t in (c, b, x, *decays)), grad_last.new_empty(grad_last.shape)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    c, b, x, decays, *tables, first, denominator = inputs[:-3]
    y, last, denominators = output
    ctx.denominator, ctx.decays, ctx.starts = denominator, len(decays), first is not None
    ctx.last = last.shape
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(c, b, x, *decays, *tables, first, y, denominators)


def _backward(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    c, b, x, *rest = ctx.saved_tensors
    decays, (*tables, first, y, denominators) = rest[: ctx.decays], rest[ctx.decays :]
    grad_y = torch.zeros_like(y) if grad_y is None else grad_y.contiguous()
    grad_last = x.new_zeros(ctx.last, dtype=torch.float32) if grad_last is None else grad_last.contiguous()
    grads = _ssd_backward(
        c, b, x, decays, *tables, first, ctx.denominator, y, denominators, grad_y, grad_last
    )
    grad_first = grads[-1] if ctx.starts else None
    return (*grads[:3], grads[3:-1], *[None] * 5, grad_first, *[None] * 4)


_ssd.register_autograd(_backward, setup_context=_save)
