"""Others' scans: in two passes where both directions are wanted, and their one-token step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixers.ops import ssd, ssd_step
from recipes.bench.cases import Inputs, Problem
from recipes.bench.peers.peer import Peer, expanded, needs

Scan = Callable[..., Tensor]


def both_ways(
    scan: Scan, span: tuple[int, int], forward: tuple[Any, ...], backward: tuple[Any, ...]
) -> Tensor:
    """Scan all tokens, scan those of ``span`` flipped, add.

    Args:
        scan: One direction of :func:`mamba_arguments` or :func:`gla_arguments`.
        span: First token of the clip, and the one after its last.
        forward: Arguments of the scan; those with a token dimension have it second.
        backward: The same of the other direction.
    """
    y = scan(*forward)
    start, stop = span
    flipped = (t[:, start:stop].flip(1) if t.ndim > 1 else t for t in backward)
    back = scan(*flipped).flip(1)
    if (start, stop) == (0, y.shape[1]):
        return y + back
    return torch.cat([y[:, :start], y[:, start:stop] + back, y[:, stop:]], dim=1)


def mamba_arguments(inputs: Inputs, problem: Problem, groups: int | None = None) -> tuple[Any, ...]:
    """Return (span, forward, backward): c, b, x, dt, A of each direction, a head each; backward () if none.

    ``groups``: let so many groups of heads share c and b, as the kernel likes best; the heads' own c is lost.
    """
    c, b, x, *decays = inputs.args
    heads = c.shape[2]
    if groups is None:
        b = expanded(b, heads)
    else:
        c = c[:, :, :: heads // groups].contiguous()
    x = expanded(x, heads)
    directions = []
    for pair in decays:
        if pair is not None:
            log_a, dt = (expanded(t, heads, 2) for t in pair)
            directions.append((c, b, x, dt, (log_a[0, 0] / dt[0, 0]).contiguous()))
    return (_span(problem), *directions)


def gla_arguments(inputs: Inputs, problem: Problem) -> tuple[Any, ...]:
    """Return (span, forward, backward): c, b, dt·x, log a of each direction, a head each."""
    c, b, x, *decays = inputs.args
    heads = c.shape[2]
    b, x = expanded(b, heads), expanded(x, heads)
    directions = []
    for pair in decays:
        if pair is not None:
            log_a, dt = (expanded(t, heads, 2) for t in pair)
            directions.append((c, b, (dt[..., None] * x).to(x.dtype), log_a))
    return (_span(problem), *directions)


def _span(problem: Problem) -> tuple[int, int]:
    vision = problem.layout.vision
    if vision is None:
        return 0, problem.layout.length
    at = vision[0].nonzero().flatten()
    return int(at[0]), int(at[-1]) + 1


def _directions(scan: Scan) -> Callable[..., Tensor]:
    def run(
        span: tuple[int, int], forward: tuple[Any, ...], backward: tuple[Any, ...] | None = None
    ) -> Tensor:
        return scan(*forward) if backward is None else both_ways(scan, span, forward, backward)

    return run


def _mamba(c: Tensor, b: Tensor, x: Tensor, dt: Tensor, a: Tensor) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(x, dt, a, b, c, chunk_size=256)


def _mamba_right(c: Tensor, b: Tensor, x: Tensor, dt: Tensor, a: Tensor) -> Tensor:
    c, b = (expanded(t, x.shape[2]) for t in (c, b))
    return ssd(c, b, x, (dt * a, dt), backend="reference")[0]


def _gla(c: Tensor, b: Tensor, v: Tensor, g: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(c, b, v, g, scale=1.0)[0]


def _gla_right(c: Tensor, b: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return ssd(c, b, v, (g, torch.ones_like(g)), backend="reference")[0]


def _step_arguments(inputs: Inputs, problem: Problem) -> tuple[Any, ...]:
    c, b, x, (log_a, dt), state = inputs.args
    heads, width = c.shape[1], x.shape[2]
    b, x, log_a, dt, state = (expanded(t, heads, 1) for t in (b, x, log_a, dt, state))
    rate = (log_a[0] / dt[0])[:, None, None].expand(heads, width, c.shape[2])
    state = state.transpose(2, 3).to(torch.float32).contiguous()
    return c, b.contiguous(), x.contiguous(), dt[..., None].expand(*dt.shape, width), rate, state


def _mamba_step(c: Tensor, b: Tensor, x: Tensor, dt: Tensor, a: Tensor, state: Tensor) -> Tensor:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    zero = torch.zeros(1, 1, device=x.device).expand(*x.shape[1:])
    return selective_state_update(state, x, dt, a, b, c, D=zero, dt_bias=zero)


def _step_right(c: Tensor, b: Tensor, x: Tensor, dt: Tensor, a: Tensor, state: Tensor) -> Tensor:
    wide = state.transpose(2, 3).contiguous()
    decay = (dt[..., 0] * a[:, 0, 0], dt[..., 0])
    return ssd_step(c, b, x, decay, wide, backend="reference")


SCANS = ("ssd", "ssd_raster", "ssd_head", "ssd_causal")
MAMBA = "mamba_ssm.ops.triton.ssd_combined"

SCAN_PEERS = (
    Peer("mamba_ssm", SCANS, needs(MAMBA), mamba_arguments, _directions(_mamba), _directions(_mamba_right)),
    Peer(
        "mamba_ssm, a group a KV head",
        SCANS,
        needs(MAMBA),
        lambda inputs, problem: mamba_arguments(inputs, problem, inputs.args[1].shape[2]),
        _directions(_mamba),
        _directions(_mamba_right),
        another="the query heads of a group share one query",
    ),
    Peer(
        "flash-linear-attention",
        SCANS,
        needs("fla.ops.simple_gla"),
        gla_arguments,
        _directions(_gla),
        _directions(_gla_right),
    ),
    Peer(
        "mamba_ssm",
        ("step",),
        needs("mamba_ssm.ops.triton.selective_state_update"),
        _step_arguments,
        _mamba_step,
        _step_right,
        gradients=False,
    ),
)
"""Stand beside the scans and the step."""
