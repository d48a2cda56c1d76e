"""The short convolution as Triton kernels: a program a tile of steps and channels, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.layout import Scan
from mixers.ops import triton_support
from mixers.ops.eager import custom_op
from mixers.ops.short_conv.reference import check
from mixers.ops.strides import leading, rows

TILES = 16
"""Tiles of steps that one program of the backward pass sums the weight's gradient over."""


def short_conv(
    x: Tensor, weight: Tensor, *, scan: Scan | None = None, history: Tensor | None = None
) -> Tensor:
    """Convolve along the scan; see :func:`mixers.ops.short_conv.reference.short_conv`."""
    check(x, weight, history)
    order, run = (None, None) if scan is None else (scan.order, scan.run)
    order, run = (None if t is None else t.contiguous() for t in (order, run))
    history = None if history is None else history.contiguous()
    return _short_conv(rows(x), weight.contiguous(), order, run, history)


@custom_op("linmu::short_conv")
def _short_conv(
    x: Tensor, weight: Tensor, order: Tensor | None, run: Tensor | None, history: Tensor | None
) -> Tensor:
    batch, length, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    taps = weight.shape[1]
    block_n, block_c = 16, _block_channels(channels, 256)
    grid = (triton.cdiv(batch * length, block_n) * triton.cdiv(channels, block_c),)
    with triton_support.on_device(x):
        _forward[grid](
            x, weight.t().contiguous(), order, run, history, y,
            batch * length, length, channels, *leading(x),
            TAPS=taps, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return y


@_short_conv.register_fake
def _(x: Tensor, weight: Tensor, order: Tensor | None, run: Tensor | None, history: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@custom_op("linmu::short_conv_backward")
def _short_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor | None, run: Tensor | None, history: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    taps = weight.shape[1]
    before = 0 if history is None else taps - 1
    block_n, block_c = 16, _block_channels(channels, 128 if taps <= 4 else 64)
    tiles = batch * triton.cdiv(length + before, block_n * TILES)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dhistory = torch.empty((batch, before, channels), dtype=x.dtype, device=x.device)
    partial = torch.empty((tiles, taps, channels), dtype=torch.float32, device=x.device)
    with triton_support.on_device(x):
        _backward[(tiles * triton.cdiv(channels, block_c),)](
            dy, x, weight.t().contiguous(), order, run, history, dx, dhistory, partial,
            length, channels, *leading(dy), *leading(x),
            TAPS=taps, BEFORE=before,
            SPAN=block_n * TILES, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    dweight = partial.sum(0).t().to(weight.dtype).contiguous()
    return dx, dweight, dhistory if history is None else dhistory.to(history.dtype)


@_short_conv_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor | None, run: Tensor | None, history: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dhistory = x.new_empty((len(x), 0, x.shape[2])) if history is None else torch.empty_like(history)
    return x.new_empty(x.shape), torch.empty_like(weight), dhistory


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
    x, weight, order, run, history = ctx.saved_tensors
    dx, dweight, dhistory = _short_conv_backward(rows(dy), x, weight, order, run, history)
    return dx, dweight, None, None, None if history is None else dhistory


_short_conv.register_autograd(_differentiate, setup_context=_save)


def _block_channels(channels: int, most: int) -> int:
    """Channels of a tile: rows of 128 bytes or more."""
    return min(most, triton.next_power_of_2(channels))


@triton.jit
def _tokens_of(order, at, step, inside):
    """The token read at each step; ``at`` is its place in tables [B, N]."""
    if order is None:
        token = step
    else:
        token = tl.load(order + at, mask=inside, other=0)
    return token.to(tl.int64)


@triton.jit
def _convolved(
    x, weight, order, run, history, batch, step, live, channel, real, N, C, stride_b, stride_n,
    TAPS: tl.constexpr,
):  # fmt: skip
    """Sum over the taps [TAPS, C] for some steps of some rows and some channels, in fp32."""
    at = batch * N + step
    if run is not None:
        own = tl.load(run + at, mask=live, other=0)
    total = tl.zeros((step.shape[0], channel.shape[0]), tl.float32)
    for back in tl.static_range(TAPS):
        other = step - back
        inside = live & (other >= 0)
        place = batch * stride_b + _tokens_of(order, at - back, other, inside) * stride_n
        if run is not None and back > 0:
            inside &= tl.load(run + at - back, mask=inside, other=0) == own
        tap = tl.load(x + place[:, None] + channel, mask=inside[:, None] & real, other=0).to(tl.float32)
        if history is not None and back > 0:
            early = live & (other < 0)
            if run is not None:
                early &= tl.load(run + batch * N + tl.zeros_like(step), mask=early, other=0) == own
            slot = batch * (TAPS - 1) + TAPS - 1 + other
            tap += tl.load(history + slot[:, None] * C + channel, mask=early[:, None] & real, other=0)
        factor = tl.load(weight + (TAPS - 1 - back) * C + channel, mask=real, other=0)
        total += tap * factor.to(tl.float32)
    return total


@triton.jit
def _forward(
    x, weight, order, run, history, y,
    STEPS, N, C, stride_b, stride_n,
    TAPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(C, BLOCK_C)
    channel = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    at = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    batch, step = (at // N).to(tl.int64), at % N
    real, live = channel < C, at < STEPS
    total = _convolved(
        x, weight, order, run, history, batch, step, live, channel, real, N, C, stride_b, stride_n, TAPS
    )
    place = (batch * N + _tokens_of(order, at, step, live)) * C
    tl.store(y + place[:, None] + channel, total.to(y.dtype.element_ty), mask=live[:, None] & real)


@triton.jit
def _backward(
    dy, x, weight, order, run, history, dx, dhistory, partial,
    N, C, stride_dyb, stride_dyn, stride_b, stride_n,
    TAPS: tl.constexpr, BEFORE: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program a span of steps, which begin at -BEFORE, where the history stands.

    What each step adds to the weight's gradient is summed over the steps at the end alone, since threads share it.
    """
    tiles_c, spans = tl.cdiv(C, BLOCK_C), tl.cdiv(N + BEFORE, SPAN)
    span = tl.program_id(0) // tiles_c
    channel = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < C
    batch = (span // spans).to(tl.int64)
    row = batch * N
    sums = (tl.zeros((BLOCK_N, BLOCK_C), tl.float32),) * TAPS
    first = span % spans * SPAN - BEFORE
    for start in range(first, tl.minimum(first + SPAN, N), BLOCK_N):
        step = start + tl.arange(0, BLOCK_N)
        live, here = step < N, (step >= 0) & (step < N)
        if run is not None:
            own = tl.load(run + row + tl.maximum(step, 0), mask=live, other=0)
        token = _tokens_of(order, row + step, step, here)
        at = batch * stride_b + token * stride_n
        value = tl.load(x + at[:, None] + channel, mask=here[:, None] & real, other=0).to(tl.float32)
        if history is not None:
            early = (step < 0)[:, None] & real
            slot = (batch * BEFORE + BEFORE + step) * C
            value += tl.load(history + slot[:, None] + channel, mask=early, other=0).to(tl.float32)
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        added = ()
        for ahead in tl.static_range(TAPS):
            other = step + ahead
            inside = live & (other >= 0) & (other < N)
            at = batch * stride_dyb + _tokens_of(order, row + other, other, inside) * stride_dyn
            if run is not None and ahead > 0:
                inside &= tl.load(run + row + other, mask=inside, other=0) == own
            grad = tl.load(dy + at[:, None] + channel, mask=inside[:, None] & real, other=0).to(tl.float32)
            tap = tl.load(weight + (TAPS - 1 - ahead) * C + channel, mask=real, other=0).to(tl.float32)
            total += grad * tap
            more = (sums[ahead] + grad * value,)
            added = added + more  # type: ignore[assignment]
        sums = added
        at = (row + token) * C
        tl.store(dx + at[:, None] + channel, total.to(dx.dtype.element_ty), mask=here[:, None] & real)
        if history is not None:
            tl.store(dhistory + slot[:, None] + channel, total.to(dhistory.dtype.element_ty), mask=early)
    at = span.to(tl.int64) * TAPS * C
    for ahead in tl.static_range(TAPS):
        tl.store(partial + at + (TAPS - 1 - ahead) * C + channel, tl.sum(sums[ahead], 0), mask=real)
