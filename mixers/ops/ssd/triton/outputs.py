"""The forward pass of a chunk: C·Bᵀ once for both directions and all query heads of a group."""

import triton
import triton.language as tl

from mixers.ops.ssd.triton.decays import at_steps, chunk_end, head_rows, running, tokens_at


@triton.jit
def pair_decays(
    sums,
    row,
    head,
    rows,
    columns,
    same_sequence,
    same_clip,
    B,
    E,
    padded,
    TERMS: tl.constexpr,
    BOTH: tl.constexpr,
):
    """Return what is left of token ``columns[j]`` at token ``rows[i]``, [I, J]: the decay between them, or 0."""
    total = running(sums, 0, 0, row, head, rows, B, E, padded, TERMS)
    gap = total[:, None] - running(sums, 0, 0, row, head, columns, B, E, padded, TERMS)[None]
    if TERMS == 3:
        low = running(sums, 0, 2, row, head, rows, B, E, padded, TERMS)
        gap += low[:, None] - running(sums, 0, 2, row, head, columns, B, E, padded, TERMS)[None]
    seen = same_sequence
    if BOTH:
        back = running(sums, 1, 0, row, head, rows, B, E, padded, TERMS)
        back_gap = running(sums, 1, 0, row, head, columns, B, E, padded, TERMS)[None] - back[:, None]
        if TERMS == 3:
            low = running(sums, 1, 2, row, head, rows, B, E, padded, TERMS)
            back_gap += running(sums, 1, 2, row, head, columns, B, E, padded, TERMS)[None] - low[:, None]
        gap = tl.where(columns[None] <= rows[:, None], gap, back_gap)
        seen = same_sequence | same_clip
    return tl.exp2(tl.where(seen, gap, float("-inf")))


@triton.jit
def pair_dts(sums, row, head, rows, columns, B, E, padded, TERMS: tl.constexpr, BOTH: tl.constexpr):
    """Return the step size dt of ``columns[j]`` in the direction in which ``rows[i]`` sees it, [I, J] or [1, J]."""
    dt = running(sums, 0, 1, row, head, columns, B, E, padded, TERMS)[None]
    if BOTH:
        back_dt = running(sums, 1, 1, row, head, columns, B, E, padded, TERMS)[None]
        dt = tl.where(columns[None] <= rows[:, None], dt, back_dt)
    return dt


@triton.jit
def reach(
    sums,
    ends,
    direction: tl.constexpr,
    row,
    head,
    steps,
    chunk,
    meets,
    B,
    E,
    chunks,
    padded,
    TERMS: tl.constexpr,
):
    """Return what is left at each step of the state that enters the chunk, [Q]; 0 where it does not meet it."""
    total = running(sums, direction, 0, row, head, steps, B, E, padded, TERMS)
    gap = total
    if TERMS == 3:
        gap += running(sums, direction, 2, row, head, steps, B, E, padded, TERMS)
    if direction == 1:
        end, low = chunk_end(ends, 1, row, head, chunk, B, E, chunks, TERMS == 3)
        gap = end - total
        if TERMS == 3:
            gap += low - running(sums, 1, 2, row, head, steps, B, E, padded, TERMS)
    return tl.exp2(tl.where(meets, gap, float("-inf")))


@triton.jit
def pair_masks(sequence, extent, vision, row, rows, columns, length, BOTH: tl.constexpr):
    """Return whom forward and backward scans let each row see, bool [I, J] each (the second as BOTH says)."""
    past = columns[None] <= rows[:, None]
    same_sequence = past
    if sequence is not None:
        at = at_steps(sequence, row, rows, length, 0)
        same_sequence = past & (at[:, None] == at_steps(sequence, row, columns, length, 0)[None])
    same_clip = same_sequence
    if BOTH:
        clip = at_steps(extent, row, rows, length, -1)
        sees = at_steps(vision, row, rows, length, 0) != 0
        same_clip = (
            (clip[:, None] == at_steps(extent, row, columns, length, -1)[None]) & sees[:, None] & (past == 0)
        )
    return same_sequence, same_clip


@triton.jit
def meets_state(
    sequence, extent, vision, direction: tl.constexpr, row, steps, chunk, Q: tl.constexpr, length
):
    """Return which steps of a chunk the state that enters it reaches, bool [Q]."""
    if direction == 0:
        entering = at_steps(sequence, row, tl.maximum(chunk * Q - 1, 0), length, 0)
        meets = at_steps(sequence, row, steps, length, 0) == entering
    else:
        following = at_steps(extent, row, chunk * Q + Q, length, -1)
        sees = at_steps(vision, row, steps, length, 0) != 0
        meets = (at_steps(extent, row, steps, length, -1) == following) & sees & (chunk * Q + Q < length)
    return meets


@triton.jit
def both_ones(ones, other, columns, BOTH: tl.constexpr):
    """Return the denominators' states [K, 16]: the forward one in column 0, the backward one in column 1."""
    tile = tl.where((columns == 0)[None], tl.load(ones)[:, None], 0.0)
    if BOTH:
        tile += tl.where((columns == 1)[None], tl.load(ones + other)[:, None], 0.0)
    return tile


@triton.jit(do_not_specialize=["length", "chunks", "B"])
def mix_chunks(
    c,
    b,
    x,
    y,
    denominators,
    skip,
    norm_weight,
    states,
    ones,
    sums,
    ends,
    order,
    sequence,
    extent,
    vision,
    length,
    chunks,
    B,
    c_row,
    c_token,
    c_head,
    b_row,
    b_token,
    b_head,
    x_row,
    x_token,
    x_head,
    floor,
    norm_eps,
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES_K: tl.constexpr,
    BOTH: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    TERMS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Mix a chunk for the query heads that share a decay: B, X, weights and states are loaded once for them.

    What is mixed is finished, as :func:`mixers.ops.finish` does, with what is given of skip and norm.

    y [B, N, H, P] and ``denominators`` [B, N, H] are contiguous, in token order.
    """
    R: tl.constexpr = H // E
    KEPT: tl.constexpr = TILES_K == 1
    PADDED_K: tl.constexpr = TILES_K * BLOCK_K
    pid = tl.program_id(0)
    decay = pid % E
    group = decay // (E // G)
    chunk = pid // E % chunks
    row = pid // E // chunks
    steps = chunk * Q + tl.arange(0, Q)
    inside = steps < length
    tokens = tokens_at(order, row, steps, length)
    ks, ps, columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_P), tl.arange(0, 16)
    padded = chunks * Q
    queries = head_rows(c, row, decay * R, tokens, ks, c_row, c_token, c_head)
    keys = b + row.to(tl.int64) * b_row + group * b_head + tokens[None] * b_token + ks[:, None]
    value = tl.load(
        head_rows(x, row, group, tokens, ps, x_row, x_token, x_head),
        mask=inside[:, None] & (ps < P)[None],
        other=0,
    ).to(DOT)
    same_sequence, same_clip = pair_masks(sequence, extent, vision, row, steps, steps, length, BOTH)
    weight = pair_decays(sums, row, decay, steps, steps, same_sequence, same_clip, B, E, padded, TERMS, BOTH)
    weight *= pair_dts(sums, row, decay, steps, steps, B, E, padded, TERMS, BOTH)
    meets = meets_state(sequence, extent, vision, 0, row, steps, chunk, Q, length)
    left = reach(sums, ends, 0, row, decay, steps, chunk, meets, B, E, chunks, padded, TERMS)
    at = tl.cast((row * E + decay) * chunks + chunk, tl.int64)
    other = tl.cast(B * E * chunks, tl.int64)
    size: tl.constexpr = PADDED_K * BLOCK_P
    state_tile = states + at * size + ks[:, None] * BLOCK_P + ps[None]
    ones_tile = ones + at * PADDED_K + ks
    if BOTH:
        meets = meets_state(sequence, extent, vision, 1, row, steps, chunk, Q, length)
        right = reach(sums, ends, 1, row, decay, steps, chunk, meets, B, E, chunks, padded, TERMS)
    if KEPT:
        key = tl.load(keys, mask=inside[None] & (ks < K)[:, None], other=0).to(DOT)
        state = tl.load(state_tile).to(DOT)
        if BOTH:
            back_state = tl.load(state_tile + other * size).to(DOT)
        if DENOMINATOR:
            one = both_ones(ones_tile, other * PADDED_K, columns, BOTH).to(DOT)

    for r in tl.range(R, num_stages=STAGES if KEPT else 1):
        mixed = tl.zeros([Q, BLOCK_P], tl.float32)
        if KEPT:
            query = tl.load(queries + r * c_head, mask=inside[:, None] & (ks < K)[None], other=0).to(DOT)
            scores = tl.dot(query, key, input_precision=PRECISION) * weight
            if DENOMINATOR:
                divisor = tl.sum(scores, 1)
                total = tl.dot(query, one, input_precision=PRECISION)
            weighed = scores.to(DOT)
            if BOTH:
                mixed = tl.dot(query, back_state, input_precision=PRECISION) * right[:, None]
            reached = (query.to(tl.float32) * left[:, None]).to(DOT)
            mixed = tl.dot(reached, state, mixed, input_precision=PRECISION)
        else:
            scores = tl.zeros([Q, Q], tl.float32)
            total = tl.zeros([Q, 16], tl.float32)
            if BOTH:
                for some in tl.range(0, PADDED_K, BLOCK_K, num_stages=STAGES):
                    query = tl.load(
                        queries + r * c_head + some, mask=inside[:, None] & (some + ks < K)[None], other=0
                    ).to(DOT)
                    state = tl.load(state_tile + other * size + some * BLOCK_P).to(DOT)
                    mixed = tl.dot(query, state, mixed, input_precision=PRECISION)
                mixed *= right[:, None]
            for some in tl.range(0, PADDED_K, BLOCK_K, num_stages=STAGES):
                query = tl.load(
                    queries + r * c_head + some, mask=inside[:, None] & (some + ks < K)[None], other=0
                ).to(DOT)
                key = tl.load(keys + some, mask=inside[None] & (some + ks < K)[:, None], other=0).to(DOT)
                scores = tl.dot(query, key, scores, input_precision=PRECISION)
                state = tl.load(state_tile + some * BLOCK_P).to(DOT)
                reached = (query.to(tl.float32) * left[:, None]).to(DOT)
                mixed = tl.dot(reached, state, mixed, input_precision=PRECISION)
                if DENOMINATOR:
                    one = both_ones(ones_tile + some, other * PADDED_K, columns, BOTH).to(DOT)
                    total = tl.dot(query, one, total, input_precision=PRECISION)
            scores *= weight
            if DENOMINATOR:
                divisor = tl.sum(scores, 1)
            weighed = scores.to(DOT)
        mixed = tl.dot(weighed, value, mixed, input_precision=PRECISION)
        place = (row.to(tl.int64) * length + tokens) * H + decay * R + r
        if DENOMINATOR:
            divisor += tl.sum(tl.where((columns == 0)[None], total, 0.0), 1) * left
            if BOTH:
                divisor += tl.sum(tl.where((columns == 1)[None], total, 0.0), 1) * right
            mixed /= tl.maximum(divisor, floor)[:, None]
            tl.store(denominators + place, divisor, mask=inside)
        if skip is not None:
            mixed += tl.load(skip + decay * R + r).to(tl.float32) * value.to(tl.float32)
        if norm_weight is not None:
            mixed *= tl.rsqrt(tl.sum(mixed * mixed, 1) / P + norm_eps)[:, None]
            mixed *= tl.load(norm_weight + (decay * R + r) * P + ps, mask=ps < P, other=0).to(tl.float32)[
                None
            ]
        tl.store(
            y + place[:, None] * P + ps[None],
            mixed.to(y.dtype.element_ty),
            mask=inside[:, None] & (ps < P)[None],
        )
