"""Attention over gather tables without a partition copy: rows are gathered, rotated and scattered by index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mixers.blocks import Blocks
from mixers.ops import triton_support
from mixers.ops.eager import custom_op
from mixers.ops.strides import rows
from mixers.ops.window_attention import launch
from mixers.ops.window_attention.backward import (
    key_backward_kernel,
    query_backward_kernel,
    window_backward_kernel,
)
from mixers.ops.window_attention.forward import forward_kernel

LOG2E = math.log2(math.e)
INFINITY = float("inf")


class Table(NamedTuple):
    """The tensors of one :class:`~mixers.blocks.Blocks`; ``first`` and ``stop`` have no element if not banded."""

    queries: Tensor
    keys: Tensor
    first: Tensor
    stop: Tensor

    @property
    def banded(self) -> bool:
        """Whether each query sees a span of the keys only."""
        return self.first.numel() > 0


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks | Sequence[Blocks],
    *,
    scale: float,
    key_valid: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    with_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Let each query of a block attend to the block's keys; see the reference."""
    tables = [blocks] if isinstance(blocks, Blocks) else list(blocks)
    if not tables or q.numel() == 0:
        nothing = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse = torch.full(q.shape[:3], -INFINITY, dtype=torch.float32, device=q.device)
        return (nothing, lse) if with_lse else nothing
    dtype = q.dtype
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    cos, sin = (None, None) if rotary is None else rotary
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    transposed = [b.transposed for b in tables if b.transposed is not None] if learns else []
    counts = [blocks.count or 0 for blocks in tables]
    largest = tables[counts.index(max(counts))]
    idle = largest.queries[:0, 0] if _fills(tables, q) else largest.idle
    covered = _fills(transposed[:1], k)
    cap = 0.0 if softcap is None else softcap * LOG2E
    y, lse = attention(
        q, k, v, _flat(tables), _flat(transposed), key_valid, cos, sin, idle, scale, cap, covered, with_lse
    )
    if not with_lse:
        return y.to(dtype)
    return y.to(dtype), torch.where(lse == INFINITY, -INFINITY, lse / LOG2E)


@custom_op("linmu::block_attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    transposed: Sequence[Tensor],
    key_valid: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    idle: Tensor | None,
    scale: float,
    cap: float,
    covered: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel on every table.

    Args:
        q: [B, N, H, P].
        k: [B, M, G, P].
        v: [B, M, G, P].
        tables: The four tensors of every :class:`Table`, one after the other.
        transposed: Those of the transposed tables; none where no gradient is needed.
        key_valid: bool [B, M].
        cos: [B or 1, N, R].
        sin: [B or 1, N, R].
        idle: int [U] flat indices of tokens, among them all that are no table's query. None: any may be.
        scale: Factor on query·key.
        cap: Bound of the scores in units of log 2; 0: unbounded.
        covered: Whether every key is looked at in the first table.
        with_lse: Whether the second result is asked for, and has a gradient.

    Returns:
        y [B, N, H, P], and log2 Σ exp of the scores, [B, N, H], where it is asked for or a backward kernel
        needs it; where it is asked for, infinite at tokens that are no query. Else it has no element.
    """
    y = _blank(q, idle)
    lse = _like_lse(q, transposed, with_lse)
    call = _Call(q, k, v, key_valid, cos, sin, cap, with_lse)
    for table in _tables(tables):
        (groups, query_slots), key_slots = table.queries.shape, table.keys.shape[1]
        cut = launch.forward(query_slots, key_slots, q.shape[3], q.dtype, call.shared)
        tiles = triton.cdiv(query_slots, cut.queries)
        with triton_support.on_device(q):
            forward_kernel[(groups * tiles * k.shape[2],)](
                call.q, call.k, call.v, y, lse, *table, *call.masks,
                *call.lengths, query_slots, key_slots, tiles, scale * LOG2E, cap, *call.strides,
                **call.options(cut), SINGLE=cut.single, BANDED=table.banded,
                KEEP_LSE=with_lse or (bool(transposed) and call.whole_window(table) is None),
            )  # fmt: skip
    return y, lse


@attention.register_fake
def _(q, k, v, tables, transposed, key_valid, cos, sin, idle, scale, cap, covered, with_lse):  # type: ignore[no-untyped-def]
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), _like_lse(q, transposed, with_lse)


@custom_op("linmu::block_attention_backward")
def attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    tables: Sequence[Tensor],
    transposed: Sequence[Tensor],
    key_valid: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    idle: Tensor | None,
    scale: float,
    cap: float,
    covered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, given those of y and of lse, if it has one; see :func:`attention`."""
    dq = _blank(q, idle)
    dk, dv = (
        (torch.empty if covered else torch.zeros)(t.shape, dtype=t.dtype, device=t.device) for t in (k, v)
    )
    dy = rows(dy)
    delta = torch.empty_like(lse)
    call = _Call(q, k, v, key_valid, cos, sin, cap, dlse is not None)
    joined = None if dlse is None else (dlse * LOG2E).contiguous()
    strides = (*dy.stride()[:3], *call.strides)
    for number, (table, back) in enumerate(zip(_tables(tables), _tables(transposed))):
        (groups, query_slots), key_slots = table.queries.shape, table.keys.shape[1]
        scales = (scale, scale * LOG2E, cap)
        cut = call.whole_window(table)
        with triton_support.on_device(q):
            if cut is not None:
                window_backward_kernel[(groups * k.shape[2] * 2,)](
                    dy, call.q, call.k, call.v, dq, dk, dv, table.queries, table.keys, *call.masks,
                    *call.lengths, query_slots, key_slots, *scales, *strides,
                    **call.options(cut), ADD=number > 0,
                )  # fmt: skip
                continue
            cut = launch.backward_by_tiles(query_slots, key_slots, q.shape[3], q.dtype, call.shared)
            tiles = triton.cdiv(query_slots, cut.queries)
            query_backward_kernel[(groups * tiles * q.shape[2],)](
                dy, call.q, call.k, call.v, y, lse, joined, dq, delta, *table, *call.masks,
                *call.lengths, query_slots, key_slots, tiles, *scales, *strides,
                **call.options(cut), BANDED=table.banded, JOINED=joined is not None,
            )  # fmt: skip
            groups, key_slots = back.queries.shape
            tiles = triton.cdiv(key_slots, cut.keys)
            key_backward_kernel[(groups * tiles * k.shape[2],)](
                dy, call.q, call.k, call.v, lse, delta, dk, dv, *back, *call.masks,
                *call.lengths, key_slots, back.keys.shape[1], tiles, *scales, *strides,
                **call.options(cut), BANDED=back.banded, ADD=number > 0,
            )  # fmt: skip
    return dq, dk, dv


@attention_backward.register_fake
def _(dy, q, k, v, y, lse, dlse, tables, transposed, key_valid, cos, sin, idle, scale, cap, covered):  # type: ignore[no-untyped-def]
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, tables, transposed, key_valid, cos, sin, idle, *ctx.rest, ctx.with_lse = inputs
    ctx.counts = len(tables), len(transposed)
    ctx.set_materialize_grads(ctx.with_lse)
    ctx.save_for_backward(q, k, v, *output, key_valid, cos, sin, idle, *tables, *transposed)


def _differentiate(ctx: Any, dy: Tensor, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, y, lse, key_valid, cos, sin, idle, *tables = ctx.saved_tensors
    forward, back = ctx.counts
    joined = dlse if ctx.with_lse else None
    dq, dk, dv = attention_backward(
        dy, q, k, v, y, lse, joined, tables[:forward], tables[forward:], key_valid, cos, sin, idle, *ctx.rest
    )
    return dq, dk, dv, [None] * forward, [None] * back, *[None] * 8


attention.register_autograd(_differentiate, setup_context=_setup)


class _Call:
    """What all kernels of a call are given alike."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_valid: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        cap: float,
        with_lse: bool,
    ) -> None:
        self.capped, self.with_lse = cap > 0, with_lse
        self.q, self.k, self.v = rows(q), rows(k), rows(v)
        self.shared = triton_support.shared_memory(q.device)
        turned, angles = (q.shape[3] + 1) // 2, (0, 0)
        if cos is not None and sin is not None:
            cos, sin, turned = cos.contiguous(), sin.contiguous(), cos.shape[2] // 2
            angles = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))
        self.turned = turned
        self.masks = (None if key_valid is None else key_valid.contiguous(), cos, sin)
        self.lengths = (q.shape[1], k.shape[1])
        self.strides = (*self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *angles)

    def options(self, cut: launch.Launch) -> dict[str, Any]:
        """Return the compile-time arguments that every kernel has."""
        heads, width = self.q.shape[2:]
        return {
            "G": self.k.shape[2],
            "GROUP": heads // self.k.shape[2],
            "P": width,
            "TURNED": self.turned,
            "BLOCK_Q": cut.queries,
            "BLOCK_K": cut.keys,
            "BLOCK_H": launch.tile((width + 1) // 2),
            "BLOCK_P": launch.tile(width),
            "ROTARY": self.masks[1] is not None,
            "MASKED": self.masks[0] is not None,
            "CAPPED": self.capped,
            "STAGES": cut.stages,
            "DOT": triton_support.dot_type(self.q.dtype),
            "PRECISION": "ieee",
            "num_warps": cut.warps,
        }

    def whole_window(self, table: Table) -> launch.Launch | None:
        """Return how to launch the backward kernel of whole windows, None where it does not fit the call."""
        if table.banded or self.with_lse:
            return None
        slots = table.queries.shape[1], table.keys.shape[1]
        return launch.backward_of_windows(*slots, self.q.shape[3], self.q.dtype, self.shared)


def _blank(like: Tensor, idle: Tensor | None) -> Tensor:
    """Return memory for rows like those of ``like``, zero at the idle ones, for kernels to write the others."""
    if idle is None:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    blank = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if len(idle):
        blank.flatten(0, 1).index_fill_(0, idle.long(), 0)
    return blank


def _like_lse(q: Tensor, transposed: Sequence[Tensor], with_lse: bool) -> Tensor:
    if with_lse:
        return torch.full(q.shape[:3], INFINITY, dtype=torch.float32, device=q.device)
    shape = q.shape[:3] if transposed else (0,)
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _flat(tables: Sequence[Blocks]) -> list[Tensor]:
    flat = []
    for blocks in tables:
        first, stop = (blocks.queries[:0] if t is None else t for t in (blocks.first, blocks.stop))
        flat += [blocks.queries, blocks.keys, first, stop]
    return flat


def _tables(flat: Sequence[Tensor]) -> list[Table]:
    return [Table(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


def _fills(tables: Sequence[Blocks], rows: Tensor) -> bool:
    """Is every row of ``rows`` [B, N, …] a query of the tables?"""
    counts = [blocks.count for blocks in tables]
    return None not in counts and sum(counts) == rows.shape[0] * rows.shape[1]  # type: ignore[arg-type]
