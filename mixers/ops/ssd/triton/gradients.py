"""The backward pass of a chunk: gradients of C, of the states, of B and X through the states, and of the rest."""

import triton
import triton.language as tl

from mixers.ops.ssd.triton.decays import at_steps, head_rows, running, tokens_at
from mixers.ops.ssd.triton.states import leaving
from mixers.ops.ssd.triton.weights import meets_state, pair_decays, pair_dts, pair_masks, pair_weights, reach


@triton.jit
def numerator_gradient(grad_y, denominators, place, inside, ps, floor, P, DENOMINATOR: tl.constexpr):
    """Return the gradient of y before the division, fp32 [Q, P], and what it was divided by, [Q]."""
    grad = tl.load(grad_y + place[:, None] * P + ps[None], mask=inside[:, None] & (ps < P)[None], other=0).to(
        tl.float32
    )
    inverse = tl.zeros_like(tl.sum(grad, 1)) + 1
    if DENOMINATOR:
        inverse = 1 / tl.maximum(tl.load(denominators + place, mask=inside, other=1), floor)
        grad *= inverse[:, None]
    return grad, inverse


@triton.jit(do_not_specialize=["length", "chunks", "B"])
def query_gradients(
    c,
    b,
    x,
    y,
    grad_y,
    denominators,
    grad_c,
    grad_ones,
    reached,
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
    """Gradient of C, [B, N, H, K]; of the denominators' sums, ``grad_ones`` [B, N, H]; and ``reached``
    [directions, B, E, steps]: each step's share of the gradient through the entering state."""
    R: tl.constexpr = H // E
    PADDED_K: tl.constexpr = TILES_K * BLOCK_K
    pid = tl.program_id(0)
    decay = pid % E
    group = decay // (E // G)
    chunk = pid // E % chunks
    row = pid // E // chunks
    steps = chunk * Q + tl.arange(0, Q)
    inside = steps < length
    tokens = tokens_at(order, row, steps, length)
    ks, ps = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_P)
    padded = chunks * Q
    value = tl.load(
        head_rows(x, row, group, tokens, ps, x_row, x_token, x_head),
        mask=inside[:, None] & (ps < P)[None],
        other=0,
    ).to(DOT)
    keys = head_rows(b, row, group, tokens, ks, b_row, b_token, b_head)
    queries = head_rows(c, row, decay * R, tokens, ks, c_row, c_token, c_head)
    weight = pair_weights(
        sums, sequence, extent, vision, row, decay, steps, steps, length, B, E, padded, TERMS, BOTH
    )
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
    through_left = tl.zeros([Q], tl.float32)
    through_right = tl.zeros([Q], tl.float32)

    for r in tl.range(R, num_stages=1):
        place = (row.to(tl.int64) * length + tokens) * H + decay * R + r
        grad, inverse = numerator_gradient(grad_y, denominators, place, inside, ps, floor, P, DENOMINATOR)
        grad = grad.to(DOT)  # rounded before all of its uses, whose sums cancel
        grad_one = tl.zeros([Q], tl.float32)
        if DENOMINATOR:
            out = tl.load(y + place[:, None] * P + ps[None], mask=inside[:, None] & (ps < P)[None], other=0)
            grad_one = -tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
            grad_one = tl.where(inverse * floor < 1, grad_one, 0.0)
            tl.store(grad_ones + place, grad_one, mask=inside)
        pulled = tl.dot(grad, tl.trans(value), input_precision=PRECISION) + grad_one[:, None]
        pulled = (pulled * weight).to(DOT)
        for some in tl.range(0, PADDED_K, BLOCK_K, num_stages=STAGES):
            known = inside[:, None] & (some + ks < K)[None]
            state = tl.load(state_tile + some * BLOCK_P).to(DOT)
            found = tl.dot(grad, tl.trans(state), input_precision=PRECISION)
            if DENOMINATOR:
                found += grad_one[:, None] * tl.load(ones_tile + some)[None]
            found *= left[:, None]
            query = tl.load(queries + r * c_head + some, mask=known, other=0).to(tl.float32)
            through_left += tl.sum(found * query, 1)
            if BOTH:
                state = tl.load(state_tile + other * size + some * BLOCK_P).to(DOT)
                back = tl.dot(grad, tl.trans(state), input_precision=PRECISION)
                if DENOMINATOR:
                    back += grad_one[:, None] * tl.load(ones_tile + other * PADDED_K + some)[None]
                back *= right[:, None]
                through_right += tl.sum(back * query, 1)
                found += back
            key = tl.load(keys + some, mask=known, other=0).to(DOT)
            found = tl.dot(pulled, key, found, input_precision=PRECISION)
            tl.store(
                grad_c + place[:, None] * K + some + ks[None], found.to(grad_c.dtype.element_ty), mask=known
            )
    share = reached + tl.cast(row * E + decay, tl.int64) * padded + steps
    tl.store(share, through_left)
    if BOTH:
        tl.store(share + tl.cast(B * E, tl.int64) * padded, through_right)


@triton.jit(do_not_specialize=["length", "chunks", "B"])
def state_gradients(
    c,
    grad_y,
    denominators,
    grad_ones,
    added,
    added_ones,
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
    floor,
    H: tl.constexpr,
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
    """What the queries of a chunk add to the gradient of the states that enter it, Σ_i reach_i c_i ỹ_iᵀ.

    Laid out as :func:`chunk_states` lays out what chunks add to the states.
    """
    R: tl.constexpr = H // E
    pid = tl.program_id(0)
    tile_k = pid % TILES_K
    pid = pid // TILES_K
    decay = pid % E
    chunk = pid // E % chunks
    row = pid // E // chunks
    steps = chunk * Q + tl.arange(0, Q)
    inside = steps < length
    tokens = tokens_at(order, row, steps, length)
    ks, ps = tile_k * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_P)
    padded = chunks * Q
    queries = head_rows(c, row, decay * R, tokens, ks, c_row, c_token, c_head)
    meets = meets_state(sequence, extent, vision, 0, row, steps, chunk, Q, length)
    left = reach(sums, ends, 0, row, decay, steps, chunk, meets, B, E, chunks, padded, TERMS)
    forward = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    forward_ones = tl.zeros([BLOCK_K], tl.float32)
    if BOTH:
        meets = meets_state(sequence, extent, vision, 1, row, steps, chunk, Q, length)
        right = reach(sums, ends, 1, row, decay, steps, chunk, meets, B, E, chunks, padded, TERMS)
        back = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
        back_ones = tl.zeros([BLOCK_K], tl.float32)
    for r in tl.range(R, num_stages=STAGES):
        place = (row.to(tl.int64) * length + tokens) * H + decay * R + r
        grad, _ = numerator_gradient(grad_y, denominators, place, inside, ps, floor, P, DENOMINATOR)
        query = tl.load(queries + r * c_head, mask=inside[:, None] & (ks < K)[None], other=0).to(DOT)
        forward = tl.dot(tl.trans(query), (grad * left[:, None]).to(DOT), forward, input_precision=PRECISION)
        if BOTH:
            back = tl.dot(tl.trans(query), (grad * right[:, None]).to(DOT), back, input_precision=PRECISION)
        if DENOMINATOR:
            grad_one = tl.load(grad_ones + place, mask=inside, other=0)
            forward_ones += tl.sum(query.to(tl.float32) * (grad_one * left)[:, None], 0)
            if BOTH:
                back_ones += tl.sum(query.to(tl.float32) * (grad_one * right)[:, None], 0)
    at = tl.cast((row * E + decay) * chunks + chunk, tl.int64)
    other = tl.cast(B * E * chunks, tl.int64)
    size: tl.constexpr = TILES_K * BLOCK_K * BLOCK_P
    tile = ks[:, None] * BLOCK_P + ps[None]
    tl.store(added + at * size + tile, forward.to(added.dtype.element_ty))
    if BOTH:
        tl.store(added + (at + other) * size + tile, back.to(added.dtype.element_ty))
    if DENOMINATOR:
        tl.store(added_ones + at * (TILES_K * BLOCK_K) + ks, forward_ones)
        if BOTH:
            tl.store(added_ones + (at + other) * (TILES_K * BLOCK_K) + ks, back_ones)


@triton.jit(do_not_specialize=["length", "chunks", "B"])
def input_gradients_through_states(
    b,
    x,
    grad_b,
    grad_x,
    grad_dt,
    held,
    states,
    ones,
    grad_states,
    grad_ones,
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
    BOTH: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    TERMS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of B, X and dt through the state that leaves a chunk, and ``held``: that of a decay of the
    whole chunk through the state that passes it. grad_b [B, N, E, K] and grad_x [B, N, E, P] by token,
    grad_dt [directions, B, E, steps] and held [directions, B, E, chunks]."""
    PADDED_K: tl.constexpr = TILES_K * BLOCK_K
    pid = tl.program_id(0)
    head = pid % E
    group = head // (E // G)
    chunk = pid // E % chunks
    row = pid // E // chunks
    steps = chunk * Q + tl.arange(0, Q)
    inside = steps < length
    tokens = tokens_at(order, row, steps, length)
    ks, ps = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_P)
    padded = chunks * Q
    size: tl.constexpr = PADDED_K * BLOCK_P
    keys = head_rows(b, row, group, tokens, ks, b_row, b_token, b_head)
    value = tl.load(
        head_rows(x, row, group, tokens, ps, x_row, x_token, x_head),
        mask=inside[:, None] & (ps < P)[None],
        other=0,
    ).to(DOT)
    place = (row.to(tl.int64) * length + tokens) * E + head
    found_x = tl.zeros([Q, BLOCK_P], tl.float32)
    left, dt = leaving(
        sums, ends, 0, row, head, steps, chunk, sequence, Q, length, B, E, chunks, padded, TERMS
    )
    by_dt = tl.zeros([Q], tl.float32)
    passing = 0.0
    at = tl.cast((row * E + head) * chunks + chunk, tl.int64)
    other = tl.cast(B * E * chunks, tl.int64)
    if BOTH:
        back_left, back_dt = leaving(
            sums, ends, 1, row, head, steps, chunk, extent, Q, length, B, E, chunks, padded, TERMS
        )
        by_back_dt = tl.zeros([Q], tl.float32)
        back_passing = 0.0
    for t in tl.static_range(TILES_K):
        some = t * BLOCK_K
        known = inside[:, None] & (some + ks < K)[None]
        key = tl.load(keys + some, mask=known, other=0).to(DOT)
        total_b = tl.zeros([Q, BLOCK_K], tl.float32)
        for direction in tl.static_range(2 if BOTH else 1):
            here = at + direction * other
            tile = here * size + some * BLOCK_P + ks[:, None] * BLOCK_P + ps[None]
            grad = tl.load(grad_states + tile)
            passes = tl.sum(tl.load(states + tile).to(tl.float32) * grad.to(tl.float32))
            grad = grad.to(DOT)
            found_b = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
            if DENOMINATOR:
                grad_one = tl.load(grad_ones + here * PADDED_K + some + ks)
                passes += tl.sum(tl.load(ones + here * PADDED_K + some + ks) * grad_one)
                found_b += grad_one[None]
            more = tl.sum(found_b * key.to(tl.float32), 1)
            more_x = tl.dot(key, grad, input_precision=PRECISION)
            if direction == 0:
                by_dt += more * left
                passing += passes
                total_b += found_b * (left * dt)[:, None]
                found_x += more_x * (left * dt)[:, None]
            else:
                by_back_dt += more * back_left
                back_passing += passes
                total_b += found_b * (back_left * back_dt)[:, None]
                found_x += more_x * (back_left * back_dt)[:, None]
        tl.store(
            grad_b + place[:, None] * K + some + ks[None], total_b.to(grad_b.dtype.element_ty), mask=known
        )
    tl.store(
        grad_x + place[:, None] * P + ps[None],
        found_x.to(grad_x.dtype.element_ty),
        mask=inside[:, None] & (ps < P)[None],
    )
    by_step = tl.cast(row * E + head, tl.int64) * padded + steps
    tl.store(grad_dt + by_step, by_dt)
    tl.store(held + at, passing * tl.load(keeps + at))
    if BOTH:
        tl.store(grad_dt + tl.cast(B * E, tl.int64) * padded + by_step, by_back_dt)
        tl.store(held + other + at, back_passing * tl.load(keeps + other + at))


@triton.jit(do_not_specialize=["length", "chunks", "B"])
def input_gradients(
    c,
    b,
    x,
    grad_y,
    denominators,
    grad_ones,
    grad_b,
    grad_x,
    grad_log,
    grad_dt,
    grad_back_log,
    grad_back_dt,
    reached,
    left_dt,
    held,
    sums,
    order,
    valid,
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
    """Add to the gradients of B and X those within a chunk, and finish those of the decays, [B, N, E] by token.

    Matrices are [j, i]: a row a key, a column a query. Where K takes several tiles, what is pulled is made again for
    each, since the gradient of B is not held whole.
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
    ks, ps = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_P)
    padded = chunks * Q
    known = inside[:, None] & (ks < K)[None]
    real = inside[:, None] & (ps < P)[None]
    keys = head_rows(b, row, group, tokens, ks, b_row, b_token, b_head)
    value = tl.load(
        head_rows(x, row, group, tokens, ps, x_row, x_token, x_head),
        mask=real,
        other=0,
    ).to(DOT)
    queries = head_rows(c, row, decay * R, tokens, ks, c_row, c_token, c_head)
    same_sequence, same_clip = pair_masks(sequence, extent, vision, row, steps, steps, length, BOTH)
    decays = tl.trans(
        pair_decays(sums, row, decay, steps, steps, same_sequence, same_clip, B, E, padded, TERMS, BOTH)
    )
    dts = pair_dts(sums, row, decay, steps, steps, B, E, padded, TERMS, BOTH)
    weight = decays * tl.trans(dts)
    place = (row.to(tl.int64) * length + tokens) * E + decay
    into_b = grad_b + place[:, None] * K + ks[None]
    if TILES_K == 1:
        key = tl.load(keys, mask=known, other=0).to(DOT)
        found_b = tl.load(into_b, mask=known, other=0).to(tl.float32)
    found_x = tl.load(grad_x + place[:, None] * P + ps[None], mask=real, other=0).to(tl.float32)
    products = tl.zeros([Q, Q], tl.float32)
    for r in tl.range(R, num_stages=STAGES if TILES_K == 1 else 1):
        at = (row.to(tl.int64) * length + tokens) * H + decay * R + r
        grad, _ = numerator_gradient(grad_y, denominators, at, inside, ps, floor, P, DENOMINATOR)
        grad = grad.to(DOT)
        pulled = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        if DENOMINATOR:
            pulled += tl.load(grad_ones + at, mask=inside, other=0)[None]
        if TILES_K == 1:
            query = tl.load(queries + r * c_head, mask=known, other=0).to(DOT)
            scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
            found_b = tl.dot((pulled * weight).to(DOT), query, found_b, input_precision=PRECISION)
        else:
            scores = tl.zeros([Q, Q], tl.float32)
            for some in tl.range(0, TILES_K * BLOCK_K, BLOCK_K, num_stages=STAGES):
                known = inside[:, None] & (some + ks < K)[None]
                key = tl.load(keys + some, mask=known, other=0).to(DOT)
                query = tl.load(queries + r * c_head + some, mask=known, other=0).to(DOT)
                scores = tl.dot(key, tl.trans(query), scores, input_precision=PRECISION)
        products += scores * pulled
        found_x = tl.dot((scores * weight).to(DOT), grad, found_x, input_precision=PRECISION)
    if TILES_K == 1:
        tl.store(into_b, found_b.to(grad_b.dtype.element_ty), mask=known)
    else:
        for some in tl.range(0, TILES_K * BLOCK_K, BLOCK_K, num_stages=1):
            known = inside[:, None] & (some + ks < K)[None]
            found_b = tl.load(into_b + some, mask=known, other=0).to(tl.float32)
            for r in tl.range(R, num_stages=STAGES):
                at = (row.to(tl.int64) * length + tokens) * H + decay * R + r
                grad, _ = numerator_gradient(grad_y, denominators, at, inside, ps, floor, P, DENOMINATOR)
                pulled = tl.dot(value, tl.trans(grad.to(DOT)), input_precision=PRECISION)
                if DENOMINATOR:
                    pulled += tl.load(grad_ones + at, mask=inside, other=0)[None]
                query = tl.load(queries + r * c_head + some, mask=known, other=0).to(DOT)
                found_b = tl.dot((pulled * weight).to(DOT), query, found_b, input_precision=PRECISION)
            tl.store(into_b + some, found_b.to(grad_b.dtype.element_ty), mask=known)
    tl.store(grad_x + place[:, None] * P + ps[None], found_x.to(grad_x.dtype.element_ty), mask=real)

    products *= decays
    by_step = tl.cast(row * E + decay, tl.int64) * padded + steps
    past = steps[:, None] <= steps[None]
    for direction in tl.static_range(2 if BOTH else 1):
        beyond = by_step + tl.cast(direction * B * E, tl.int64) * padded
        dt = running(sums, direction, 1, row, decay, steps, B, E, padded, TERMS)
        through = tl.where(past if direction == 0 else past == 0, products, 0.0)
        by_state = tl.load(left_dt + beyond)
        by_dt = tl.sum(through, 1) + by_state
        seen = tl.sum(through * dt[:, None], 0) + tl.load(reached + beyond)
        # A decay acts on every pair of a query at or after it and a key before it.
        rest = tl.expand_dims(seen - by_dt * dt, 1)
        if direction == 0:
            table = at_steps(sequence, row, steps, length, 0)
            edge = at_steps(sequence, row, chunk * Q + Q - 1, length, 0)
            acts = steps[:, None] >= steps[None]
        else:
            table = at_steps(extent, row, steps, length, -1)
            edge = at_steps(extent, row, chunk * Q, length, -1)
            acts = steps[:, None] <= steps[None]
        by_log = tl.sum(tl.where(acts & (table[:, None] == table[None]), rest, 0.0), 0)
        passing = tl.load(held + tl.cast((direction * B + row) * E + decay, tl.int64) * chunks + chunk)
        passing += tl.sum(tl.where(table == edge, by_state * dt, 0.0))
        by_log += tl.where(table == edge, passing, 0.0)
        active = inside
        if direction == 0:
            if valid is not None:
                active = inside & (at_steps(valid, row, steps, length, 1) != 0)
            tl.store(grad_log + place, tl.where(active, by_log, 0.0), mask=inside)
            tl.store(grad_dt + place, tl.where(active, by_dt, 0.0), mask=inside)
        else:
            active = inside & (at_steps(vision, row, steps, length, 0) != 0)
            tl.store(grad_back_log + place, tl.where(active, by_log, 0.0), mask=inside)
            tl.store(grad_back_dt + place, tl.where(active, by_dt, 0.0), mask=inside)
