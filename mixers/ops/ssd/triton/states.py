"""The states that enter the chunks: segments of chunks are summed, carried from one to the next, and run again."""

import triton
import triton.language as tl

from mixers.ops.ssd.triton.decays import (
    at_steps,
    chunk_end,
    from_start,
    head_rows,
    running,
    to_end,
    tokens_at,
)


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
    if direction == 0:
        edge = at_steps(table, row, chunk * Q + Q - 1, length, 0)
        gap = to_end(sums, ends, 0, row, head, steps, chunk, B, E, chunks, padded, TERMS)
        of = at_steps(table, row, steps, length, 0)
    else:
        edge = at_steps(table, row, chunk * Q, length, -1)
        gap = from_start(sums, 1, row, head, steps, B, E, padded, TERMS)
        of = at_steps(table, row, steps, length, -1)
    left = tl.exp2(tl.where(of == edge, gap, float("-inf")))
    return left, running(sums, direction, 1, row, head, steps, B, E, padded, TERMS)


@triton.jit(do_not_specialize=["length", "chunks", "B", "at_once"])
def segment_states(
    b,
    x,
    states,
    ones,
    keeps,
    firsts,
    first_ones,
    sums,
    ends,
    order,
    sequence,
    extent,
    length,
    chunks,
    B,
    at_once,
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
    ENTERING: tl.constexpr,
    TERMS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Run over the chunks of a segment, ``at_once`` of them, in each direction, carrying the state along.

    ENTERING: start from ``firsts`` and store in ``states`` the state that enters each chunk, in ``keeps`` what
    the chunk keeps of it. Otherwise: start from zero, store what the segment adds and keeps.
    ``states`` is [directions, B, E, chunks or segments, K', P'], ``ones`` (the denominator's) [.., K'], padded to
    whole tiles; ``firsts`` and ``first_ones`` are alike, by segment.
    """
    PADDED_K: tl.constexpr = TILES_K * BLOCK_K
    SIZE: tl.constexpr = PADDED_K * TILES_P * BLOCK_P
    pid = tl.program_id(0)
    tile_p, tile_k = pid % TILES_P, pid // TILES_P % TILES_K
    pid = pid // (TILES_P * TILES_K)
    head = pid % E
    group = head // (E // G)
    segments = tl.cdiv(chunks, at_once)
    segment = pid // E % segments
    row = pid // E // segments
    begin = segment * at_once
    count = tl.minimum(at_once, chunks - begin)
    ks = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    ps = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    tile = ks[:, None] * (TILES_P * BLOCK_P) + ps[None]
    padded = chunks * Q
    for direction in tl.static_range(2 if BOTH else 1):
        line = tl.cast((direction * B + row) * E + head, tl.int64)
        at = line * segments + segment
        state = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
        one = tl.zeros([BLOCK_K], tl.float32)
        kept = 1.0
        if ENTERING:
            state = tl.load(firsts + at * SIZE + tile)
            if DENOMINATOR:
                one = tl.load(first_ones + at * PADDED_K + ks)
        for i in tl.range(0, count, num_stages=STAGES):
            chunk = begin + (i if direction == 0 else count - 1 - i)
            steps = chunk * Q + tl.arange(0, Q)
            inside = steps < length
            tokens = tokens_at(order, row, steps, length)
            keys = tl.load(
                b + row.to(tl.int64) * b_row + group * b_head + tokens[None] * b_token + ks[:, None],
                mask=inside[None] & (ks < K)[:, None],
                other=0,
            ).to(tl.float32)
            values = tl.load(
                head_rows(x, row, group, tokens, ps, x_row, x_token, x_head),
                mask=inside[:, None] & (ps < P)[None],
                other=0,
            ).to(DOT)
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
            end, low = chunk_end(ends, direction, row, head, chunk, B, E, chunks, TERMS == 3)
            keep = tl.where(edge == other, tl.exp2(end + low), 0.0)
            if ENTERING:
                tl.store(states + (line * chunks + chunk) * SIZE + tile, state.to(states.dtype.element_ty))
                if (tile_p == 0) & (tile_k == 0):
                    tl.store(keeps + line * chunks + chunk, keep)
                if DENOMINATOR:  # noqa: SIM102 -- known when it is compiled, the other when it runs
                    if tile_p == 0:
                        tl.store(ones + (line * chunks + chunk) * PADDED_K + ks, one)
            weighed = keys * (left * dt)[None]
            state = tl.dot(weighed.to(DOT), values, state * keep, input_precision=PRECISION)
            if DENOMINATOR:
                one = one * keep + tl.sum(weighed, 1)
            kept *= keep
        if not ENTERING:
            tl.store(states + at * SIZE + tile, state)
            if (tile_p == 0) & (tile_k == 0):
                tl.store(keeps + at, kept)
            if DENOMINATOR:  # noqa: SIM102
                if tile_p == 0:
                    tl.store(ones + at * PADDED_K + ks, one)


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
