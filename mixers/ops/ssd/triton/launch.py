"""How the kernels are cut and launched: chunk, tiles, warps, by shape, type and the chip's shared memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixers.ops import triton_support

LONGEST_SEGMENT = 32
FEWEST_PROGRAMS = 512

DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Cut:
    """One launch: Q tokens a chunk, tiles of the state, and how a program runs.

    Attributes:
        chunk: Tokens Q of a chunk.
        block_k: Width of a tile along K.
        tiles_k: Tiles along K.
        block_p: Width of P, padded to a power of two.
        warps: Warps of a program.
        stages: Query heads whose loads are in flight.
    """

    chunk: int
    block_k: int
    tiles_k: int
    block_p: int
    warps: int
    stages: int


def padded(width: int) -> int:
    """Return the least power of two that holds ``width`` and that a matrix product takes."""
    return max(16, triton.next_power_of_2(width))


def forward_cut(width: int, values: int, sharing: int, dtype: torch.dtype, device: torch.device) -> Cut:
    """Choose how the forward pass is cut for K = ``width``, P = ``values`` and ``sharing`` heads a state."""
    k, p, room = padded(width), padded(values), triton_support.shared_memory(device)
    if dtype == torch.float32:
        block = min(k, 32)
        return Cut(32, block, k // block, p, 4, 1)
    for chunk, block, warps, stages in (
        (128, k, 8, 3 if sharing > 1 else 1),
        (128, 64, 8, 3),
        (64, k, 4, 3 if sharing > 1 else 1),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
    ):
        block = min(block, k)
        fixed, loaded = chunk * p, chunk * block
        if block == k:
            fixed += chunk * k + 2 * k * p
        else:
            loaded += chunk * block + 2 * block * p
        if dtype.itemsize * (fixed + max(1, stages - 1) * loaded) <= room - 2048:
            return Cut(chunk, block, k // block, p, warps, stages)
    return Cut(32, min(k, 32), k // min(k, 32), p, 4, 1)


def backward_cut(width: int, values: int, dtype: torch.dtype, device: torch.device) -> Cut:
    """Choose how the backward pass is cut for K = ``width`` and P = ``values``."""
    k, p = padded(width), padded(values)
    if dtype == torch.float32:
        block = min(k, 32)
        return Cut(32, block, k // block, p, 4, 1)
    block = min(k, 64)
    return Cut(64, block, k // block, p, 4, 3)


def state_tile(width: int, values: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Choose the tile (K, P) of a state that a program carries along a segment, and its warps."""
    if dtype == torch.float32:
        return min(width, 32), min(values, 32), 4
    return min(width, 128), min(values, 64), 4


def chunks_of_segment(lines: int, chunks: int) -> int:
    """Choose how many chunks a program runs over, where ``lines`` programs run side by side for each segment."""
    return max(1, min(LONGEST_SEGMENT, chunks * lines // FEWEST_PROGRAMS))


def dots(t: Tensor) -> dict[str, object]:
    """Return the types of matrix products on t: fp32 inputs keep fp32's accuracy on the matrix units."""
    kind = tl.float32 if triton_support.interpreting() else DOT_TYPES[t.dtype]
    return {"DOT": kind, "PRECISION": "tf32x3" if t.dtype == torch.float32 else "ieee"}
