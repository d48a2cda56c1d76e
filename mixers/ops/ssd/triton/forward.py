"""The forward pass on the host: decays summed, states carried, chunks mixed."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mixers.ops import triton_support
from mixers.ops.ssd.chunks import DENOMINATOR_FLOOR
from mixers.ops.ssd.triton.decays import sum_decays
from mixers.ops.ssd.triton.launch import (
    NARROWEST,
    Cut,
    ForwardCut,
    chunks_of_segment,
    dots,
    first_fitting,
    forward_cuts,
    state_tile,
)
from mixers.ops.ssd.triton.outputs import mix_chunks, mix_rows
from mixers.ops.ssd.triton.states import carry_states, segment_states
from mixers.ops.strides import rows

LANES, STAGES = 256, 16


@dataclass(frozen=True)
class Tables:
    """What the steps are, each [B, N] in reading order or None; see :class:`~mixers.layout.Scan`."""

    order: Tensor | None
    valid: Tensor | None
    sequence: Tensor | None
    vision: Tensor | None
    extent: Tensor | None


@dataclass(frozen=True)
class Inputs:
    """What is scanned: c [B, N, H, K], b [B, N, G, K], x [B, N, G, P], decays each [B, N, E], and the tables.

    ``decays`` is (log_a, dt), followed by the backward (log_a, dt) where vision is scanned both ways.
    """

    c: Tensor
    b: Tensor
    x: Tensor
    decays: tuple[Tensor, ...]
    tables: Tables
    denominator: bool

    def __post_init__(self) -> None:
        for name in ("c", "b", "x"):
            object.__setattr__(self, name, rows(getattr(self, name)))

    @property
    def both(self) -> bool:
        """Whether there is a backward direction."""
        return len(self.decays) == 4

    @property
    def directions(self) -> int:
        """1 or 2."""
        return 1 + self.both

    @property
    def heads(self) -> int:
        """Decays and states E."""
        return self.decays[0].shape[2]

    @property
    def kind(self) -> Hashable:
        """What decides how kernels of these inputs are compiled, with how they are cut."""
        given = tuple(value is not None for value in vars(self.tables).values())
        sizes = (*self.c.shape[2:], *self.x.shape[2:], self.heads)
        return self.x.device, self.x.dtype, sizes, self.both, self.denominator, given

    @property
    def terms(self) -> int:
        """Numbers kept of a running decay: sum and dt, and in fp32 what the sum lost."""
        return 3 if self.x.dtype == torch.float32 else 2


@dataclass(frozen=True)
class Finish:
    """What is done to y before it is stored; see :func:`mixers.ops.finish`. Nothing by default."""

    skip: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_eps: float = 0.0


@dataclass(frozen=True)
class Sums:
    """Running decays of the chunks of one cut; see :func:`sum_decays`."""

    values: Tensor
    ends: Tensor
    chunks: int


def sum_all_decays(inputs: Inputs, chunk: int) -> Sums:
    """Sum the decays over chunks of a size."""
    batch, length = inputs.c.shape[:2]
    chunks, e, d = triton.cdiv(length, chunk), inputs.heads, inputs.directions
    new = inputs.decays[0].new_empty
    values = new((d, inputs.terms, batch, e, chunks * chunk), dtype=torch.float32)
    ends = new((d, batch, e, chunks, 2), dtype=torch.float32)
    log_a, dt, back_log_a, back_dt = (*inputs.decays, *inputs.decays)[:4]
    tables = inputs.tables
    sum_decays[(chunks, batch)](
        log_a,
        dt,
        back_log_a,
        back_dt,
        values,
        ends,
        tables.order,
        tables.valid,
        tables.vision,
        length,
        chunks,
        batch,
        *log_a.stride(),
        *dt.stride(),
        *back_log_a.stride(),
        *back_dt.stride(),
        E=e,
        BLOCK_E=triton.next_power_of_2(e),
        Q=chunk,
        TERMS=inputs.terms,
        BOTH=inputs.both,
    )
    return Sums(values, ends, chunks)


@dataclass(frozen=True)
class States:
    """States that enter the chunks: ``values`` [directions, B, E, chunks, K', P'], ``ones`` [.., K'] or empty,
    ``keeps`` [directions, B, E, chunks] of each chunk, and the forward state after the last chunk."""

    values: Tensor
    ones: Tensor
    keeps: Tensor
    last: Tensor


def carry(
    added: Tensor,
    added_ones: Tensor,
    keeps: Tensor,
    first: Tensor | None,
    width: int,
    columns: int,
    denominator: bool,
    flip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry what chunks add from one to the next; return (entering, entering ones, last state)."""
    d, batch, e, chunks, k, p = added.shape
    last = keeps.new_empty(batch, e, width, columns + denominator)
    entering, ones = torch.empty_like(added), torch.empty_like(added_ones)
    for source, target, tile_p, values, column in (
        (added, entering, p, columns, 0),
        (added_ones, ones, 1, 1, columns),
    ):
        if source.numel():
            lanes = min(LANES, k * tile_p)
            carry_states[(d * batch * e * (k * tile_p // lanes),)](
                source,
                target,
                keeps,
                first,
                last,
                chunks,
                batch,
                E=e,
                K=width,
                P=values,
                PADDED_K=k,
                PADDED_P=tile_p,
                FIRST_COLUMN=column,
                COLUMNS=columns + denominator,
                FLIP=flip,
                LANES=lanes,
                STAGES=STAGES,
                num_warps=1,
            )
    return entering, ones, last


def entering_states(inputs: Inputs, sums: Sums, cut: Cut, first: Tensor | None) -> States:
    """Sum the states of segments of chunks, carry them, and return the state that enters each chunk."""
    b, x, tables = inputs.b, inputs.x, inputs.tables
    batch, length, groups, width = b.shape
    d, e, values, chunks = inputs.directions, inputs.heads, x.shape[-1], sums.chunks
    k, p = cut.k, cut.p
    block_k, block_p, warps = state_tile(k, p, x.dtype)
    tiles = (k // block_k) * (p // block_p)
    at_once = chunks_of_segment(batch * e * tiles, chunks)
    segments = triton.cdiv(chunks, at_once)

    def run(
        states: Tensor, ones: Tensor, keeps: Tensor, firsts: Tensor, first_ones: Tensor, entering: bool
    ) -> None:
        segment_states[(batch * segments * e * tiles,)](
            b,
            x,
            states,
            ones,
            keeps,
            firsts,
            first_ones,
            sums.values,
            sums.ends,
            tables.order,
            tables.sequence,
            tables.extent,
            length,
            chunks,
            batch,
            at_once,
            *b.stride()[:3],
            *x.stride()[:3],
            G=groups,
            E=e,
            K=width,
            P=values,
            Q=cut.chunk,
            BLOCK_K=block_k,
            BLOCK_P=block_p,
            TILES_K=k // block_k,
            TILES_P=p // block_p,
            BOTH=inputs.both,
            DENOMINATOR=inputs.denominator,
            ENTERING=entering,
            TERMS=inputs.terms,
            STAGES=3,
            num_warps=warps,
            **dots(x),
        )

    def room(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        shape, wide = (d, batch, e, count), torch.float32
        ones = x.new_empty((*shape, k) if inputs.denominator else 0, dtype=wide)
        return x.new_empty((*shape, k, p), dtype=dtype), ones, x.new_empty(shape, dtype=wide)

    added, added_ones, kept = room(segments, torch.float32)
    run(added, added_ones, kept, added, added_ones, False)
    firsts, first_ones, last = carry(
        added, added_ones, kept, first, width, values, inputs.denominator, flip=False
    )
    states, ones, keeps = room(chunks, x.dtype)
    run(states, ones, keeps, firsts, first_ones, True)
    return States(states, ones, keeps, last)


def scan_forward(
    inputs: Inputs, first: Tensor | None, finish: Finish | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [B, N, H, P], the last state [B, E, K, P (+1)] in fp32, and the denominators [B, N, H] or empty."""
    (heads, width), values, x = inputs.c.shape[2:], inputs.x.shape[-1], inputs.x
    finish = finish or Finish()
    with triton_support.on_device(x):
        return first_fitting(
            forward_cuts(width, values, heads // inputs.heads, inputs.both, x.dtype, x.device),
            (inputs.kind, finish.skip is None, finish.norm_weight is None),
            lambda cut: _scan_forward(inputs, first, finish, cut),
        )


def _scan_forward(
    inputs: Inputs, first: Tensor | None, finish: Finish, cut: ForwardCut
) -> tuple[Tensor, Tensor, Tensor]:
    c, b, x, tables = inputs.c, inputs.b, inputs.x, inputs.tables
    batch, length, heads, width = c.shape
    groups, values = x.shape[2:]
    sums = sum_all_decays(inputs, cut.chunk)
    states = entering_states(inputs, sums, cut, first)
    y = x.new_empty(batch, length, heads, values)
    denominators = x.new_empty((batch, length, heads) if inputs.denominator else 0, dtype=torch.float32)
    mix, programs, tiles = mix_chunks, sums.chunks * inputs.heads, {"PADDED_K": cut.k}
    if cut.rows:
        mix, programs = mix_rows, sums.chunks * heads * (cut.chunk // cut.rows)
        block = cut.mix.block
        tiles = {
            "ROWS": cut.rows,
            "BLOCK_K": block,
            "TILES_K": cut.k // block,
            "BLOCK_S": min(block, NARROWEST),
        }
    mix[(batch * programs,)](
        c,
        b,
        x,
        y,
        denominators,
        None if finish.skip is None else finish.skip.contiguous(),
        None if finish.norm_weight is None else finish.norm_weight.contiguous(),
        states.values,
        states.ones,
        sums.values,
        sums.ends,
        tables.order,
        tables.sequence,
        tables.extent,
        tables.vision,
        length,
        sums.chunks,
        batch,
        *c.stride()[:3],
        *b.stride()[:3],
        *x.stride()[:3],
        DENOMINATOR_FLOOR,
        finish.norm_eps,
        H=heads,
        G=groups,
        E=inputs.heads,
        K=width,
        P=values,
        Q=cut.chunk,
        BLOCK_P=cut.p,
        BOTH=inputs.both,
        DENOMINATOR=inputs.denominator,
        TERMS=inputs.terms,
        STAGES=cut.mix.stages,
        num_warps=cut.mix.warps,
        **tiles,
        **dots(x),
    )
    return y, states.last, denominators
