"""Joining attention sinks as Triton kernels: a few keys a row beside each query's own average, in one pass each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.ops import triton_support
from mixers.ops.eager import custom_op
from mixers.ops.join_sinks.reference import check
from mixers.ops.strides import leading, rows

PROGRAMS = 528
"""How many programs of the backward pass share the tokens of all rows; each leaves a partial sum."""

SINKS = 16
"""Sinks of a tile: the fewest columns of a matrix product."""


def join_sinks(
    q: Tensor,
    y: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    *,
    scale: float,
    softcap: None = None,
) -> Tensor:
    """Join sinks; see :func:`mixers.ops.join_sinks.reference.join_sinks`."""
    check(q, y, lse, k, v, hidden)
    if not y.numel():
        return torch.zeros_like(y)
    # A row's sinks [B, S, G, P].
    return _join_sinks(
        rows(q), rows(y), lse.float(), rows(k[:, 0]), rows(v[:, 0]), hidden.contiguous(), scale
    )


@custom_op("linmu::join_sinks")
def _join_sinks(
    q: Tensor, y: Tensor, lse: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float
) -> Tensor:
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    batch, length, heads, _ = y.shape
    config = _config(q, y)
    with triton_support.on_device(q):
        _forward[(batch * triton.cdiv(length, config["BLOCK_N"]) * heads,)](
            q, y, lse, k, v, hidden, out, *q.shape[1:], *k.shape[1:3], scale,
            *leading(q), *leading(y), *lse.stride(), *leading(k), *leading(v), **config,
        )  # fmt: skip
    return out


@_join_sinks.register_fake
def _(q: Tensor, y: Tensor, lse: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


@custom_op("linmu::join_sinks_backward")
def _join_sinks_backward(
    dout: Tensor, q: Tensor, y: Tensor, lse: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dy, dlse = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, y, lse))
    batch, length = q.shape[:2]
    sinks, groups = k.shape[1:3]
    config = _config(q, y)
    tiles = triton.cdiv(length, config["BLOCK_N"])
    spans = min(tiles, triton.cdiv(PROGRAMS, batch * groups))
    partial = torch.empty((2, spans, *k.shape), dtype=torch.float32, device=k.device)
    with triton_support.on_device(q):
        _backward[(spans * batch * groups,)](
            dout, q, y, lse, k, v, hidden, dq, dy, dlse, *partial, *q.shape[1:], sinks, groups,
            triton.cdiv(tiles, spans), batch, scale,
            *leading(dout), *leading(q), *leading(y), *lse.stride(), *leading(k), *leading(v), **config,
        )  # fmt: skip
    dk, dv = partial.sum(1)
    return dq, dy, dlse, dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True)


@_join_sinks_backward.register_fake
def _(
    dout: Tensor, q: Tensor, y: Tensor, lse: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float
) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, y, lse, k, v))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dout: Tensor):  # type: ignore[no-untyped-def]
    return *_join_sinks_backward(rows(dout), *ctx.saved_tensors, ctx.scale), None, None


_join_sinks.register_autograd(_differentiate, setup_context=_save)


def _config(q: Tensor, y: Tensor) -> dict[str, object]:
    """Tokens of a tile, the padded width of a head, warps, and the types of the products with keys and with values."""
    wide = max(triton.next_power_of_2(q.shape[3]), 16)
    dots = {"DOT_K": triton_support.dot_type(q.dtype), "DOT_V": triton_support.dot_type(y.dtype)}
    block_n = 16
    if q.dtype.itemsize == 2:
        block_n = 64 if wide <= 64 or triton_support.roomy(q.device) else 32
    return {**dots, "BLOCK_N": block_n, "P2": wide, "S2": SINKS, "num_warps": 8 if wide > 64 else 4}


@triton.jit
def _sinks(t, group, S, G, P, stride_s, stride_g, P2: tl.constexpr, S2: tl.constexpr):
    """The keys or values of a row's sinks [S2, P2]; zero where there are fewer."""
    s, p = tl.arange(0, S2)[:, None], tl.arange(0, P2)[None, :]
    return tl.load(t + s * stride_s + group * stride_g + p, mask=(s < S) & (p < P), other=0)


@triton.jit
def _weights(query, key, own, hidden, at, live, S, scale, S2: tl.constexpr):
    """Softmax over a query's own average and the sinks: its weight [n], and theirs [n, S2]; zero if there is none."""
    s = tl.arange(0, S2)[None, :]
    shown = live[:, None] & (s < S)
    shown = shown & (tl.load(hidden + at[:, None] * S + s, mask=shown, other=1) == 0)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(shown, scores, -float("inf"))
    top = tl.maximum(own, tl.max(scores, 1))
    top = tl.where(top == -float("inf"), 0.0, top)
    mine, theirs = tl.exp(own - top), tl.exp(scores - top[:, None])
    total = mine + tl.sum(theirs, 1)
    total = tl.where(total == 0, 1.0, total)
    return mine / total, theirs / total[:, None]


@triton.jit
def _forward(
    q, y, lse, k, v, hidden, out, N, H, P, S, G, scale,
    stride_qb, stride_qn, stride_qh, stride_yb, stride_yn, stride_yh, stride_lb, stride_ln, stride_lh,
    stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg,
    DOT_K: tl.constexpr, DOT_V: tl.constexpr, BLOCK_N: tl.constexpr, P2: tl.constexpr, S2: tl.constexpr,
):  # fmt: skip
    """A program a tile of tokens and a head."""
    head, tile = tl.program_id(0) % H, tl.program_id(0) // H
    tiles = tl.cdiv(N, BLOCK_N)
    batch, token = (tile // tiles).to(tl.int64), tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    group, live, p = head // (H // G), token < N, tl.arange(0, P2)[None, :]
    inside = live[:, None] & (p < P)
    key = _sinks(k + batch * stride_kb, group, S, G, P, stride_ks, stride_kg, P2, S2).to(DOT_K)
    value = _sinks(v + batch * stride_vb, group, S, G, P, stride_vs, stride_vg, P2, S2).to(DOT_V)
    at = q + batch * stride_qb + head * stride_qh
    query = tl.load(at + token[:, None] * stride_qn + p, mask=inside, other=0).to(DOT_K)
    at = lse + batch * stride_lb + token * stride_ln + head * stride_lh
    own = tl.load(at, mask=live, other=-float("inf"))
    mine, theirs = _weights(query, key, own, hidden, batch * N + token, live, S, scale, S2)
    at = y + batch * stride_yb + head * stride_yh
    average = tl.load(at + token[:, None] * stride_yn + p, mask=inside, other=0).to(tl.float32)
    average = tl.where((own == -float("inf"))[:, None], 0.0, average)
    made = tl.dot(theirs.to(DOT_V), value, mine[:, None] * average, input_precision="ieee")
    at = ((batch * N + token) * H + head) * P
    tl.store(out + at[:, None] + p, made.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dout, q, y, lse, k, v, hidden, dq, dy, dlse, dk, dv, N, H, P, S, G, TILES, BATCH, scale,
    stride_ob, stride_on, stride_oh, stride_qb, stride_qn, stride_qh, stride_yb, stride_yn, stride_yh,
    stride_lb, stride_ln, stride_lh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg,
    DOT_K: tl.constexpr, DOT_V: tl.constexpr, BLOCK_N: tl.constexpr, P2: tl.constexpr, S2: tl.constexpr,
):  # fmt: skip
    """A program a row, a KV head and a span of tiles, over which it sums the gradients of the sinks."""
    group, row = tl.program_id(0) % G, tl.program_id(0) // G
    batch, span = (row % BATCH).to(tl.int64), row // BATCH
    p, heads = tl.arange(0, P2)[None, :], H // G
    key = _sinks(k + batch * stride_kb, group, S, G, P, stride_ks, stride_kg, P2, S2).to(DOT_K)
    value = _sinks(v + batch * stride_vb, group, S, G, P, stride_vs, stride_vg, P2, S2).to(DOT_V)
    dkey, dvalue = tl.zeros((S2, P2), tl.float32), tl.zeros((S2, P2), tl.float32)
    first = span * TILES * heads
    for step in range(first, tl.minimum(first + TILES * heads, tl.cdiv(N, BLOCK_N) * heads)):
        head = group * heads + step % heads
        token = step // heads * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        live = token < N
        inside = live[:, None] & (p < P)
        at = q + batch * stride_qb + head * stride_qh
        query = tl.load(at + token[:, None] * stride_qn + p, mask=inside, other=0).to(DOT_K)
        at = lse + batch * stride_lb + token * stride_ln + head * stride_lh
        own = tl.load(at, mask=live, other=-float("inf"))
        mine, theirs = _weights(query, key, own, hidden, batch * N + token, live, S, scale, S2)
        at = y + batch * stride_yb + head * stride_yh
        average = tl.load(at + token[:, None] * stride_yn + p, mask=inside, other=0).to(tl.float32)
        average = tl.where((own == -float("inf"))[:, None], 0.0, average)
        at = dout + batch * stride_ob + head * stride_oh
        grad = tl.load(at + token[:, None] * stride_on + p, mask=inside, other=0).to(tl.float32)
        narrow = grad.to(DOT_V)
        of_mine = tl.sum(grad * average, 1)
        of_theirs = tl.dot(narrow, tl.trans(value), input_precision="ieee")
        mean = mine * of_mine + tl.sum(theirs * of_theirs, 1)
        scores = (theirs * (of_theirs - mean[:, None]) * scale).to(DOT_K)
        here = (batch * N + token) * H + head
        tl.store(dlse + here, mine * (of_mine - mean), mask=live)
        at = (here * P)[:, None] + p
        tl.store(dy + at, (mine[:, None] * grad).to(dy.dtype.element_ty), mask=inside)
        found = tl.dot(scores, key, input_precision="ieee")
        tl.store(dq + at, found.to(dq.dtype.element_ty), mask=inside)
        dkey = tl.dot(tl.trans(scores), query, dkey, input_precision="ieee")
        dvalue = tl.dot(tl.trans(theirs.to(DOT_V)), narrow, dvalue, input_precision="ieee")
    s = tl.arange(0, S2)[:, None]
    at = (((span * BATCH + batch) * S + s) * G + group) * P + p
    tl.store(dk + at, dkey, mask=(s < S) & (p < P))
    tl.store(dv + at, dvalue, mask=(s < S) & (p < P))
