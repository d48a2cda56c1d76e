"""What each chunk adds to the state, and the states that enter the chunks."""

import triton
import triton.language as tl

from mixers.ops.ssd.triton.decays import at_steps, chunk_end, running, tokens_at


@triton.jit
def leaving(
    sums,
    ends,
    direction: tl.constexpr,
    row,
    head,
    steps,
    chunk,
    table,
    Q: tl.constexpr,
    length,
    B,
    E,
    chunks,
    padded,
    TERMS: tl.constexpr,
):
    """Return what is left of each step of a chunk in the state that leaves it, and the step's dt, [Q] each.

    ``table`` is the sequence in direction 0 and the extent in direction 1; other segments leave nothing.
    """
    total = running(sums, direction, 0, row, head, steps, B, E, padded, TERMS)
    if direction == 0:
        edge = at_steps(table, row, chunk * Q + Q - 1, length, 0)
        end, end_low = chunk_end(ends, 0, row, head, chunk, B, E, chunks, TERMS == 3)
        gap = end - total
        if TERMS == 3:
            gap += end_low - running(sums, 0, 2, row, head, steps, B, E, padded, TERMS)
        of = at_steps(table, row, steps, length, 0)
    else:
        edge = at_steps(table, row, chunk * Q, length, -1)
        gap = total
        if TERMS == 3:
            gap += running(sums, 1, 2, row, head, steps, B, E, padded, TERMS)
        of = at_steps(table, row, steps, length, -1)
    left = tl.exp2(tl.where(of == edge, gap, float("-inf")))
    return left, running(sums, direction, 1, row, head, steps, B, E, padded, TERMS)


@triton.jit(do_not_specialize=["length", "chunks", "B"])
def chunk_states(
    b,
    x,
    added,
    added_ones,
    keeps,
    sums,
    ends,
    order,
    sequence,
    extent,
    length,
    chunks,
    B,
    b_row,
    b_token,
    b_head,
    x_row,
    x_token,
    x_head,
    G: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES_K: tl.constexpr,
    TILES_P: tl.constexpr,
    BOTH: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    TERMS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum what the tokens of a chunk add to the state that leaves it, Σ_j w_j b_j x_jᵀ, per decay head.

    ``added`` is [directions, B, E, chunks, K', P'] and ``added_ones``, the denominator's, [.., K'], padded to
    whole tiles; ``keeps`` is [directions, B, E, chunks]: what is kept of the state that enters.
    """
    pid = tl.program_id(0)
    tile_p, tile_k = pid % TILES_P, pid // TILES_P % TILES_K
    pid = pid // (TILES_P * TILES_K)
    head = pid % E
    group = head // (E // G)
    chunk = pid // E % chunks
    row = pid // E // chunks
    steps = chunk * Q + tl.arange(0, Q)
    inside = steps < length
    tokens = tokens_at(order, row, steps, length)
    ks = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    ps = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    keys = tl.load(
        b + row.to(tl.int64) * b_row + group * b_head + tokens[:, None] * b_token + ks[None],
        mask=inside[:, None] & (ks < K)[None],
        other=0,
    ).to(DOT)
    values = tl.load(
        x + row.to(tl.int64) * x_row + group * x_head + tokens[:, None] * x_token + ps[None],
        mask=inside[:, None] & (ps < P)[None],
        other=0,
    ).to(tl.float32)
    padded = chunks * Q
    for direction in tl.static_range(2 if BOTH else 1):
        if direction == 0:
            edge = at_steps(sequence, row, chunk * Q + Q - 1, length, 0)
            other = at_steps(sequence, row, tl.maximum(chunk * Q - 1, 0), length, 0)
            left, dt = leaving(
                sums, ends, 0, row, head, steps, chunk, sequence, Q, length, B, E, chunks, padded, TERMS
            )
        else:
            edge = at_steps(extent, row, chunk * Q, length, -1)
            other = at_steps(extent, row, chunk * Q + Q, length, -1)
            other = tl.where(chunk * Q + Q < length, other, -1)
            left, dt = leaving(
                sums, ends, 1, row, head, steps, chunk, extent, Q, length, B, E, chunks, padded, TERMS
            )
        weight = left * dt
        at = tl.cast(((direction * B + row) * E + head) * chunks + chunk, tl.int64)
        if tile_p == 0:
            if tile_k == 0:
                end, low = chunk_end(ends, direction, row, head, chunk, B, E, chunks, TERMS == 3)
                tl.store(keeps + at, tl.where(edge == other, tl.exp2(end + low), 0.0))
            if DENOMINATOR:
                ones = tl.sum(keys.to(tl.float32) * weight[:, None], 0)
                tl.store(added_ones + at * (TILES_K * BLOCK_K) + ks, ones)
        weighed = (values * weight[:, None]).to(DOT)
        state = tl.dot(tl.trans(keys), weighed, input_precision=PRECISION)
        place = at * (TILES_K * BLOCK_K * TILES_P * BLOCK_P)
        place += ks[:, None] * (TILES_P * BLOCK_P) + ps[None]
        tl.store(added + place, state.to(added.dtype.element_ty))


@triton.jit(do_not_specialize=["chunks", "B"])
def carry_states(
    added,
    entering,
    keeps,
    first,
    last,
    chunks,
    B,
    E: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_P: tl.constexpr,
    FIRST_COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    FLIP: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Run s ← keep·s + added over the chunks, from left in direction 0 and from right in 1 (FLIP: reversed).

    Stores the state that enters each chunk. Direction 0 starts from ``first`` and leaves ``last``, each
    [B, E, K, COLUMNS] in fp32 (None: zeros, not kept), of which it works on P columns from FIRST_COLUMN.
    """
    pid = tl.program_id(0)
    blocks: tl.constexpr = PADDED_K * PADDED_P // LANES
    block = pid % blocks
    head = pid // blocks % E
    row = pid // blocks // E % B
    direction = pid // blocks // E // B
    lanes = block * LANES + tl.arange(0, LANES)
    k, p = lanes // PADDED_P, lanes % PADDED_P
    real = (k < K) & (p < P)
    base = tl.cast((direction * B + row) * E + head, tl.int64) * chunks
    outer = ((row * E + head) * K + k) * COLUMNS + FIRST_COLUMN + p
    state = tl.zeros([LANES], tl.float32)
    if first is not None:
        state = tl.load(first + outer, mask=real & (direction == 0), other=0).to(tl.float32)
    backward = (direction == 1) != FLIP
    for step in tl.range(0, chunks, num_stages=STAGES):
        chunk = base + tl.where(backward, chunks - 1 - step, step)
        at = chunk * (PADDED_K * PADDED_P) + lanes
        tl.store(entering + at, state.to(entering.dtype.element_ty))
        state = tl.load(keeps + chunk) * state + tl.load(added + at).to(tl.float32)
    if last is not None:
        tl.store(last + outer, state, mask=real & (direction == 0))
