"""The weighted sum of two branches in one pass forward and one backward, as Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.ops import triton_support
from mixers.ops.eager import custom_op
from mixers.ops.gate.reference import check
from mixers.ops.strides import leading, rows


def weighted_sum(ys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Sum two branches; see :func:`mixers.ops.gate.reference.weighted_sum`."""
    check(ys, weights)
    first, second = (rows(y) for y in ys)
    return _weighted_sum(first, second, *weights)


@custom_op("linmu::weighted_sum")
def _weighted_sum(first: Tensor, second: Tensor, first_weight: Tensor, second_weight: Tensor) -> Tensor:
    y = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    grid, config = _launch(first)
    with triton_support.on_device(first):
        _forward[grid](
            first, second, first_weight, second_weight, y,
            *first.shape[1:], *leading(first), *leading(second),
            *_weight_strides(first_weight), *_weight_strides(second_weight), **config,
        )  # fmt: skip
    return y


@_weighted_sum.register_fake
def _(first: Tensor, second: Tensor, first_weight: Tensor, second_weight: Tensor) -> Tensor:
    return torch.empty(first.shape, dtype=first.dtype, device=first.device)


@custom_op("linmu::weighted_sum_backward")
def _weighted_sum_backward(
    dy: Tensor, first: Tensor, second: Tensor, first_weight: Tensor, second_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dfirst, dsecond = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (first, second))
    dweights = torch.empty((2, *first.shape[:3], 1), dtype=torch.float32, device=first.device)
    grid, config = _launch(first)
    with triton_support.on_device(first):
        _backward[grid](
            dy, first, second, first_weight, second_weight, dfirst, dsecond, *dweights,
            *first.shape[1:], *leading(dy), *leading(first), *leading(second),
            *_weight_strides(first_weight), *_weight_strides(second_weight), **config,
        )  # fmt: skip
    summed = [
        dw.sum(2, keepdim=True, dtype=torch.float32).to(w.dtype)
        if w.shape[2] == 1
        else dw.to(w.dtype, copy=True)
        for dw, w in zip(dweights, (first_weight, second_weight))
    ]
    return dfirst, dsecond, summed[0], summed[1]


@_weighted_sum_backward.register_fake
def _(
    dy: Tensor, first: Tensor, second: Tensor, first_weight: Tensor, second_weight: Tensor
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (first, second, first_weight, second_weight))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
    return _weighted_sum_backward(rows(dy), *ctx.saved_tensors)


_weighted_sum.register_autograd(_differentiate, setup_context=_save)


def _launch(y: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and configuration: a program a tile of tokens and a head, 16 numbers a thread."""
    batch, length, heads, width = y.shape
    wide = triton.next_power_of_2(width)
    block_n = max(2048 // wide, 1)
    grid = (batch * triton.cdiv(length, block_n) * heads,)
    return grid, {"BLOCK_N": block_n, "P2": wide, "num_warps": 4}


def _weight_strides(weight: Tensor) -> tuple[int, ...]:
    """Strides over rows, tokens and heads; 0 where all heads share a weight."""
    return (*weight.stride()[:2], weight.stride(2) if weight.shape[2] > 1 else 0)


@triton.jit
def _place(N, H, P, BLOCK_N: tl.constexpr, P2: tl.constexpr):
    """Row, tokens, head and columns of a program, and which of them there are."""
    head, tile = tl.program_id(0) % H, tl.program_id(0) // H
    tiles = tl.cdiv(N, BLOCK_N)
    token = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    p = tl.arange(0, P2)[None, :]
    live = token < N
    return (tile // tiles).to(tl.int64), token, head, p, live, live[:, None] & (p < P)


@triton.jit
def _forward(
    first, second, first_weight, second_weight, y, N, H, P,
    stride_b, stride_n, stride_h, stride_sb, stride_sn, stride_sh,
    stride_fwb, stride_fwn, stride_fwh, stride_swb, stride_swn, stride_swh,
    BLOCK_N: tl.constexpr, P2: tl.constexpr,
):  # fmt: skip
    batch, token, head, p, live, inside = _place(N, H, P, BLOCK_N, P2)
    at = batch * stride_b + token * stride_n + head * stride_h
    one = tl.load(first + at[:, None] + p, mask=inside, other=0).to(tl.float32)
    at = batch * stride_sb + token * stride_sn + head * stride_sh
    two = tl.load(second + at[:, None] + p, mask=inside, other=0).to(tl.float32)
    at = batch * stride_fwb + token * stride_fwn + head * stride_fwh
    one *= tl.load(first_weight + at, mask=live, other=0).to(tl.float32)[:, None]
    at = batch * stride_swb + token * stride_swn + head * stride_swh
    two *= tl.load(second_weight + at, mask=live, other=0).to(tl.float32)[:, None]
    at = ((batch * N + token) * H + head) * P
    tl.store(y + at[:, None] + p, (one + two).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy, first, second, first_weight, second_weight, dfirst, dsecond, dfirst_weight, dsecond_weight, N, H, P,
    stride_yb, stride_yn, stride_yh, stride_b, stride_n, stride_h, stride_sb, stride_sn, stride_sh,
    stride_fwb, stride_fwn, stride_fwh, stride_swb, stride_swn, stride_swh,
    BLOCK_N: tl.constexpr, P2: tl.constexpr,
):  # fmt: skip
    """Gradients of weights are left one a head."""
    batch, token, head, p, live, inside = _place(N, H, P, BLOCK_N, P2)
    at = batch * stride_yb + token * stride_yn + head * stride_yh
    grad = tl.load(dy + at[:, None] + p, mask=inside, other=0).to(tl.float32)
    at = batch * stride_b + token * stride_n + head * stride_h
    one = tl.load(first + at[:, None] + p, mask=inside, other=0).to(tl.float32)
    at = batch * stride_sb + token * stride_sn + head * stride_sh
    two = tl.load(second + at[:, None] + p, mask=inside, other=0).to(tl.float32)
    at = batch * stride_fwb + token * stride_fwn + head * stride_fwh
    weight = tl.load(first_weight + at, mask=live, other=0).to(tl.float32)[:, None]
    at = batch * stride_swb + token * stride_swn + head * stride_swh
    other = tl.load(second_weight + at, mask=live, other=0).to(tl.float32)[:, None]
    here = (batch * N + token) * H + head
    tl.store(dfirst_weight + here, tl.sum(grad * one, 1), mask=live)
    tl.store(dsecond_weight + here, tl.sum(grad * two, 1), mask=live)
    at = (here * P)[:, None] + p
    tl.store(dfirst + at, (grad * weight).to(dfirst.dtype.element_ty), mask=inside)
    tl.store(dsecond + at, (grad * other).to(dsecond.dtype.element_ty), mask=inside)
