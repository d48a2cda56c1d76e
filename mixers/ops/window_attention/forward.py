"""The forward kernel: a program has one tile of a block's queries and one KV head, and all heads that read it."""

from __future__ import annotations

import triton
import triton.language as tl

from mixers.ops.window_attention.tiles import (
    load_angles,
    load_bounds,
    load_halves,
    load_keys,
    load_slots,
    store_whole,
    turn,
)


@triton.jit
def scores(
    q_lo, q_hi, k_lo, k_hi, visible, scale, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Query·key in units of log 2, bounded by ``cap`` where CAPPED, -inf where not visible."""
    s = tl.dot(q_lo, tl.trans(k_lo), input_precision=PRECISION)
    s = tl.dot(q_hi, tl.trans(k_hi), s, input_precision=PRECISION) * scale
    if CAPPED:
        s = cap * (2 * tl.sigmoid(2 * s / cap) - 1)
    return tl.where(visible, s, float("-inf"))


@triton.jit
def bent(ds, s, cap, CAPPED: tl.constexpr):
    """Gradient of the unbounded scores, given that of the bounded ones ``s``."""
    if CAPPED:
        level = tl.where(s == float("-inf"), 0.0, s) / cap
        ds *= 1.0 - level * level
    return ds


@triton.jit
def load_queries(
    q, rows, asked, cosine, sine,
    P: tl.constexpr, TURNED: tl.constexpr, BLOCK_H: tl.constexpr, ROTARY: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Load a tile of queries of one head as two rotated halves."""
    lo, hi = load_halves(q, rows, asked, P, TURNED, BLOCK_H)
    if ROTARY:
        lo, hi = turn(lo, hi, cosine, sine)
    return lo.to(DOT), hi.to(DOT)


@triton.jit
def finish(
    out, lse, h, token, asked, best, total, acc,
    HEADS: tl.constexpr, P: tl.constexpr, KEEP_LSE: tl.constexpr,
):  # fmt: skip
    """Store the averages of one head, and log2 Σ 2^score; infinite where nothing was visible."""
    sound = tl.where(total == 0, 1.0, total)
    store_whole(out + h * P, token * (HEADS * P), asked, acc * (1.0 / sound)[:, None], False, P)
    if KEEP_LSE:
        kept = tl.where(total == 0, float("inf"), best + tl.log2(sound))
        tl.store(lse + token * HEADS + h, kept, mask=asked)


@triton.jit
def forward_kernel(
    q, k, v, out, lse, queries, keys, first, stop, key_valid, cos, sin,
    length, rows, query_slots, key_slots, tiles, scale, cap,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, rot_b, rot_n,
    G: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    SINGLE: tl.constexpr, BANDED: tl.constexpr, ROTARY: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
    KEEP_LSE: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of queries.

    SINGLE: the keys of a block fit one tile, which is kept while the heads go by.
    """
    pid = tl.program_id(0)
    g, block, tile = pid % G, pid // G // tiles, pid // G % tiles
    query_slot = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token, asked = load_slots(queries, block, query_slot, query_slots)
    row, at = token // length, token % length
    q_rows = row * q_b + at * q_n
    q += g * GROUP * q_h
    k += g * k_h
    v += g * v_h
    cosine, sine = 0.0, 0.0
    if ROTARY:
        cosine, sine = load_angles(cos, sin, row, at, asked, rot_b, rot_n, TURNED, BLOCK_H)
    low, high = 0, key_slots
    begin, end = query_slot, query_slot
    if BANDED:
        begin, end = load_bounds(first, stop, block, query_slot, query_slots)
        low = tl.min(tl.where(asked, begin, key_slots)) // BLOCK_K * BLOCK_K
        high = tl.max(tl.where(asked, end, 0))

    if SINGLE:
        key_slot = tl.arange(0, BLOCK_K)
        k_lo, k_hi, value, seen = load_keys(
            k, v, cos, sin, key_valid, keys, block, key_slot, key_slots, rows, rows - length,
            k_b, k_n, v_b, v_n, rot_b, rot_n, P, TURNED, BLOCK_H, BLOCK_P, ROTARY, MASKED, DOT,
        )  # fmt: skip
        visible = seen[None, :]
        if BANDED:
            visible = visible & (key_slot[None, :] >= begin[:, None]) & (key_slot[None, :] < end[:, None])
        for h in tl.range(0, GROUP, num_stages=STAGES):
            q_lo, q_hi = load_queries(
                q + h * q_h, q_rows, asked, cosine, sine, P, TURNED, BLOCK_H, ROTARY, DOT
            )
            s = scores(q_lo, q_hi, k_lo, k_hi, visible, scale, cap, CAPPED, PRECISION)
            best = tl.max(s, 1)
            best = tl.where(best == float("-inf"), 0.0, best)
            p = tl.exp2(s - best[:, None])
            total = tl.sum(p, 1)
            acc = tl.dot(p.to(DOT), value, input_precision=PRECISION)
            finish(out, lse, g * GROUP + h, token, asked, best, total, acc, G * GROUP, P, KEEP_LSE)
    else:
        for h in range(0, GROUP):
            q_lo, q_hi = load_queries(
                q + h * q_h, q_rows, asked, cosine, sine, P, TURNED, BLOCK_H, ROTARY, DOT
            )
            best = tl.full([BLOCK_Q], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_Q], tl.float32)
            acc = tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)
            for start in tl.range(low, high, BLOCK_K, num_stages=STAGES):
                key_slot = start + tl.arange(0, BLOCK_K)
                k_lo, k_hi, value, seen = load_keys(
                    k, v, cos, sin, key_valid, keys, block, key_slot, key_slots, rows, rows - length,
                    k_b, k_n, v_b, v_n, rot_b, rot_n, P, TURNED, BLOCK_H, BLOCK_P, ROTARY, MASKED, DOT,
                )  # fmt: skip
                visible = seen[None, :]
                if BANDED:
                    visible = (
                        visible & (key_slot[None, :] >= begin[:, None]) & (key_slot[None, :] < end[:, None])
                    )
                s = scores(q_lo, q_hi, k_lo, k_hi, visible, scale, cap, CAPPED, PRECISION)
                higher = tl.maximum(best, tl.max(s, 1))
                finite = tl.where(higher == float("-inf"), 0.0, higher)
                p = tl.exp2(s - finite[:, None])
                fade = tl.exp2(best - finite)
                total = total * fade + tl.sum(p, 1)
                acc = tl.dot(p.to(DOT), value, acc * fade[:, None], input_precision=PRECISION)
                best = higher
            finish(out, lse, g * GROUP + h, token, asked, best, total, acc, G * GROUP, P, KEEP_LSE)
