"""Skip connection, norm and output gate in one pass forward and one backward, as Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.ops import triton_support
from mixers.ops.eager import custom_op
from mixers.ops.finish.reference import check
from mixers.ops.strides import leading, rows


def finish(
    y: Tensor,
    v: Tensor,
    skip: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: Tensor | None = None,
) -> Tensor:
    """Skip, norm and gate; see :func:`mixers.ops.finish.reference.finish`."""
    check(y, v, skip, norm_weight, gate)
    y, v = rows(y), rows(v)
    gate = None if gate is None else rows(gate)
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    return _finish(y, v, skip.contiguous(), norm_weight, gate, norm_eps)


@custom_op("linmu::finish")
def _finish(
    y: Tensor, v: Tensor, skip: Tensor, norm_weight: Tensor | None, gate: Tensor | None, eps: float
) -> Tensor:
    batch, length, heads, width = y.shape
    groups = v.shape[2]
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    wide = triton.next_power_of_2(width)
    block_n = max(2048 // wide, 1)
    with triton_support.on_device(y):
        _forward[(batch * triton.cdiv(length, block_n) * groups,)](
            y, v, skip, norm_weight, gate, out,
            length, groups, width, eps, *leading(y), *leading(v), *leading(gate),
            R=heads // groups, BLOCK_N=block_n, P2=wide, num_warps=4,
        )  # fmt: skip
    return out


@_finish.register_fake
def _(
    y: Tensor, v: Tensor, skip: Tensor, norm_weight: Tensor | None, gate: Tensor | None, eps: float
) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


@custom_op("linmu::finish_backward")
def _finish_backward(
    dout: Tensor,
    y: Tensor,
    v: Tensor,
    skip: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, width = y.shape
    groups = v.shape[2]
    wide = triton.next_power_of_2(width)
    block_n = max(4096 // wide, 1)
    tiles = batch * triton.cdiv(length, block_n)
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=y.device)
    dgate = torch.empty(y.shape if gate is not None else (0,), dtype=y.dtype, device=y.device)
    dskip = torch.empty((tiles, heads), dtype=torch.float32, device=y.device)
    weighed = 0 if norm_weight is None else tiles
    dweight = torch.empty((weighed, heads, width), dtype=torch.float32, device=y.device)
    with triton_support.on_device(y):
        _backward[(tiles * groups,)](
            dout, y, v, skip, norm_weight, gate, dy, dv, dgate, dskip, dweight,
            length, groups, width, eps, *leading(dout), *leading(y), *leading(v), *leading(gate),
            R=heads // groups, BLOCK_N=block_n, P2=wide, num_warps=16,
        )  # fmt: skip
    dgate = dgate if gate is None else dgate.to(gate.dtype)
    return dy, dv, dskip.sum(0).to(skip.dtype), dweight.sum(0).to(_dtype(norm_weight)), dgate


@_finish_backward.register_fake
def _(
    dout: Tensor,
    y: Tensor,
    v: Tensor,
    skip: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dweight = y.new_empty(y.shape[2:], dtype=_dtype(norm_weight))
    dgate = y.new_empty(0) if gate is None else y.new_empty(y.shape, dtype=gate.dtype)
    return y.new_empty(y.shape), v.new_empty(v.shape), skip.new_empty(skip.shape), dweight, dgate


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dout: Tensor):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors  # read once: checkpointing recomputes what is read
    *_, norm_weight, gate = tensors
    dy, dv, dskip, dweight, dgate = _finish_backward(rows(dout), *tensors, ctx.eps)
    return dy, dv, dskip, None if norm_weight is None else dweight, None if gate is None else dgate, None


_finish.register_autograd(_differentiate, setup_context=_save)


def _dtype(t: Tensor | None) -> torch.dtype:
    return torch.float32 if t is None else t.dtype


@triton.jit
def _forward(
    y, v, skip, norm_weight, gate, out,
    N, G, P, eps,
    stride_yb, stride_yn, stride_yh, stride_vb, stride_vn, stride_vh, stride_gb, stride_gn, stride_gh,
    R: tl.constexpr, BLOCK_N: tl.constexpr, P2: tl.constexpr,
):  # fmt: skip
    """A program a tile of tokens and a KV head, whose values all heads of the group share."""
    group, tile = tl.program_id(0) % G, tl.program_id(0) // G
    tiles = tl.cdiv(N, BLOCK_N)
    batch = (tile // tiles).to(tl.int64)
    token = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
    p = tl.arange(0, P2)[None, :]
    live = (token < N) & (p < P)
    value = tl.load(v + batch * stride_vb + token * stride_vn + group * stride_vh + p, mask=live, other=0)
    value = value.to(tl.float32)
    for head in range(group * R, group * R + R):
        at = batch * stride_yb + token * stride_yn + head * stride_yh
        z = tl.load(y + at + p, mask=live, other=0).to(tl.float32)
        z += tl.load(skip + head).to(tl.float32) * value
        if norm_weight is not None:
            weight = tl.load(norm_weight + head * P + p, mask=p < P, other=0).to(tl.float32)
            z = z * tl.rsqrt(tl.sum(z * z, 1) / P + eps)[:, None] * weight
        if gate is not None:
            at = batch * stride_gb + token * stride_gn + head * stride_gh
            g = tl.load(gate + at + p, mask=live, other=0).to(tl.float32)
            z = z * g * tl.sigmoid(g)
        at = ((batch * N + token) * (G * R) + head) * P
        tl.store(out + at + p, z.to(out.dtype.element_ty), mask=live)


@triton.jit
def _backward(
    dout, y, v, skip, norm_weight, gate, dy, dv, dgate, dskip, dweight,
    N, G, P, eps,
    stride_ob, stride_on, stride_oh, stride_yb, stride_yn, stride_yh,
    stride_vb, stride_vn, stride_vh, stride_gb, stride_gn, stride_gh,
    R: tl.constexpr, BLOCK_N: tl.constexpr, P2: tl.constexpr,
):  # fmt: skip
    """A program a tile of tokens and a KV head; the parameters' gradients are left as a sum a tile."""
    group, tile = tl.program_id(0) % G, tl.program_id(0) // G
    tiles = tl.cdiv(N, BLOCK_N)
    batch = (tile // tiles).to(tl.int64)
    token = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
    p = tl.arange(0, P2)
    live = (token < N) & (p < P)[None, :]
    value = tl.load(v + batch * stride_vb + token * stride_vn + group * stride_vh + p, mask=live, other=0)
    value = value.to(tl.float32)
    dvalue = tl.zeros((BLOCK_N, P2), tl.float32)
    for head in range(group * R, group * R + R):
        here = ((batch * N + token) * (G * R) + head) * P + p
        partial = tile.to(tl.int64) * (G * R) + head
        grad = tl.load(
            dout + batch * stride_ob + token * stride_on + head * stride_oh + p, mask=live, other=0
        ).to(tl.float32)
        at = batch * stride_yb + token * stride_yn + head * stride_yh
        scale = tl.load(skip + head).to(tl.float32)
        z = tl.load(y + at + p, mask=live, other=0).to(tl.float32) + scale * value
        normed, weighed = z, z
        if norm_weight is not None:
            weight = tl.load(norm_weight + head * P + p, mask=p < P, other=0).to(tl.float32)
            inverse = tl.rsqrt(tl.sum(z * z, 1) / P + eps)[:, None]
            normed = z * inverse
            weighed = normed * weight[None, :]
        if gate is not None:
            at = batch * stride_gb + token * stride_gn + head * stride_gh
            g = tl.load(gate + at + p, mask=live, other=0).to(tl.float32)
            open = tl.sigmoid(g)
            dg = grad * weighed * open * (1 + g * (1 - open))
            tl.store(dgate + here, dg.to(dgate.dtype.element_ty), mask=live)
            grad = grad * g * open
        if norm_weight is not None:
            tl.store(dweight + partial * P + p, tl.sum(grad * normed, 0), mask=p < P)
            grad = grad * weight[None, :]
            grad = inverse * (grad - normed * (tl.sum(grad * normed, 1) / P)[:, None])
        tl.store(dy + here, grad.to(dy.dtype.element_ty), mask=live)
        tl.store(dskip + partial, tl.sum(grad * value))
        dvalue += scale * grad
    at = ((batch * N + token) * G + group) * P
    tl.store(dv + at + p, dvalue.to(dv.dtype.element_ty), mask=live)
