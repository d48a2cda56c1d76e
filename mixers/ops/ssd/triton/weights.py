"""What the steps of a chunk, and the states that enter it, weigh at each step: decays and step sizes."""

import triton
import triton.language as tl

from mixers.ops.ssd.triton.decays import at_steps, from_start, running, to_end


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
    if direction == 0:
        gap = from_start(sums, 0, row, head, steps, B, E, padded, TERMS)
    else:
        gap = to_end(sums, ends, 1, row, head, steps, chunk, B, E, chunks, padded, TERMS)
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
def pair_weights(
    sums,
    sequence,
    extent,
    vision,
    row,
    head,
    rows,
    columns,
    length,
    B,
    E,
    padded,
    TERMS: tl.constexpr,
    BOTH: tl.constexpr,
):
    """Return by what the score of each row and column is multiplied, fp32 [I, J]; 0 where it is not seen."""
    same_sequence, same_clip = pair_masks(sequence, extent, vision, row, rows, columns, length, BOTH)
    decays = pair_decays(sums, row, head, rows, columns, same_sequence, same_clip, B, E, padded, TERMS, BOTH)
    return decays * pair_dts(sums, row, head, rows, columns, B, E, padded, TERMS, BOTH)


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
