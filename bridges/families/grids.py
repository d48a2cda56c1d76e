"""Grids of tokens, and the runs they are laid on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bridges.errors import LayoutCaptureError
from bridges.families.vision import ClipTable, Run


def raster(t: int, h: int, w: int) -> Tensor:
    """Return the coordinates [t·h·w, 3] of a grid, last axis fastest."""
    return torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).view(-1, 3)


def first_run(slots: Tensor) -> int:
    """Return how many of ``slots`` [n] follow the first without a gap, itself included."""
    gaps = (slots.diff() != 1).nonzero()
    return int(gaps[0]) + 1 if len(gaps) else len(slots)


def is_run(slots: Tensor, size: int) -> bool:
    """Whether ``slots`` [n], which rise, begin with ``size`` tokens without a gap."""
    return len(slots) >= size and int(slots[size - 1] - slots[0]) == size - 1


def check_run(slots: Tensor, size: int, what: str, source: str) -> None:
    """Raise LayoutCaptureError unless ``slots`` begin with a run of ``size`` tokens."""
    if not is_run(slots, size):
        start, found = int(slots[0]), first_run(slots)
        raise LayoutCaptureError(
            f"{what} {start}…{start + found - 1} are {found}, but {source} makes {size} tokens."
        )


def slots_of(runs: Sequence[Run]) -> Tensor:
    """Return the tokens of some runs."""
    return torch.cat([torch.arange(start, stop) for start, stop in runs])


def place_squares(table: ClipTable, token: int, side: int, pixels: Tensor | None) -> None:
    """Add images of ``side`` × ``side`` tokens each, whose runs may touch.

    Args:
        table: The batch.
        token: The id of image tokens.
        side: Tokens a side.
        pixels: [images, C, H, W]; None where they were encoded before.

    Raises:
        LayoutCaptureError: A run is no whole number of images, or their number is not that of the pixels.
    """
    found = 0
    for row, runs in table.runs(token):
        for image in squares(runs, side, f"row {row}: image", "an image"):
            table.add(row, slots_of([image]), raster(1, side, side))
            found += 1
    if pixels is not None:
        check_count(len(pixels), found, "images")


def squares(runs: Sequence[Run], side: int, what: str, source: str) -> list[Run]:
    """Cut runs into squares of ``side`` × ``side`` tokens.

    Raises:
        LayoutCaptureError: A run is no whole number of them.
    """
    size = side**2
    for start, stop in runs:
        if (stop - start) % size:
            raise LayoutCaptureError(
                f"{what} tokens {start}…{stop - 1} are {stop - start}, but {source} makes {size} tokens."
            )
    return [(at, at + size) for start, stop in runs for at in range(start, stop, size)]


def check_count(given: int, found: int, what: str) -> None:
    """Raise LayoutCaptureError unless the pixels hold as many tiles or images as the tokens."""
    if given != found:
        raise LayoutCaptureError(
            f"pixel_values has {given} {what}, but there are tokens for {found}; pass the pixels of these tokens."
        )
