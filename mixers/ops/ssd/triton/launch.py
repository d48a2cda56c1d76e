"""How the kernels are cut and launched: chunk, tiles, warps, by shape, type and the chip's shared memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from mixers.ops import triton_support

AnyCut = TypeVar("AnyCut", bound="Cut")
Result = TypeVar("Result")

NARROWEST = 64
"""Narrower tiles gave wrong gradients of C on an H100 with Triton 3.6, in 16 bits only."""

WIDEST_HELD = 256
"""The widest B whose gradient a program holds whole."""

LONGEST_SEGMENT = 32
FEWEST_PROGRAMS = 264


@dataclass(frozen=True)
class Run:
    """How the programs of one kernel run.

    Attributes:
        block: Width of a tile along K.
        warps: Warps of a program.
        stages: Depth of the pipeline that loads query heads or tiles.
    """

    block: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Cut:
    """How a pass is cut.

    Attributes:
        chunk: Tokens Q of a chunk.
        k: K, padded to a power of two.
        p: P, likewise.
    """

    chunk: int
    k: int
    p: int


@dataclass(frozen=True)
class ForwardCut(Cut):
    """How the forward pass is cut, and how its last kernel runs.

    Attributes:
        mix: How the last kernel runs.
        rows: Steps that a program mixes for one head; None: it mixes a whole chunk for all heads that share a
            decay, all of K at once.
    """

    mix: Run
    rows: int | None = None


@dataclass(frozen=True)
class BackwardCut(Cut):
    """How the backward pass is cut, and how its kernels run.

    Attributes:
        queries: The gradient of C.
        states: The gradients of the entering states.
        through: The gradients of B and X through the states.
        inputs: The other gradients of B and X.
    """

    queries: Run
    states: Run
    through: Run
    inputs: Run


def padded(width: int) -> int:
    """Return the least power of two that holds ``width``, and at least :data:`NARROWEST`."""
    return max(NARROWEST, triton.next_power_of_2(width))


def forward_cuts(
    width: int, values: int, sharing: int, both: bool, dtype: torch.dtype, device: torch.device
) -> list[ForwardCut]:
    """List how the forward pass can be cut for K = ``width``, P = ``values``, ``sharing`` heads a state, and one
    direction or both: the fastest first, the smallest last. The sums here are the least that a kernel takes."""
    k, p, room = padded(width), padded(values), triton_support.shared_memory(device)
    if dtype == torch.float32:
        return [ForwardCut(32, k, p, Run(min(k, 32), 4, 1), rows=32)]
    cuts = []
    if sharing > 1:
        for chunk, warps, stages in (((128, 8, 3), (128, 8, 2)) if both else ((64, 4, 3),)) + ((64, 4, 2),):
            fixed = chunk * p + chunk * k + 2 * k * p + 16 * k
            if dtype.itemsize * (fixed + max(1, stages - 1) * chunk * k) <= room:
                cuts.append(ForwardCut(chunk, k, p, Run(k, warps, stages)))
    for block, stages in ((min(k, 128), 3), (min(k, 64), 3), (min(k, 64), 2)):
        if dtype.itemsize * 64 * (block + (stages - 1) * (block + p)) <= room:
            cuts.append(ForwardCut(128, k, p, Run(block, 4, stages), rows=64))
    return cuts or [ForwardCut(128, k, p, Run(min(k, 64), 4, 1), rows=64)]


def backward_cuts(width: int, values: int, dtype: torch.dtype, device: torch.device) -> list[BackwardCut]:
    """List how the backward pass can be cut for K = ``width`` and P = ``values``, the fastest first."""
    k, p, room = padded(width), padded(values), triton_support.shared_memory(device)
    held = k if k <= WIDEST_HELD else 128
    if dtype == torch.float32:
        run, wide = Run(min(k, 32), 4, 1), Run(min(k, 32), 8, 1)
        return [BackwardCut(32, k, p, queries=run, states=run, through=wide, inputs=Run(held, 8, 1))]
    large = triton_support.roomy(device)
    tile = dtype.itemsize * 64 * (held + p)
    stages = max(s for s in (1, 2, 3) if s == 1 or s * tile * 1.25 <= room)
    best = BackwardCut(
        64,
        k,
        p,
        queries=Run(32, 4, 3 if large else 2),
        states=Run(min(k, 64), 4 if large else 8, 3 if large else 2),
        through=Run(min(k, 64 if large else 32), 8, 1),
        inputs=Run(held, 8, stages),
    )
    small = replace(
        best,
        queries=Run(32, 4, 1),
        states=Run(min(k, 64), 8, 1),
        through=Run(32, 8, 1),
        inputs=Run(min(k, 64), 8, 1),
    )
    return [best, small]


def first_fitting(cuts: Sequence[AnyCut], what: Hashable, run: Callable[[AnyCut], Result]) -> Result:
    """Run with the first cut whose kernels get the shared memory they ask for, which only the compiler knows.

    Args:
        cuts: The one to prefer first.
        what: What else decides how the kernels are compiled; a cut that did not fit is not tried again for it.
        run: Launches the kernels of a cut.

    Raises:
        OutOfResources: Not even the last fits.
    """
    for cut in cuts[:-1]:
        if (what, cut) not in _too_large:
            try:
                return run(cut)
            except OutOfResources:
                _too_large.add((what, cut))
    return run(cuts[-1])


_too_large: set[Hashable] = set()


def state_tile(width: int, values: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Choose the tile (K, P) of a state that a program carries along a segment, and its warps."""
    if dtype == torch.float32:
        return min(width, 32), min(values, 32), 4
    return min(width, 64), min(values, 128), 4


def chunks_of_segment(lines: int, chunks: int) -> int:
    """Choose how many chunks a program runs over, where ``lines`` programs run side by side for each segment."""
    return max(1, min(LONGEST_SEGMENT, chunks * lines // FEWEST_PROGRAMS))


def dots(t: Tensor) -> dict[str, object]:
    """Return the types of matrix products on t: fp32 inputs keep fp32's accuracy on the matrix units."""
    return {
        "DOT": triton_support.dot_type(t.dtype),
        "PRECISION": "tf32x3" if t.dtype == torch.float32 else "ieee",
    }
