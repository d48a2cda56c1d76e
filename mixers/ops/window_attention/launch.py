"""How the kernels are cut: tile sizes, warps and stages, from shapes and what the chip offers."""

from __future__ import annotations

from typing import NamedTuple

import torch

MATRIX_TILE = 16
"""Fewest rows and columns of a matrix product."""

ROOMY = 200 * 1024
"""Shared memory from which a chip takes the operands of matrix products from there, not from registers."""


class Launch(NamedTuple):
    """Tiles of ``queries`` by ``keys`` slots, warps of a program, and loads in flight.

    ``single`` says that one tile has all keys of a block.
    """

    queries: int
    keys: int
    single: bool
    warps: int
    stages: int


def tile(size: int) -> int:
    """Return the smallest power of two that holds ``size``, and that a matrix product takes."""
    return max(MATRIX_TILE, 1 << (size - 1).bit_length())


def forward(queries: int, keys: int, head_dim: int, dtype: torch.dtype, shared: int) -> Launch:
    """Choose the launch of the forward kernel.

    Args:
        queries: Query slots of a block.
        keys: Key slots of a block.
        head_dim: P.
        dtype: Of q, k and v.
        shared: Bytes of shared memory that a program can have.
    """
    width = tile(head_dim)
    if dtype.itemsize == 4 or width > 128:
        most = 32 if dtype.itemsize * width <= 512 else 16
        return Launch(min(tile(queries), most), min(tile(keys), most), keys <= most, 4, 1)
    if keys <= 64:
        return Launch(min(tile(queries), 64), tile(keys), True, 4, 3)
    if shared < ROOMY:
        return Launch(min(tile(queries), 64), 32, False, 4, 2)
    rows = min(tile(queries), 128)
    return Launch(rows, tile(keys) if keys <= 128 else 64, keys <= 128, 8 if rows > 64 else 4, 2)


def backward_of_windows(
    queries: int, keys: int, head_dim: int, dtype: torch.dtype, shared: int
) -> Launch | None:
    """Choose the launch of the kernel that takes whole windows; None where they do not fit it."""
    width = tile(head_dim)
    most = 64 if dtype.itemsize == 2 and shared >= ROOMY else 32
    if max(queries, keys) > most or dtype.itemsize * width > 256:
        return None
    return Launch(tile(queries), tile(keys), True, 4, 2 if dtype.itemsize == 2 else 1)


def backward_by_tiles(queries: int, keys: int, head_dim: int, dtype: torch.dtype, shared: int) -> Launch:
    """Choose the launch of the kernels that go by tiles of queries and of keys."""
    width = tile(head_dim)
    if dtype.itemsize == 4 or width > 128:
        most = 32 if dtype.itemsize * width <= 512 else 16
        return Launch(min(tile(queries), most), min(tile(keys), most), False, 8 if width > 64 else 4, 1)
    most = 64 if shared >= ROOMY else 32
    return Launch(min(tile(queries), most), min(tile(keys), most), False, 8 if width * most >= 8192 else 4, 2)
