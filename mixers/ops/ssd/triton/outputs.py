"""The forward pass of a chunk: whole, for all query heads that share a decay, or some rows of one head."""

import triton
import triton.language as tl

from mixers.ops.ssd.triton.decays import head_rows, tokens_at
from mixers.ops.ssd.triton.weights import meets_state, pair_weights, reach


@triton.jit
def finished(mixed, own, skip, norm_weight, head, ps, norm_eps, P: tl.constexpr):
    """Finish what is mixed [I, P], as :func:`mixers.ops.finish` does, with what is given; ``own`` are its values."""
    if skip is not None:
        mixed += tl.load(skip + head).to(tl.float32) * own.to(tl.float32)
    if norm_weight is not None:
        mixed *= tl.rsqrt(tl.sum(mixed * mixed, 1) / P + norm_eps)[:, None]
        mixed *= tl.load(norm_weight + head * P + ps, mask=ps < P, other=0).to(tl.float32)[None]
    return mixed


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
    PADDED_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
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
    pid = tl.program_id(0)
    decay = pid % E
    group = decay // (E // G)
    chunk = pid // E % chunks
    row = pid // E // chunks
    steps = chunk * Q + tl.arange(0, Q)
    inside = steps < length
    tokens = tokens_at(order, row, steps, length)
    ks, ps, columns = tl.arange(0, PADDED_K), tl.arange(0, BLOCK_P), tl.arange(0, 16)
    padded = chunks * Q
    value = tl.load(
        head_rows(x, row, group, tokens, ps, x_row, x_token, x_head),
        mask=inside[:, None] & (ps < P)[None],
        other=0,
    ).to(DOT)
    weight = pair_weights(
        sums, sequence, extent, vision, row, decay, steps, steps, length, B, E, padded, TERMS, BOTH
    )
    meets = meets_state(sequence, extent, vision, 0, row, steps, chunk, Q, length)
    left = reach(sums, ends, 0, row, decay, steps, chunk, meets, B, E, chunks, padded, TERMS)
    at = tl.cast((row * E + decay) * chunks + chunk, tl.int64)
    other = tl.cast(B * E * chunks, tl.int64)
    size: tl.constexpr = PADDED_K * BLOCK_P
    state_tile = states + at * size + ks[:, None] * BLOCK_P + ps[None]
    if BOTH:
        meets = meets_state(sequence, extent, vision, 1, row, steps, chunk, Q, length)
        right = reach(sums, ends, 1, row, decay, steps, chunk, meets, B, E, chunks, padded, TERMS)
    keys = b + row.to(tl.int64) * b_row + group * b_head + tokens[None] * b_token + ks[:, None]
    key = tl.load(keys, mask=inside[None] & (ks < K)[:, None], other=0).to(DOT)
    state = tl.load(state_tile).to(DOT)
    if BOTH:
        back_state = tl.load(state_tile + other * size).to(DOT)
    if DENOMINATOR:
        one = both_ones(ones + at * PADDED_K + ks, other * PADDED_K, columns, BOTH).to(DOT)
    queries = head_rows(c, row, decay * R, tokens, ks, c_row, c_token, c_head)
    for r in tl.range(R, num_stages=STAGES):
        query = tl.load(queries + r * c_head, mask=inside[:, None] & (ks < K)[None], other=0).to(DOT)
        scores = tl.dot(query, key, input_precision=PRECISION) * weight
        if DENOMINATOR:
            divisor = tl.sum(scores, 1)
            total = tl.dot(query, one, input_precision=PRECISION)
        mixed = tl.zeros([Q, BLOCK_P], tl.float32)
        if BOTH:
            mixed = tl.dot(query, back_state, input_precision=PRECISION) * right[:, None]
        reached = (query.to(tl.float32) * left[:, None]).to(DOT)
        mixed = tl.dot(reached, state, mixed, input_precision=PRECISION)
        mixed = tl.dot(scores.to(DOT), value, mixed, input_precision=PRECISION)
        place = (row.to(tl.int64) * length + tokens) * H + decay * R + r
        if DENOMINATOR:
            divisor += tl.sum(tl.where((columns == 0)[None], total, 0.0), 1) * left
            if BOTH:
                divisor += tl.sum(tl.where((columns == 1)[None], total, 0.0), 1) * right
            mixed /= tl.maximum(divisor, floor)[:, None]
            tl.store(denominators + place, divisor, mask=inside)
        mixed = finished(mixed, value, skip, norm_weight, decay * R + r, ps, norm_eps, P)
        tl.store(
            y + place[:, None] * P + ps[None],
            mixed.to(y.dtype.element_ty),
            mask=inside[:, None] & (ps < P)[None],
        )


@triton.jit(do_not_specialize=["length", "chunks", "B"])
def mix_rows(
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
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILES_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BOTH: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    TERMS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Mix ROWS steps of a chunk for one query head, over ROWS keys at a time: little is held at once.

    Else as :func:`mix_chunks`.
    """
    PARTS: tl.constexpr = Q // ROWS
    PADDED_K: tl.constexpr = TILES_K * BLOCK_K
    pid = tl.program_id(0)
    head = pid % H
    decay = head // (H // E)
    group = head // (H // G)
    first = pid // H % (chunks * PARTS) * ROWS
    chunk = first // Q
    row = pid // H // (chunks * PARTS)
    steps = first + tl.arange(0, ROWS)
    inside = steps < length
    tokens = tokens_at(order, row, steps, length)
    ks, ss, ps = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_P)
    padded = chunks * Q
    meets = meets_state(sequence, extent, vision, 0, row, steps, chunk, Q, length)
    left = reach(sums, ends, 0, row, decay, steps, chunk, meets, B, E, chunks, padded, TERMS)
    at = tl.cast((row * E + decay) * chunks + chunk, tl.int64)
    other = tl.cast(B * E * chunks, tl.int64)
    size: tl.constexpr = PADDED_K * BLOCK_P
    state_tile = states + at * size + ss[:, None] * BLOCK_P + ps[None]
    ones_tile = ones + at * PADDED_K + ss
    if BOTH:
        meets = meets_state(sequence, extent, vision, 1, row, steps, chunk, Q, length)
        right = reach(sums, ends, 1, row, decay, steps, chunk, meets, B, E, chunks, padded, TERMS)
    parts = head_rows(c, row, head, tokens, ss, c_row, c_token, c_head)
    mixed = tl.zeros([ROWS, BLOCK_P], tl.float32)
    divisor = tl.zeros([ROWS], tl.float32)
    for some in tl.range(0, PADDED_K, BLOCK_S, num_stages=1):
        query = tl.load(parts + some, mask=inside[:, None] & (some + ss < K)[None], other=0).to(tl.float32)
        reached = query * left[:, None]
        state = tl.load(state_tile + some * BLOCK_P).to(DOT)
        mixed = tl.dot(reached.to(DOT), state, mixed, input_precision=PRECISION)
        if DENOMINATOR:
            divisor += tl.sum(reached * tl.load(ones_tile + some)[None], 1)
        if BOTH:
            reached = query * right[:, None]
            state = tl.load(state_tile + other * size + some * BLOCK_P).to(DOT)
            mixed = tl.dot(reached.to(DOT), state, mixed, input_precision=PRECISION)
            if DENOMINATOR:
                divisor += tl.sum(reached * tl.load(ones_tile + other * PADDED_K + some)[None], 1)
    queries = head_rows(c, row, head, tokens, ks, c_row, c_token, c_head)
    if TILES_K == 1:
        query = tl.load(queries, mask=inside[:, None] & (ks < K)[None], other=0).to(DOT)
    for begin in tl.range(chunk * Q, chunk * Q + Q if BOTH else first + ROWS, ROWS, num_stages=STAGES):
        columns = begin + tl.arange(0, ROWS)
        known = columns < length
        sources = tokens_at(order, row, columns, length)
        keys = b + row.to(tl.int64) * b_row + group * b_head + sources[None] * b_token + ks[:, None]
        if TILES_K == 1:
            key = tl.load(keys, mask=known[None] & (ks < K)[:, None], other=0).to(DOT)
            scores = tl.dot(query, key, input_precision=PRECISION)
        else:
            scores = tl.zeros([ROWS, ROWS], tl.float32)
            for some in tl.range(0, PADDED_K, BLOCK_K, num_stages=STAGES):
                query = tl.load(queries + some, mask=inside[:, None] & (some + ks < K)[None], other=0).to(DOT)
                key = tl.load(keys + some, mask=known[None] & (some + ks < K)[:, None], other=0).to(DOT)
                scores = tl.dot(query, key, scores, input_precision=PRECISION)
        scores *= pair_weights(
            sums, sequence, extent, vision, row, decay, steps, columns, length, B, E, padded, TERMS, BOTH
        )
        if DENOMINATOR:
            divisor += tl.sum(scores, 1)
        value = tl.load(
            head_rows(x, row, group, sources, ps, x_row, x_token, x_head),
            mask=known[:, None] & (ps < P)[None],
            other=0,
        ).to(DOT)
        mixed = tl.dot(scores.to(DOT), value, mixed, input_precision=PRECISION)
    place = (row.to(tl.int64) * length + tokens) * H + head
    real = inside[:, None] & (ps < P)[None]
    if DENOMINATOR:
        mixed /= tl.maximum(divisor, floor)[:, None]
        tl.store(denominators + place, divisor, mask=inside)
    own = mixed
    if skip is not None:
        own = tl.load(head_rows(x, row, group, tokens, ps, x_row, x_token, x_head), mask=real, other=0)
    mixed = finished(mixed, own, skip, norm_weight, head, ps, norm_eps, P)
    tl.store(y + place[:, None] * P + ps[None], mixed.to(y.dtype.element_ty), mask=real)
