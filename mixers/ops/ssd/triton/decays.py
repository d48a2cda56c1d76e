"""Running sums of the decays inside each chunk, in reading order, which all other kernels read."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def tokens_at(order, row, steps, length):
    """Return the token that a row reads at each step, in int64; a step past the end reads nothing."""
    tokens = steps.to(tl.int64)
    if order is not None:
        tokens = tl.load(order + row.to(tl.int64) * length + steps, mask=steps < length, other=0).to(tl.int64)
    return tokens


@triton.jit
def head_rows(t, row, head, tokens, columns, row_stride, token_stride, head_stride):
    """Return where some columns of a head stand at tokens, [tokens, columns]."""
    return (
        t
        + row.to(tl.int64) * row_stride
        + head * head_stride
        + tokens[:, None] * token_stride
        + columns[None]
    )


@triton.jit
def at_steps(table, row, steps, length, FILL: tl.constexpr):
    """Return a table's values at steps; past the end it goes on with its last value, so that states pass."""
    if table is None:
        values = steps * 0 + FILL
    else:
        values = tl.load(table + row.to(tl.int64) * length + tl.minimum(steps, length - 1)).to(tl.int32)
    return values


@triton.jit
def running(sums, direction, term, row, head, steps, B, E, padded, TERMS: tl.constexpr):
    """Return a term (0: the sum, 1: dt, 2: what fp32 lost of the sum) of a head's decays at steps."""
    at = ((direction * TERMS + term) * B + row) * E + head
    return tl.load(sums + tl.cast(at, tl.int64) * padded + steps)


@triton.jit
def chunk_end(ends, direction, row, head, chunk, B, E, chunks, EXACT: tl.constexpr):
    """Return (sum, what fp32 lost of it) of a whole chunk."""
    at = ((direction * B + row) * E + head) * chunks + chunk
    high = tl.load(ends + at * 2)
    low = 0.0
    if EXACT:
        low = tl.load(ends + at * 2 + 1)
    return high, low


@triton.jit
def from_start(sums, direction, row, head, steps, B, E, padded, TERMS: tl.constexpr):
    """Return the log2 decay from the start of a chunk to each of its steps, [Q]."""
    gap = running(sums, direction, 0, row, head, steps, B, E, padded, TERMS)
    if TERMS == 3:
        gap += running(sums, direction, 2, row, head, steps, B, E, padded, TERMS)
    return gap


@triton.jit
def to_end(sums, ends, direction, row, head, steps, chunk, B, E, chunks, padded, TERMS: tl.constexpr):
    """Return the log2 decay from each step of a chunk to its end, [Q]."""
    end, low = chunk_end(ends, direction, row, head, chunk, B, E, chunks, TERMS == 3)
    gap = end - running(sums, direction, 0, row, head, steps, B, E, padded, TERMS)
    if TERMS == 3:
        gap += low - running(sums, direction, 2, row, head, steps, B, E, padded, TERMS)
    return gap


@triton.jit(do_not_specialize=["length", "chunks", "B"])
def sum_decays(
    log_a,
    dt,
    back_log_a,
    back_dt,
    sums,
    ends,
    order,
    valid,
    vision,
    length,
    chunks,
    B,
    log_row,
    log_token,
    log_head,
    dt_row,
    dt_token,
    dt_head,
    back_log_row,
    back_log_token,
    back_log_head,
    back_dt_row,
    back_dt_token,
    back_dt_head,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    Q: tl.constexpr,
    TERMS: tl.constexpr,
    BOTH: tl.constexpr,
):
    """Sum log2 decays over each chunk: forward including a step, backward up to it. Identity steps add 0.

    Sums are taken in fp64 and kept in fp32; with TERMS = 3 what fp32 lost is kept too.
    """
    chunk, row = tl.program_id(0), tl.program_id(1)
    steps = chunk * Q + tl.arange(0, Q)
    heads = tl.arange(0, BLOCK_E)
    inside = steps < length
    tokens = tokens_at(order, row, steps, length)
    padded = chunks * Q
    for direction in tl.static_range(2 if BOTH else 1):
        active = inside
        if direction == 0:
            if valid is not None:
                active = inside & (at_steps(valid, row, steps, length, 1) != 0)
            logs = log_a + row.to(tl.int64) * log_row + tokens[:, None] * log_token + heads[None] * log_head
            dts = dt + row.to(tl.int64) * dt_row + tokens[:, None] * dt_token + heads[None] * dt_head
        else:
            active = inside & (at_steps(vision, row, steps, length, 0) != 0)
            logs = (
                back_log_a
                + row.to(tl.int64) * back_log_row
                + tokens[:, None] * back_log_token
                + heads[None] * back_log_head
            )
            dts = (
                back_dt
                + row.to(tl.int64) * back_dt_row
                + tokens[:, None] * back_dt_token
                + heads[None] * back_dt_head
            )
        mask = active[:, None] & (heads < E)[None]
        log = tl.load(logs, mask=mask, other=0).to(tl.float64) * LOG2_E
        step = tl.load(dts, mask=mask, other=0).to(tl.float32)
        total = tl.cumsum(log, 0)
        end = tl.sum(log, 0)
        if direction == 1:
            total -= log
        high = total.to(tl.float32)
        place = ((direction * TERMS * B + row) * E + heads)[None].to(tl.int64) * padded + steps[:, None]
        term = B.to(tl.int64) * E * padded
        kept = (heads < E)[None]
        tl.store(sums + place, high, mask=kept)
        tl.store(sums + place + term, step, mask=kept)
        if TERMS == 3:
            tl.store(sums + place + 2 * term, (total - high.to(tl.float64)).to(tl.float32), mask=kept)
        end_high = end.to(tl.float32)
        at = ((direction * B + row) * E + heads) * chunks + chunk
        tl.store(ends + at * 2, end_high, mask=heads < E)
        tl.store(ends + at * 2 + 1, (end - end_high.to(tl.float64)).to(tl.float32), mask=heads < E)
