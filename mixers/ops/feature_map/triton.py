"""The softmax feature map as Triton kernels: matrix product and both softmaxes in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.ops import triton_support
from mixers.ops.eager import custom_op
from mixers.ops.feature_map.reference import check
from mixers.ops.strides import leading, rows

PROGRAMS = 512
"""How many programs of the backward pass share the tokens of all heads; each leaves a partial sum."""


def feature_map(x: Tensor, weight: Tensor) -> Tensor:
    """Map each head; see :func:`mixers.ops.feature_map.reference.feature_map`."""
    check(x, weight)
    return _feature_map(x, weight)


def features_of(x: Tensor, weight: Tensor) -> Tensor:
    """Map each head, unchecked, for what differentiates it itself by :func:`gradients_of`."""
    x, weight = rows(x), weight.contiguous()
    batch, length, heads, width = x.shape
    features = weight.shape[2]
    y = torch.empty((batch, length, heads, 2 * features), dtype=x.dtype, device=x.device)
    config = _config(x, features, backward=False)
    with triton_support.on_device(x):
        _forward[(triton.cdiv(batch * length, config["BLOCK_N"]) * heads,)](
            x,
            weight,
            y,
            batch * length,
            length,
            heads,
            width,
            features,
            *leading(x),
            DOT=triton_support.dot_type(x.dtype),
            **config,
        )
    return y


def gradients_of(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, in their types, from ``dy`` [B, N, H, 2R]."""
    dy, x, weight = rows(dy), rows(x), weight.contiguous()
    batch, length, heads, width = x.shape
    features = weight.shape[2]
    config = _config(x, features, backward=True)
    tiles = triton.cdiv(batch * length, config["BLOCK_N"])
    spans = min(triton.cdiv(tiles, 4), triton.cdiv(PROGRAMS, heads))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty((spans, heads, width, features), dtype=torch.float32, device=x.device)
    with triton_support.on_device(x):
        _backward[(spans * heads,)](
            dy, x, weight, dx, partial,
            batch * length, length, heads, width, features, triton.cdiv(tiles, max(spans, 1)),
            *leading(dy), *leading(x), DOT=triton_support.dot_type(x.dtype), **config,
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


_feature_map = custom_op("linmu::feature_map")(features_of)
_feature_map_backward = custom_op("linmu::feature_map_backward")(gradients_of)


@_feature_map.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:3], 2 * weight.shape[2]))


@_feature_map_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
    return _feature_map_backward(dy, *ctx.saved_tensors)


_feature_map.register_autograd(_differentiate, setup_context=_save)


def _config(x: Tensor, features: int, backward: bool) -> dict[str, int]:
    """Tokens of a tile, padded widths, warps: what registers hold of the tile, and of the weight's gradient."""
    p2, r2 = (max(triton.next_power_of_2(width), 16) for width in (x.shape[3], features))
    narrow = x.dtype.itemsize == 2
    if backward:
        block_n, warps = (32, 16 if r2 > 128 else 8) if narrow else (16, 16 if max(p2, r2) > 64 else 8)
        if r2 > 128 and not triton_support.roomy(x.device):
            block_n = 16
    else:
        block_n, warps = (64, 8 if r2 > 128 else 4) if narrow else (32, 8)
    return {"BLOCK_N": block_n, "P2": p2, "R2": r2, "num_warps": warps, "num_stages": 1}


@triton.jit
def _softmaxes(t, real):
    """Softmax of t and of -t over the real columns."""
    infinity = float("inf")
    top = tl.max(tl.where(real, t, -infinity), 1)[:, None]
    bottom = tl.min(tl.where(real, t, infinity), 1)[:, None]
    high = tl.exp(tl.where(real, t - top, -infinity))
    low = tl.exp(tl.where(real, bottom - t, -infinity))
    return high / tl.sum(high, 1)[:, None], low / tl.sum(low, 1)[:, None]


@triton.jit
def _forward(
    x, weight, y, TOKENS, N, H, P, R, stride_b, stride_n, stride_h,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, P2: tl.constexpr, R2: tl.constexpr,
):  # fmt: skip
    """A program a tile of tokens and a head."""
    head = tl.program_id(0) % H
    token = tl.program_id(0) // H * BLOCK_N + tl.arange(0, BLOCK_N)
    p, r = tl.arange(0, P2), tl.arange(0, R2)
    live, real = (token < TOKENS)[:, None], (r < R)[None, :]
    at = (token // N).to(tl.int64) * stride_b + (token % N).to(tl.int64) * stride_n + head * stride_h
    value = tl.load(x + at[:, None] + p[None, :], mask=live & (p < P)[None, :], other=0).to(DOT)
    at = weight + (head * P + p[:, None]) * R + r[None, :]
    mapped = tl.dot(value, tl.load(at, mask=(p < P)[:, None] & real, other=0).to(DOT), input_precision="ieee")
    high, low = _softmaxes(mapped, real)
    at = y + (token.to(tl.int64) * H + head)[:, None] * (2 * R) + r[None, :]
    tl.store(at, high.to(y.dtype.element_ty), mask=live & real)
    tl.store(at + R, low.to(y.dtype.element_ty), mask=live & real)


@triton.jit
def _backward(
    dy, x, weight, dx, partial, TOKENS, N, H, P, R, TILES,
    stride_yb, stride_yn, stride_yh, stride_b, stride_n, stride_h,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, P2: tl.constexpr, R2: tl.constexpr,
):  # fmt: skip
    """A program a head and a span of tiles, over which it sums the weight's gradient."""
    head, span = tl.program_id(0) % H, tl.program_id(0) // H
    p, r = tl.arange(0, P2), tl.arange(0, R2)
    own, real = (p < P)[None, :], (r < R)[None, :]
    square = (head * P + p[:, None]) * R + r[None, :]
    matrix = tl.load(weight + square, mask=(p < P)[:, None] & real, other=0).to(DOT)
    dmatrix = tl.zeros((P2, R2), tl.float32)
    for tile in range(span * TILES, tl.minimum(span * TILES + TILES, tl.cdiv(TOKENS, BLOCK_N))):
        token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        live = (token < TOKENS)[:, None]
        row, place = (token // N).to(tl.int64), (token % N).to(tl.int64)
        at = row * stride_b + place * stride_n + head * stride_h
        value = tl.load(x + at[:, None] + p[None, :], mask=live & own, other=0).to(DOT)
        high, low = _softmaxes(tl.dot(value, matrix, input_precision="ieee"), real)
        at = dy + (row * stride_yb + place * stride_yn + head * stride_yh)[:, None] + r[None, :]
        grad = tl.load(at, mask=live & real, other=0).to(tl.float32)
        total = high * (grad - tl.sum(grad * high, 1)[:, None])
        grad = tl.load(at + R, mask=live & real, other=0).to(tl.float32)
        total -= low * (grad - tl.sum(grad * low, 1)[:, None])
        narrow = total.to(DOT)
        dmatrix = tl.dot(tl.trans(value), narrow, dmatrix, input_precision="ieee")
        found = tl.dot(narrow, tl.trans(matrix), input_precision="ieee")
        at = dx + (token.to(tl.int64) * H + head)[:, None] * P + p[None, :]
        tl.store(at, found.to(dx.dtype.element_ty), mask=live & own)
    at = partial + span.to(tl.int64) * H * P * R + square
    tl.store(at, dmatrix, mask=(p < P)[:, None] & real)
