"""One token of the SSD scan as one Triton kernel, which reads and writes each state once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.ops import triton_support
from mixers.ops.ssd.chunks import DENOMINATOR_FLOOR
from mixers.ops.ssd_step.reference import check
from mixers.ops.strides import rows

MANY = 512
"""Programs that keep a chip's memory busy with one warp each."""


def ssd_step(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    decay: tuple[Tensor, Tensor],
    state: Tensor,
    *,
    denominator: bool = False,
    skip: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: Tensor | None = None,
) -> Tensor:
    """Advance by one token; see :func:`mixers.ops.ssd_step.reference.ssd_step`. It has no gradients."""
    check(c, b, x, decay, state, denominator, skip, norm_weight, gate)
    gate = None if gate is None else rows(gate)
    return _ssd_step(rows(c), rows(b), rows(x), *decay, state, denominator, skip, norm_weight, norm_eps, gate)


@torch.library.custom_op("linmu::ssd_step", mutates_args={"state"})
def _ssd_step(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    log_a: Tensor,
    dt: Tensor,
    state: Tensor,
    denominator: bool,
    skip: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    gate: Tensor | None,
) -> Tensor:
    batch, heads, width = c.shape
    groups, values = x.shape[1:]
    states = state.shape[1]
    y = torch.empty((batch, heads, values), dtype=x.dtype, device=x.device)
    with triton_support.on_device(state):
        _step[(batch * states,)](
            c, b, x, log_a, dt, state, skip, norm_weight, gate, y,
            states, width, values, eps, *_strides(c), *_strides(b), *_strides(x), *_strides(state),
            *log_a.stride(), *dt.stride(), *_strides(gate),
            R=heads // states, R2=triton.next_power_of_2(heads // states), SHARE=states // groups,
            COLUMNS=state.stride(2), DENOMINATOR=denominator, FLOOR=DENOMINATOR_FLOOR,
            **_config(width, values, batch * states),
        )  # fmt: skip
    return y


@_ssd_step.register_fake
def _(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    log_a: Tensor,
    dt: Tensor,
    state: Tensor,
    denominator: bool,
    skip: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    gate: Tensor | None,
) -> Tensor:
    return x.new_empty((*c.shape[:2], x.shape[2]))


def _config(width: int, values: int, programs: int) -> dict[str, int]:
    """Rows of a state that a program holds at once, and warps.

    Many programs have one warp each, whose threads hold whole columns: sums over K then need no exchange. A few
    have more, since one warp cannot keep a multiprocessor's memory busy.
    """
    p2 = triton.next_power_of_2(values)
    warps = 1 if programs >= MANY else 4
    return {
        "BLOCK_K": min(2048 * warps // p2, triton.next_power_of_2(width)),
        "P2": p2,
        "num_warps": warps,
    }


def _strides(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if t is None else t.stride()[:2]


@triton.jit
def _step(
    c, b, x, log_a, dt, state, skip, norm_weight, gate, y,
    E, K, P, eps,
    stride_cb, stride_ch, stride_bb, stride_bh, stride_xb, stride_xh, stride_sb, stride_se,
    stride_ab, stride_ae, stride_db, stride_de, stride_gb, stride_gh,
    R: tl.constexpr, R2: tl.constexpr, SHARE: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr, P2: tl.constexpr, DENOMINATOR: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """A program a state, which stays in registers while the R query heads of its group read it."""
    batch, e = (tl.program_id(0) // E).to(tl.int64), tl.program_id(0) % E
    p, r = tl.arange(0, P2), tl.arange(0, R2)
    inside = (r < R)[:, None] & (p < P)[None, :]
    head = e * R + r
    decay = tl.exp(tl.load(log_a + batch * stride_ab + e * stride_ae).to(tl.float32))
    step = tl.load(dt + batch * stride_db + e * stride_de).to(tl.float32)
    value = tl.load(x + batch * stride_xb + e // SHARE * stride_xh + p, mask=p < P, other=0).to(tl.float32)
    total, weight = tl.zeros((R2, P2), tl.float32), tl.zeros((R2,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = (k < K)[:, None] & (p < P)[None, :]
        at = state + batch * stride_sb + e * stride_se + k * COLUMNS
        kept = tl.load(at[:, None] + p[None, :], mask=there, other=0)
        key = tl.load(b + batch * stride_bb + e // SHARE * stride_bh + k, mask=k < K, other=0)
        key = key.to(tl.float32) * step
        query = c + batch * stride_cb + e * R * stride_ch + k
        following = tl.load(query, mask=k < K, other=0)
        kept = kept * decay + key[:, None] * value[None, :]
        if DENOMINATOR:
            last = tl.load(at + P, mask=k < K, other=0) * decay + key
            tl.store(at + P, last, mask=k < K)
        tl.store(at[:, None] + p[None, :], kept, mask=there)
        for i in tl.static_range(R):
            now = following.to(tl.float32)
            if i + 1 < R:
                following = tl.load(query + (i + 1) * stride_ch, mask=k < K, other=0)
            total = tl.where((r == i)[:, None], total + tl.sum(now[:, None] * kept, 0)[None, :], total)
            if DENOMINATOR:
                weight = tl.where(r == i, weight + tl.sum(now * last, 0), weight)

    if DENOMINATOR:
        total = total / tl.maximum(weight, FLOOR)[:, None]
    if skip is not None:
        total += tl.load(skip + head, mask=r < R, other=0).to(tl.float32)[:, None] * value[None, :]
    if norm_weight is not None:
        scale = tl.load(norm_weight + head[:, None] * P + p[None, :], mask=inside, other=0).to(tl.float32)
        total = total * tl.rsqrt(tl.sum(total * total, 1) / P + eps)[:, None] * scale
    if gate is not None:
        at = batch * stride_gb + head[:, None] * stride_gh + p[None, :]
        z = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
        total = total * z * tl.sigmoid(z)
    at = ((batch * E + e) * R + r[:, None]) * P + p[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
