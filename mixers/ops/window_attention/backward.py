"""The backward kernels: of whole windows in one pass, and of any table by tiles of queries and of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from mixers.ops.window_attention.forward import bent, load_queries, scores
from mixers.ops.window_attention.tiles import (
    load_angles,
    load_bounds,
    load_keys,
    load_slots,
    load_whole,
    store_halves,
    store_whole,
    turn_back,
)


@triton.jit
def window_backward_kernel(
    dy, q, k, v, dq, dk, dv, queries, keys, key_valid, cos, sin,
    length, rows, query_slots, key_slots, scale, log_scale, cap,
    dy_b, dy_n, dy_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, rot_b, rot_n,
    G: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    ROTARY: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, ADD: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one window whose keys no other window has; the softmax is computed anew.

    Two programs share a window and KV head, one for dq and one for dk and dv, since the sums of one program
    would not fit the registers. They run at the same time and so read q and dy from memory once.
    """
    pid = tl.program_id(0)
    g, block = pid // 2 % G, pid // 2 // G
    query_slot, key_slot = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    token, asked = load_slots(queries, block, query_slot, query_slots)
    row, at = token // length, token % length
    q_rows, dy_rows = row * q_b + at * q_n, row * dy_b + at * dy_n
    history = rows - length
    cosine, sine = 0.0, 0.0
    if ROTARY:
        cosine, sine = load_angles(cos, sin, row, at, asked, rot_b, rot_n, TURNED, BLOCK_H)
    k_lo, k_hi, value, seen = load_keys(
        k + g * k_h, v + g * v_h, cos, sin, key_valid, keys, block, key_slot, key_slots, rows, history,
        k_b, k_n, v_b, v_n, rot_b, rot_n, P, TURNED, BLOCK_H, BLOCK_P, ROTARY, MASKED, DOT,
    )  # fmt: skip
    if pid % 2 == 0:
        for r in tl.range(0, GROUP, num_stages=STAGES):
            h = g * GROUP + r
            q_lo, q_hi = load_queries(
                q + h * q_h, q_rows, asked, cosine, sine, P, TURNED, BLOCK_H, ROTARY, DOT
            )
            do = load_whole(dy + h * dy_h, dy_rows, asked, P, BLOCK_P).to(DOT)
            _, ds = window_gradient(
                q_lo, q_hi, do, k_lo, k_hi, value, seen, scale, log_scale, cap, CAPPED, DOT, PRECISION
            )  # fmt: skip
            lo = tl.dot(ds, k_lo, input_precision=PRECISION)
            hi = tl.dot(ds, k_hi, input_precision=PRECISION)
            if ROTARY:
                lo, hi = turn_back(lo, hi, cosine, sine)
            store_halves(dq + h * P, token * (G * GROUP * P), asked, lo, hi, False, P, TURNED, BLOCK_H)
    else:
        dk_lo = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
        dk_hi = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
        dvalue = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
        for r in tl.range(0, GROUP, num_stages=STAGES):
            h = g * GROUP + r
            q_lo, q_hi = load_queries(
                q + h * q_h, q_rows, asked, cosine, sine, P, TURNED, BLOCK_H, ROTARY, DOT
            )
            do = load_whole(dy + h * dy_h, dy_rows, asked, P, BLOCK_P).to(DOT)
            p, ds = window_gradient(
                q_lo, q_hi, do, k_lo, k_hi, value, seen, scale, log_scale, cap, CAPPED, DOT, PRECISION
            )  # fmt: skip
            dvalue = tl.dot(tl.trans(p), do, dvalue, input_precision=PRECISION)
            dk_lo = tl.dot(tl.trans(ds), q_lo, dk_lo, input_precision=PRECISION)
            dk_hi = tl.dot(tl.trans(ds), q_hi, dk_hi, input_precision=PRECISION)
        store_keys(
            dk, dv, cos, sin, keys, block, key_slot, key_slots, g, rows, history, dk_lo, dk_hi, dvalue,
            rot_b, rot_n, G, P, TURNED, BLOCK_H, ROTARY, ADD,
        )  # fmt: skip


@triton.jit
def window_gradient(
    q_lo, q_hi, do, k_lo, k_hi, value, seen, scale, log_scale, cap,
    CAPPED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the weights of a head's softmax and the gradient of its scores."""
    s = scores(q_lo, q_hi, k_lo, k_hi, seen[None, :], log_scale, cap, CAPPED, PRECISION)
    best = tl.max(s, 1)
    p = tl.exp2(s - tl.where(best == float("-inf"), 0.0, best)[:, None])
    total = tl.sum(p, 1)
    p = p * (1.0 / tl.where(total == 0, 1.0, total))[:, None]
    dp = tl.dot(do, tl.trans(value), input_precision=PRECISION)
    ds = bent(p * (dp - tl.sum(p * dp, 1)[:, None]) * scale, s, cap, CAPPED)
    return p.to(DOT), ds.to(DOT)


@triton.jit
def query_backward_kernel(
    dy, q, k, v, y, lse, dlse, dq, delta, queries, keys, first, stop, key_valid, cos, sin,
    length, rows, query_slots, key_slots, tiles, scale, log_scale, cap,
    dy_b, dy_n, dy_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, rot_b, rot_n,
    G: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    BANDED: tl.constexpr, JOINED: tl.constexpr, ROTARY: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one head, and delta for :func:`key_backward_kernel`.

    delta is Σ dy·y, less the gradient of log Σ exp where JOINED: it moves a score by its weight, as dy·v does.
    """
    pid = tl.program_id(0)
    h, block, tile = pid % (G * GROUP), pid // (G * GROUP) // tiles, pid // (G * GROUP) % tiles
    g = h // GROUP
    query_slot = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token, asked = load_slots(queries, block, query_slot, query_slots)
    row, at = token // length, token % length
    cosine, sine = 0.0, 0.0
    if ROTARY:
        cosine, sine = load_angles(cos, sin, row, at, asked, rot_b, rot_n, TURNED, BLOCK_H)
    low, high = 0, key_slots
    begin, end = query_slot, query_slot
    if BANDED:
        begin, end = load_bounds(first, stop, block, query_slot, query_slots)
        low = tl.min(tl.where(asked, begin, key_slots)) // BLOCK_K * BLOCK_K
        high = tl.max(tl.where(asked, end, 0))
    q_lo, q_hi = load_queries(
        q + h * q_h, row * q_b + at * q_n, asked, cosine, sine, P, TURNED, BLOCK_H, ROTARY, DOT
    )
    do = load_whole(dy + h * dy_h, row * dy_b + at * dy_n, asked, P, BLOCK_P)
    own_rows = token * (G * GROUP * P)
    of_y = load_whole(y + h * P, own_rows, asked, P, BLOCK_P)
    share = tl.sum(do.to(tl.float32) * of_y.to(tl.float32), 1)
    at_head = token * (G * GROUP) + h
    if JOINED:
        share -= tl.load(dlse + at_head, mask=asked, other=0.0)
    tl.store(delta + at_head, share, mask=asked)
    norm = tl.load(lse + at_head, mask=asked, other=float("inf"))
    do = do.to(DOT)
    lo = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    hi = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    for start in tl.range(low, high, BLOCK_K, num_stages=STAGES):
        key_slot = start + tl.arange(0, BLOCK_K)
        k_lo, k_hi, value, seen = load_keys(
            k + g * k_h, v + g * v_h, cos, sin, key_valid, keys, block, key_slot, key_slots, rows, rows - length,
            k_b, k_n, v_b, v_n, rot_b, rot_n, P, TURNED, BLOCK_H, BLOCK_P, ROTARY, MASKED, DOT,
        )  # fmt: skip
        visible = seen[None, :]
        if BANDED:
            visible = visible & (key_slot[None, :] >= begin[:, None]) & (key_slot[None, :] < end[:, None])
        s = scores(q_lo, q_hi, k_lo, k_hi, visible, log_scale, cap, CAPPED, PRECISION)
        p = tl.exp2(s - norm[:, None])
        dp = tl.dot(do, tl.trans(value), input_precision=PRECISION)
        ds = bent(p * (dp - share[:, None]) * scale, s, cap, CAPPED).to(DOT)
        lo = tl.dot(ds, k_lo, lo, input_precision=PRECISION)
        hi = tl.dot(ds, k_hi, hi, input_precision=PRECISION)
    if ROTARY:
        lo, hi = turn_back(lo, hi, cosine, sine)
    store_halves(dq + h * P, own_rows, asked, lo, hi, False, P, TURNED, BLOCK_H)


@triton.jit
def key_backward_kernel(
    dy, q, k, v, lse, delta, dk, dv, keys, queries, first, stop, key_valid, cos, sin,
    length, rows, key_slots, query_slots, tiles, scale, log_scale, cap,
    dy_b, dy_n, dy_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, rot_b, rot_n,
    G: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    BANDED: tl.constexpr, ROTARY: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, ADD: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one KV head, over the transposed table."""
    pid = tl.program_id(0)
    g, block, tile = pid % G, pid // G // tiles, pid // G % tiles
    history = rows - length
    key_slot = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k_lo, k_hi, value, seen = load_keys(
        k + g * k_h, v + g * v_h, cos, sin, key_valid, keys, block, key_slot, key_slots, rows, history,
        k_b, k_n, v_b, v_n, rot_b, rot_n, P, TURNED, BLOCK_H, BLOCK_P, ROTARY, MASKED, DOT,
    )  # fmt: skip
    low, high = 0, query_slots
    begin, end = key_slot, key_slot
    if BANDED:
        begin, end = load_bounds(first, stop, block, key_slot, key_slots)
        low = tl.min(tl.where(seen, begin, query_slots)) // BLOCK_Q * BLOCK_Q
        high = tl.max(tl.where(seen, end, 0))
    dk_lo = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    dk_hi = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    dvalue = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    for start in range(low, high, BLOCK_Q):
        query_slot = start + tl.arange(0, BLOCK_Q)
        token, asked = load_slots(queries, block, query_slot, query_slots)
        row, at = token // length, token % length
        q_rows, dy_rows = row * q_b + at * q_n, row * dy_b + at * dy_n
        visible = asked[:, None] & seen[None, :]
        if BANDED:
            visible = visible & (query_slot[:, None] >= begin[None, :]) & (query_slot[:, None] < end[None, :])
        cosine, sine = 0.0, 0.0
        if ROTARY:
            cosine, sine = load_angles(cos, sin, row, at, asked, rot_b, rot_n, TURNED, BLOCK_H)
        for r in tl.range(0, GROUP, num_stages=STAGES):
            h = g * GROUP + r
            at_head = token * (G * GROUP) + h
            norm = tl.load(lse + at_head, mask=asked, other=float("inf"))
            share = tl.load(delta + at_head, mask=asked, other=0.0)
            q_lo, q_hi = load_queries(
                q + h * q_h, q_rows, asked, cosine, sine, P, TURNED, BLOCK_H, ROTARY, DOT
            )
            do = load_whole(dy + h * dy_h, dy_rows, asked, P, BLOCK_P).to(DOT)
            s = scores(q_lo, q_hi, k_lo, k_hi, visible, log_scale, cap, CAPPED, PRECISION)
            p = tl.exp2(s - norm[:, None])
            dp = tl.dot(do, tl.trans(value), input_precision=PRECISION)
            ds = bent(p * (dp - share[:, None]) * scale, s, cap, CAPPED).to(DOT)
            dvalue = tl.dot(tl.trans(p.to(DOT)), do, dvalue, input_precision=PRECISION)
            dk_lo = tl.dot(tl.trans(ds), q_lo, dk_lo, input_precision=PRECISION)
            dk_hi = tl.dot(tl.trans(ds), q_hi, dk_hi, input_precision=PRECISION)
    store_keys(
        dk, dv, cos, sin, keys, block, key_slot, key_slots, g, rows, history, dk_lo, dk_hi, dvalue,
        rot_b, rot_n, G, P, TURNED, BLOCK_H, ROTARY, ADD,
    )  # fmt: skip


@triton.jit
def store_keys(
    dk, dv, cos, sin, keys, block, slot, slots, g, rows, history, lo, hi, value, rot_b, rot_n,
    G: tl.constexpr, P: tl.constexpr, TURNED: tl.constexpr, BLOCK_H: tl.constexpr,
    ROTARY: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Turn the gradient of a tile of keys back, and store it and that of the values."""
    token, there = load_slots(keys, block, slot, slots)
    if ROTARY:
        row, at = token // rows, token % rows
        turned = there & (at >= history)
        cosine, sine = load_angles(cos, sin, row, at - history, turned, rot_b, rot_n, TURNED, BLOCK_H)
        lo, hi = turn_back(lo, hi, cosine, sine)
    own_rows = token * (G * P) + g * P
    store_halves(dk, own_rows, there, lo, hi, ADD, P, TURNED, BLOCK_H)
    store_whole(dv, own_rows, there, value, ADD, P)
