"""What the kernels share: rows gathered by index, split into the two halves that rotary turns into each other.

A head of P channels is loaded as two tiles, so that rotate-half pairs stand at the same place of both: where
rotary turns all of P, the tiles are the first and the second half. Channels beyond the turned ones are dealt
to both tiles behind them. Products over channels are the sum of the products of the halves.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns(P: tl.constexpr, TURNED: tl.constexpr, BLOCK_H: tl.constexpr):
    """Channels of the two tiles; TURNED is half of the channels that rotary turns, HALF where all."""
    HALF: tl.constexpr = (P + 1) // 2
    c = tl.arange(0, BLOCK_H)
    if TURNED == HALF:
        low = c
        high = c + HALF
    else:
        low = tl.where(c < TURNED, c, c + TURNED)
        high = tl.where(c < TURNED, c + TURNED, c + HALF)
    return low, high


@triton.jit
def load_halves(base, rows, there, P: tl.constexpr, TURNED: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load [rows, 2 tiles] of channels, zero where not ``there``."""
    low, high = columns(P, TURNED, BLOCK_H)
    if 2 * BLOCK_H == P:
        lo = tl.load(base + rows[:, None] + low[None, :], mask=there[:, None], other=0.0)
        hi = tl.load(base + rows[:, None] + high[None, :], mask=there[:, None], other=0.0)
    else:
        c = tl.arange(0, BLOCK_H)
        lo_there = there[:, None] & (c < (P + 1) // 2)[None, :]
        hi_there = there[:, None] & (c < P // 2)[None, :]
        lo = tl.load(base + rows[:, None] + low[None, :], mask=lo_there, other=0.0)
        hi = tl.load(base + rows[:, None] + high[None, :], mask=hi_there, other=0.0)
    return lo, hi


@triton.jit
def store_halves(
    base, rows, there, lo, hi,
    ADD: tl.constexpr, P: tl.constexpr, TURNED: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Store what :func:`load_halves` loads; ADD adds it to what stands there."""
    low, high = columns(P, TURNED, BLOCK_H)
    c = tl.arange(0, BLOCK_H)
    lo_there = there[:, None] & (c < (P + 1) // 2)[None, :]
    hi_there = there[:, None] & (c < P // 2)[None, :]
    at_lo = base + rows[:, None] + low[None, :]
    at_hi = base + rows[:, None] + high[None, :]
    if ADD:
        lo += tl.load(at_lo, mask=lo_there, other=0.0).to(tl.float32)
        hi += tl.load(at_hi, mask=hi_there, other=0.0).to(tl.float32)
    tl.store(at_lo, lo.to(base.dtype.element_ty), mask=lo_there)
    tl.store(at_hi, hi.to(base.dtype.element_ty), mask=hi_there)


@triton.jit
def load_whole(base, rows, there, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Load [rows, P] channels, zero where not ``there``."""
    c = tl.arange(0, BLOCK_P)
    if BLOCK_P == P:
        return tl.load(base + rows[:, None] + c[None, :], mask=there[:, None], other=0.0)
    return tl.load(base + rows[:, None] + c[None, :], mask=there[:, None] & (c < P)[None, :], other=0.0)


@triton.jit
def store_whole(base, rows, there, x, ADD: tl.constexpr, P: tl.constexpr):
    """Store what :func:`load_whole` loads; ADD adds it to what stands there."""
    c = tl.arange(0, x.shape[1])
    there = there[:, None] & (c < P)[None, :]
    at = base + rows[:, None] + c[None, :]
    if ADD:
        x += tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, x.to(base.dtype.element_ty), mask=there)


@triton.jit
def load_angles(cos, sin, row, at, there, rot_b, rot_n, TURNED: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load cos and sin [rows, BLOCK_H] of tokens; those not ``there`` are not turned."""
    c = tl.arange(0, BLOCK_H)
    offset = row * rot_b + at * rot_n
    if TURNED == BLOCK_H:
        there = there[:, None]
    else:
        there = there[:, None] & (c < TURNED)[None, :]
    cosine = tl.load(cos + offset[:, None] + c[None, :], mask=there, other=1.0)
    sine = tl.load(sin + offset[:, None] + c[None, :], mask=there, other=0.0)
    return cosine, sine


@triton.jit
def turn(lo, hi, cosine, sine):
    """Rotate the halves, in fp32."""
    lo, hi = lo.to(tl.float32), hi.to(tl.float32)
    cosine, sine = cosine.to(tl.float32), sine.to(tl.float32)
    return lo * cosine - hi * sine, hi * cosine + lo * sine


@triton.jit
def turn_back(lo, hi, cosine, sine):
    """Apply the transpose of :func:`turn`, which takes the gradient of its result to that of its input."""
    cosine, sine = cosine.to(tl.float32), sine.to(tl.float32)
    return lo * cosine + hi * sine, hi * cosine - lo * sine


@triton.jit
def load_slots(table, block, slot, slots):
    """Load token indices of a block's slots as int64; return them (0 where empty) and whether they are filled."""
    token = tl.load(table + block.to(tl.int64) * slots + slot, mask=slot < slots, other=-1).to(tl.int64)
    return tl.maximum(token, 0), token >= 0


@triton.jit
def load_bounds(first, stop, block, slot, slots):
    """Load from which slot on the other side is seen, and up to which; none at slots that are not there."""
    at = block.to(tl.int64) * slots + slot
    return tl.load(first + at, mask=slot < slots, other=0), tl.load(stop + at, mask=slot < slots, other=0)


@triton.jit
def load_keys(
    k, v, cos, sin, key_valid, keys, block, slot, slots, rows, history,
    k_b, k_n, v_b, v_n, rot_b, rot_n,
    P: tl.constexpr, TURNED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    ROTARY: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Load a tile of keys as two rotated halves, their values, and which of them may be looked at."""
    token, there = load_slots(keys, block, slot, slots)
    row, at = token // rows, token % rows
    if MASKED:
        there = there & (tl.load(key_valid + token, mask=there, other=0) != 0)
    lo, hi = load_halves(k, row * k_b + at * k_n, there, P, TURNED, BLOCK_H)
    value = load_whole(v, row * v_b + at * v_n, there, P, BLOCK_P).to(DOT)
    if ROTARY:
        turned = there & (at >= history)
        cosine, sine = load_angles(cos, sin, row, at - history, turned, rot_b, rot_n, TURNED, BLOCK_H)
        lo, hi = turn(lo, hi, cosine, sine)
    return lo.to(DOT), hi.to(DOT), value, there
